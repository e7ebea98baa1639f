"""What is checked before a PPO run starts."""

from collections.abc import Mapping
from typing import Any

from raytrl.config.runs.ppo import PpoRun
from raytrl.plan.checks.common import Facts, check_functions, check_run, check_trackers
from raytrl.plan.checks.prompts import check_prompts_of


def check_ppo(run: PpoRun) -> Facts:
    """Checks models, tokenizer, reward sources and every prompt.

    Raises:
        ConfigError: something is missing, or does not fit together.
    """
    embeddings = check_run(run).get("model.path")
    check_functions(run.reward)
    check_trackers(run)
    return check_ppo_prompts(run, embeddings)


def check_ppo_prompts(run: PpoRun, embeddings: int | None = None) -> Facts:
    """Every prompt, alone.

    Args:
        embeddings: rows of the policy's, where they were looked at.

    Raises:
        ConfigError: one cannot be used.
    """
    sources = {"data.train": run.data.train, "data.eval": run.data.eval}
    facts = Facts()
    for key, source in sources.items():
        if source is not None:
            facts |= check_prompts_of(run, source, key, embeddings)
    return facts


def try_data(run: PpoRun, found: Mapping[str, Any]) -> Facts:
    """`check_ppo_prompts`, for `raytrl plan`; `found` are its datasets, which are read from the cache again."""
    return check_ppo_prompts(run)
