"""What is checked before an evaluation starts."""

from collections.abc import Callable, Mapping

from raytrl.config.runs.evaluation import EvalRun
from raytrl.errors import ConfigError, DataError
from raytrl.plan.checks.common import Facts, Rows, check_functions, check_run, load_all
from raytrl.plan.checks.prompts import check_prompts_of, check_readers
from raytrl.plan.checks.rows import Tell, in_no_hurry, in_silence


def check_eval(run: EvalRun, tell: Tell = in_silence, before_last: Callable[[], None] = in_no_hurry) -> Facts:
    """Checks models, tokenizers, reward sources and every prompt.

    Args:
        tell: hears how far it is with many prompts.
        before_last: called before what takes longest and fails least: models are read, prompts are tried.

    Raises:
        ConfigError: something is missing, or does not fit together.
    """
    embeddings = check_run(run)
    check_functions(run.reward)
    rows = load_all(run)
    before_last()
    return try_data(run, rows, embeddings, tell)


def try_data(run: EvalRun, rows: Rows, embeddings: Mapping[str, int], tell: Tell = in_silence) -> Facts:
    """Every prompt, alone, for each model that is evaluated.

    Args:
        embeddings: rows of each model that was looked at, by key.

    Raises:
        ConfigError: one cannot be used.
    """
    facts = Facts()
    for key, (path, tokenizer) in reversed(run.evaluated.items()):
        own = run.model_copy(update={"model": run.model.model_copy(update={"path": path, "tokenizer": tokenizer})})
        place = "model.path" if key == "model" else key
        known = {name: size for name, size in embeddings.items() if name != "model.path"}
        known |= {"model.path": embeddings[place]} if place in embeddings else {}
        try:
            for where, dataset in rows.items():
                facts |= check_prompts_of(own, dataset, where, known, tell)
            check_readers(own, {"reference.path": run.reference.path}, known)
        except DataError:
            raise  # names the row already
        except ConfigError as error:
            raise ConfigError(f"{key}: {error}" if key != "model" else str(error)) from None
    return facts
