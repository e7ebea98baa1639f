"""What is checked before an evaluation starts."""

from raytrl.config.runs.evaluation import EvalRun
from raytrl.errors import ConfigError, DataError
from raytrl.plan.checks.common import check_model_path, check_prompt_data, check_sources
from raytrl.plan.where import joins_cluster
from raytrl.roles.device import check_cpu


def check_eval(run: EvalRun) -> str:
    """Checks models, tokenizers, reward sources and every prompt; returns words about the prompts.

    Raises:
        ConfigError: something is missing, or does not fit together.
    """
    for key, path in {
        "model.path": run.model.path,
        "compare": run.compare,
        "reference.path": run.reference.path,
    }.items():
        if path is not None:
            check_model_path(path, key)
    check_sources(run.reward)
    if not run.rollout.uses_gpu and not joins_cluster(run):
        check_cpu(run)
    words = ""
    for key, (path, tokenizer) in reversed(run.models.items()):
        own = run.model_copy(update={"model": run.model.model_copy(update={"path": path, "tokenizer": tokenizer})})
        try:
            words = check_prompt_data(own, run.data.eval, "data.eval")
        except DataError:
            raise  # names the row already
        except ConfigError as error:
            raise ConfigError(f"{key}: {error}" if key != "model" else str(error)) from None
    if run.reference.path is not None:
        from raytrl.roles.models.tokenizer import load_tokenizer

        trust = run.model.trust_remote_code
        reference = load_tokenizer(run.reference.path, None, trust).get_vocab()
        for key, (_, tokenizer_path) in run.models.items():
            if load_tokenizer(tokenizer_path, None, trust).get_vocab() != reference:
                raise ConfigError(
                    f"reference.path: a KL needs the same token ids on both sides; found: another vocabulary in "
                    f"{run.reference.path!r} than in that of {key}, {tokenizer_path!r}; expected: a model with the same "
                    f"tokenizer, or no reference"
                )
    return words
