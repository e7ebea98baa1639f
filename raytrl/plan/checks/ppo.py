"""What is checked before a PPO run starts."""

from raytrl.config.runs.ppo import PpoRun
from raytrl.plan.checks.common import Facts, check_functions, check_run, check_trackers
from raytrl.plan.checks.prompts import check_prompts_of


def check_ppo(run: PpoRun) -> Facts:
    """Checks models, tokenizer, reward sources and every prompt.

    Raises:
        ConfigError: something is missing, or does not fit together.
    """
    check_run(run)
    check_functions(run.reward)
    check_trackers(run)
    return check_ppo_prompts(run)


def check_ppo_prompts(run: PpoRun) -> Facts:
    """Every prompt, alone.

    Raises:
        ConfigError: one cannot be used.
    """
    sources = {"data.train": run.data.train, "data.eval": run.data.eval}
    facts = Facts()
    for key, source in sources.items():
        if source is not None:
            facts |= check_prompts_of(run, source, key)
    return facts
