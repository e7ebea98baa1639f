"""What is checked before a PPO run starts."""

from collections.abc import Callable, Mapping

from raytrl.config.runs.ppo import PpoRun
from raytrl.plan.checks.common import Facts, Rows, check_functions, check_run, check_trackers, load_all
from raytrl.plan.checks.prompts import check_prompts_of, check_readers
from raytrl.plan.checks.rows import Tell, in_no_hurry, in_silence


def check_ppo(run: PpoRun, tell: Tell = in_silence, before_last: Callable[[], None] = in_no_hurry) -> Facts:
    """Checks models, tokenizer, reward sources and every prompt.

    Args:
        tell: hears how far it is with many prompts.
        before_last: called before what takes longest and fails least: models are read, prompts are tried.

    Raises:
        ConfigError: something is missing, or does not fit together.
    """
    embeddings = check_run(run)
    check_functions(run.reward)
    check_trackers(run)
    rows = load_all(run)
    before_last()
    return try_data(run, rows, embeddings, tell)


def try_data(run: PpoRun, rows: Rows, embeddings: Mapping[str, int], tell: Tell = in_silence) -> Facts:
    """Every prompt, alone.

    Args:
        embeddings: rows of each model that was looked at, by key.

    Raises:
        ConfigError: one cannot be used.
    """
    facts = Facts()
    for key, dataset in rows.items():
        facts |= check_prompts_of(run, dataset, key, embeddings, tell)
    others = {"value_model.init": run.value_model.init, "reference.path": run.reference.path}
    check_readers(run, others, embeddings)
    return facts
