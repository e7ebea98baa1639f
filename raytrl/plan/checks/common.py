"""Checks that several kinds of run share: trackers, models, reward sources, prompts."""

import importlib.util
import os
from collections.abc import Mapping
from dataclasses import dataclass, field

from raytrl.config.runs.base import Run, TrainingRun
from raytrl.config.runs.rollout import RolloutRun
from raytrl.config.sections.data import DataSource
from raytrl.config.sections.reward import RewardSection
from raytrl.errors import ConfigError
from raytrl.plan.checks.weights import check_vocabulary, check_weights
from raytrl.plan.hub import hub_folder
from raytrl.plan.where import joins_cluster
from raytrl.roles.device import check_cpu
from raytrl.roles.reward.function import FunctionSource


@dataclass(frozen=True)
class Facts:
    """What the checks of a run found out about its datasets, by their keys: how many rows, and words about them."""

    rows: Mapping[str, int] = field(default_factory=dict)
    words: Mapping[str, str] = field(default_factory=dict)


def check_run(run: Run) -> dict[str, int]:
    """What every kind has: its models can be had, and this machine can compute as asked.

    Returns:
        Rows of embeddings of the models that could be looked at, by key.

    Raises:
        ConfigError: naming the key.
    """
    for use in run.models():
        if use.path is not None:
            check_model_path(use.path, use.key, use.revision, adapters=use.key.startswith("reward."))
    if not run.uses_gpu and not joins_cluster(run):
        check_cpu(run)
    return check_weights(run)


def check_trackers(run: TrainingRun) -> None:
    """Every tracker of `report_to` is installed; ConfigError names the one that is not."""
    for tracker in run.report_to:
        if tracker == "tensorboard" or tracker == "all":
            continue
        package = {"azure_ml": "azureml", "flyte": "flytekit"}.get(tracker, tracker)
        if importlib.util.find_spec(package) is None:
            raise ConfigError(
                f"report_to: {tracker!r} is not installed; expected: `pip install {package}`, or leave it out"
            )


def check_model_path(path: str, key: str, revision: str | None = None, adapters: bool = False) -> None:
    """A local folder with a model in it, or a hub id that is cached or can be reached.

    Args:
        adapters: whether a folder with an adapter alone will do.

    Raises:
        ConfigError: naming the key.
    """
    if os.path.isdir(path):
        is_adapter = os.path.isfile(os.path.join(path, "adapter_config.json"))
        if not os.path.isfile(os.path.join(path, "config.json")) and not (adapters and is_adapter):
            found = "an adapter; use the model in its folder merged/" if is_adapter else "a folder without config.json"
            raise ConfigError(f"{key}: found: {path!r}, {found}; expected: a Hugging Face model folder")
        return
    hub_folder(path, key, revision)


def check_functions(section: RewardSection) -> None:
    """Reward functions can be loaded, each in a process of its own, as in the run."""
    for source in section.sources:
        if source.function is not None:
            FunctionSource(source).close()


def check_prompts_of(run: RolloutRun, source: DataSource, where: str, embeddings: int | None) -> tuple[int, str]:
    """Goes through every prompt; returns how many there are, and words about them."""
    from raytrl.data import check_columns, load_data  # datasets: 1.3 s
    from raytrl.roles.models.tokenizer import load_tokenizer, turn_end
    from raytrl.roles.prompts import PromptTable, check_prompts, max_positions

    dataset = load_data(source, where)
    check_columns(dataset, run, where)
    try:
        tokenizer = load_tokenizer(run.tokenizer_path, None, run.model.trust_remote_code)
    except (OSError, ValueError) as error:
        raise ConfigError(f"model.tokenizer: cannot be loaded: {str(error).splitlines()[0]}") from None
    beyond = check_vocabulary(tokenizer, embeddings, "model.tokenizer")
    longest, num_cut = check_prompts(PromptTable(dataset, tokenizer, run.rollout, where), tokenizer, where)
    kept, new = min(longest, run.rollout.max_prompt_length), run.rollout.sampling.max_new_tokens
    positions = max_positions(str(run.model.path), run.model.trust_remote_code)
    if positions is not None and kept + new > positions:
        raise ConfigError(
            f"{where}: the longest prompt and its response do not fit the model; found: {kept} tokens + "
            f"rollout.sampling.max_new_tokens {new} = {kept + new}; expected: at most {positions}; lower max_new_tokens or "
            f"rollout.max_prompt_length"
        )
    turn = turn_end(tokenizer) if not isinstance(dataset[0]["prompt"], str) else None
    ends = (
        "" if turn is None or turn[0] == tokenizer.eos_token_id else f"; a turn's end, {turn[1]}, ends a response too"
    )
    cut = f", {num_cut:,} cut to rollout.max_prompt_length" if num_cut else ""
    return len(dataset), f"{len(dataset):,} prompts of up to {longest} tokens{cut}{ends}{beyond}"
