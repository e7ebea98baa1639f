"""What is checked before a PPO run starts."""

from raytrl.config.runs.ppo import PpoRun
from raytrl.plan.checks.common import Facts, check_functions, check_prompts_of, check_run, check_trackers


def check_ppo(run: PpoRun) -> Facts:
    """Checks models, tokenizer, reward sources and every prompt.

    Raises:
        ConfigError: something is missing, or does not fit together.
    """
    embeddings = check_run(run).get("model.path")
    check_functions(run.reward)
    check_trackers(run)
    sources = {"data.train": run.data.train, "data.eval": run.data.eval}
    found = {
        key: check_prompts_of(run, source, key, embeddings) for key, source in sources.items() if source is not None
    }
    return Facts({key: rows for key, (rows, _) in found.items()}, {key: words for key, (_, words) in found.items()})
