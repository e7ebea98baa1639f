"""What is checked before a PPO run starts."""

from raytrl.config.runs.ppo import PpoRun
from raytrl.plan.checks.common import Facts, check_functions, check_prompts_of, check_run, check_trackers


def check_ppo(run: PpoRun) -> Facts:
    """Checks models, tokenizer, reward sources and every prompt.

    Raises:
        ConfigError: something is missing, or does not fit together.
    """
    check_run(run)
    check_functions(run.reward)
    check_trackers(run)
    sources = {"data.train": run.data.train, "data.eval": run.data.eval}
    found = {key: check_prompts_of(run, source, key) for key, source in sources.items() if source is not None}
    rows, words, columns = ({key: facts[i] for key, facts in found.items()} for i in range(3))
    return Facts(rows, words, columns)  # type: ignore[arg-type]
