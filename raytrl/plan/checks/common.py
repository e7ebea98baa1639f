"""Checks that several kinds of run share: trackers, models, reward sources."""

import importlib.util
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from raytrl.config.runs.base import Run, TrainingRun
from raytrl.config.sections.reward import RewardSection
from raytrl.errors import ConfigError
from raytrl.plan.checks.weights import check_weights
from raytrl.plan.hub import hub_folder
from raytrl.roles.reward.function import FunctionSource

Rows = Mapping[str, Any]  # key of the run file → its datasets.Dataset


@dataclass(frozen=True)
class Facts:
    """What the checks of a run found out about its datasets: by their keys how many rows, words about them and about their
    columns; notices; the tools that its conversations may use; and whatever else it is about."""

    rows: Mapping[str, int] = field(default_factory=dict)
    words: Mapping[str, str] = field(default_factory=dict)
    notices: Sequence[str] = ()  # what of the rows is cut, left out, written twice
    columns: Mapping[str, str] = field(default_factory=dict)
    tools: Sequence[tuple[str, str]] = ()  # (subject, sentence)
    found: Sequence[tuple[str, str]] = ()  # (subject, sentence)

    def __or__(self, other: "Facts") -> "Facts":
        """Of both; a notice that both have is told once."""
        return Facts(
            {**self.rows, **other.rows},
            {**self.words, **other.words},
            tuple(dict.fromkeys([*self.notices, *other.notices])),
            {**self.columns, **other.columns},
            tuple(dict.fromkeys([*self.tools, *other.tools])),
            tuple(dict.fromkeys([*self.found, *other.found])),
        )


def check_run(run: Run) -> dict[str, int]:
    """What every kind has: its models can be had, and are what the run needs.

    Returns:
        Rows of embeddings of the models that could be looked at, by key.

    Raises:
        ConfigError: naming the key.
    """
    for use in run.models():
        if use.path is not None:
            check_model_path(use.path, use.key, use.revision, adapters=use.adapters)
    return check_weights(run)


def tokenizer_at(place: str, revision: str | None, trust_remote_code: bool) -> Any:
    """The tokenizer of the model that a run is about.

    Raises:
        ConfigError: it cannot be loaded.
    """
    from raytrl.roles.models.tokenizer import load_tokenizer

    try:
        return load_tokenizer(place, revision, trust_remote_code)
    except (OSError, ValueError) as error:
        raise ConfigError(f"model.tokenizer: cannot be loaded: {str(error).splitlines()[0]}") from None


def load_all(run: Run) -> Rows:
    """The datasets that the run file names.

    Raises:
        DataError: one cannot be loaded.
    """
    from raytrl.data import load_data  # datasets: 1.3 s

    return {key: load_data(source, key) for key, source in run.data_sources().items()}


def check_rows(run: Run, rows: Mapping[str, int]) -> None:
    """The datasets are large enough; ConfigError names those that are not.

    Args:
        rows: of each dataset that could be counted, by its key.
    """
    if problems := run.too_few_rows(rows):
        raise ConfigError("\n".join(problems))


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
