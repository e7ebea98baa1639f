"""Checks that several kinds of run share: trackers, models, reward sources, prompts."""

import importlib.util
import os

from raytrl.config.runs.base import TrainingRun
from raytrl.config.runs.evaluation import EvalRun
from raytrl.config.runs.ppo import PpoRun
from raytrl.config.sections.data import DataSource
from raytrl.config.sections.reward import RewardSection
from raytrl.errors import ConfigError
from raytrl.roles.reward.function import FunctionSource


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
    from huggingface_hub import get_hf_file_metadata, hf_hub_url, try_to_load_from_cache
    from huggingface_hub.errors import HFValidationError

    try:
        if isinstance(try_to_load_from_cache(path, "config.json", revision=revision), str):
            return
        get_hf_file_metadata(hf_hub_url(path, "config.json", revision=revision), timeout=3)
    except HFValidationError:
        raise ConfigError(f"{key}: no such folder; found: {path!r} (nor can it be a hub id)") from None
    except Exception as error:  # offline, gated, missing: each has its own class in each version of the client
        raise ConfigError(
            f"{key}: {path!r} cannot be had: no such folder, not in the local cache, and the hub says: "
            f"{type(error).__name__}: {str(error).splitlines()[0]}"
        ) from None


def check_sources(section: RewardSection) -> None:
    """Reward models can be had, reward functions can be loaded."""
    for i, source in enumerate(section.sources):
        key = f"reward.sources.{i}"
        if source.model is not None:
            check_model_path(source.model, f"{key}.model", adapters=True)
        elif source.function is not None:
            FunctionSource(source).close()  # in a process of its own, as in the run


def check_prompt_data(run: PpoRun | EvalRun, source: DataSource, where: str) -> str:
    """Goes through every prompt; returns words about them."""
    from raytrl.data import check_columns, load_data  # datasets: 1.3 s
    from raytrl.roles.models.tokenizer import load_tokenizer
    from raytrl.roles.prompts import PromptTable, check_prompts, max_positions

    dataset = load_data(source, where)
    check_columns(dataset, run, where)
    try:
        tokenizer = load_tokenizer(run.tokenizer_path, None, run.model.trust_remote_code)
    except (OSError, ValueError) as error:
        raise ConfigError(f"model.tokenizer: cannot be loaded: {str(error).splitlines()[0]}") from None
    longest, num_cut = check_prompts(PromptTable(dataset, tokenizer, run.rollout, where), tokenizer, where)
    kept, new = min(longest, run.rollout.max_prompt_length), run.rollout.sampling.max_new_tokens
    positions = max_positions(str(run.model.path), run.model.trust_remote_code)
    if positions is not None and kept + new > positions:
        raise ConfigError(
            f"{where}: the longest prompt and its response do not fit the model; found: {kept} tokens + "
            f"rollout.sampling.max_new_tokens {new} = {kept + new}; expected: at most {positions}; lower max_new_tokens or "
            f"rollout.max_prompt_length"
        )
    cut = f", {num_cut:,} cut to rollout.max_prompt_length" if num_cut else ""
    return f"{len(dataset):,} prompts of up to {longest} tokens{cut}"
