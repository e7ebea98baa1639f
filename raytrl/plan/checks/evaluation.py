"""What is checked before an evaluation starts."""

from collections.abc import Mapping

from raytrl.config.runs.evaluation import EvalRun
from raytrl.errors import ConfigError, DataError
from raytrl.plan.checks.common import Facts, Rows, check_functions, check_run, load_all
from raytrl.plan.checks.prompts import check_prompts_of


def check_eval(run: EvalRun) -> Facts:
    """Checks models, tokenizers, reward sources and every prompt.

    Raises:
        ConfigError: something is missing, or does not fit together.
    """
    embeddings = check_run(run)
    check_functions(run.reward)
    facts = try_data(run, load_all(run), embeddings)
    if run.reference.path is not None:
        from raytrl.roles.models.tokenizer import load_tokenizer

        trust = run.model.trust_remote_code
        reference = load_tokenizer(run.reference.path, None, trust).get_vocab()
        for key, (_, tokenizer_path) in run.evaluated.items():
            if load_tokenizer(tokenizer_path, None, trust).get_vocab() != reference:
                raise ConfigError(
                    f"reference.path: a KL needs the same token ids on both sides; found: another vocabulary in "
                    f"{run.reference.path!r} than in that of {key}, {tokenizer_path!r}; expected: a model with the same "
                    f"tokenizer, or no reference"
                )
    return facts


def try_data(run: EvalRun, rows: Rows, embeddings: Mapping[str, int]) -> Facts:
    """Every prompt, alone, for each model that is evaluated.

    Args:
        embeddings: rows of each model that was looked at, by key.

    Raises:
        ConfigError: one cannot be used.
    """
    facts = Facts()
    for key, (path, tokenizer) in reversed(run.evaluated.items()):
        own = run.model_copy(update={"model": run.model.model_copy(update={"path": path, "tokenizer": tokenizer})})
        known = embeddings.get("model.path" if key == "model" else key)
        try:
            for where, dataset in rows.items():
                facts |= check_prompts_of(own, dataset, where, known)
        except DataError:
            raise  # names the row already
        except ConfigError as error:
            raise ConfigError(f"{key}: {error}" if key != "model" else str(error)) from None
    return facts
