"""What is checked before a PPO run is started, and what is then going to run where."""

from raytrl.config.runs.ppo import PpoRun
from raytrl.plan.checks.common import check_model_path, check_prompt_data, check_sources, check_trackers
from raytrl.plan.where import joins_cluster
from raytrl.roles.device import check_cpu


def check_ppo(run: PpoRun) -> dict[str, str]:
    """Checks models, tokenizer, reward sources and every prompt.

    Returns:
        Words about the data, by dataset key.

    Raises:
        ConfigError: something is missing, or does not fit together.
    """
    models = {
        "model.path": run.model.path,
        "value_model.init": run.value_model.init,
        "reference.path": run.reference.path,
    }
    for key, path in models.items():
        if path is not None:
            check_model_path(path, key)
    check_sources(run.reward)
    check_trackers(run)
    if not run.learner.uses_gpu and not joins_cluster(run):
        check_cpu(run)
    words = {"data.train": check_prompt_data(run, run.data.train, "data.train")}
    if run.data.eval is not None:
        words["data.eval"] = check_prompt_data(run, run.data.eval, "data.eval")
    return words
