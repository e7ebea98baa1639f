"""What is checked before an evaluation starts."""

from raytrl.config.runs.evaluation import EvalRun
from raytrl.errors import ConfigError, DataError
from raytrl.plan.checks.common import Facts, check_functions, check_prompts_of, check_run


def check_eval(run: EvalRun) -> Facts:
    """Checks models, tokenizers, reward sources and every prompt.

    Raises:
        ConfigError: something is missing, or does not fit together.
    """
    embeddings = check_run(run)
    check_functions(run.reward)
    rows, words = 0, ""
    for key, (path, tokenizer) in reversed(run.evaluated.items()):
        own = run.model_copy(update={"model": run.model.model_copy(update={"path": path, "tokenizer": tokenizer})})
        try:
            rows, words = check_prompts_of(
                own, run.data.eval, "data.eval", embeddings.get("model.path" if key == "model" else key)
            )
        except DataError:
            raise  # names the row already
        except ConfigError as error:
            raise ConfigError(f"{key}: {error}" if key != "model" else str(error)) from None
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
    return Facts({"data.eval": rows}, {"data.eval": words})
