"""What every run file has, and what every one that trains has."""

import re
from typing import Any, TypeVar

from pydantic import Field, field_validator

from raytrl.config.foreign.native import (
    LORA_CLASS,
    check_values,
    native_fields,
)
from raytrl.config.renamed import unknown_key
from raytrl.config.sections.base import Section
from raytrl.config.sections.data import DataSection
from raytrl.config.sections.learner import CheckpointSection, ClusterSection, LearnerSection
from raytrl.config.sections.model import ModelSection

T = TypeVar("T")


# What transformers can report to, by its names for them.
TRACKERS = (
    *("tensorboard", "wandb", "mlflow", "trackio", "comet_ml", "clearml", "neptune", "swanlab", "dvclive"),
    *("dagshub", "codecarbon", "azure_ml", "flyte", "kubeflow", "all"),
)


class Run(Section):
    """What every kind of run has."""

    kind: str
    """What the run does; the command of the same name runs it."""
    name: str
    """The run directory is <output_dir>/<name>."""
    output_dir: str = "runs"
    """Where run directories go: a local or shared path, or a URI such as s3://bucket/path."""
    seed: int = Field(default=0, ge=0)
    """What all random numbers of the run follow from: new weights, the order of rows, responses, a sweep's values."""
    cluster: ClusterSection = ClusterSection()
    """Which Ray the run joins."""

    @field_validator("name")
    @classmethod
    def _one_folder(cls, name: str) -> str:
        if not re.fullmatch(r"[\w][\w.\-]*", name):
            raise ValueError(f"found: {name!r}; expected: a folder name of letters, digits, '.', '_' and '-'")
        return name


class TrainingRun(Run):
    """What every kind has that trains a network on Ray Train workers."""

    model: ModelSection
    """The network to train."""
    lora: dict[str, Any] | None = None
    """Fields of PEFT's LoraConfig: an adapter is trained. null: all weights are."""
    data: DataSection
    """Where the rows come from."""
    learner: LearnerSection = LearnerSection()
    """The workers that train."""
    checkpoint: CheckpointSection = CheckpointSection()
    """How often the state of the run is stored, and how many of these stay."""
    report_to: list[str] = Field(default=["tensorboard"])
    """Trackers that metrics go to besides metrics.jsonl, by their names in transformers; one, a list, or null for none."""

    @field_validator("report_to", mode="before")
    @classmethod
    def _list(cls, value: Any) -> Any:
        return [] if value in (None, "none") else [value] if isinstance(value, str) else value

    @field_validator("report_to", mode="after")
    @classmethod
    def _known_trackers(cls, trackers: list[str]) -> list[str]:
        unknown = [f"found: {t!r}; expected: some of {', '.join(TRACKERS)}" for t in trackers if t not in TRACKERS]
        return or_raise(unknown[:1], trackers)

    @field_validator("lora", mode="after")
    @classmethod
    def _native_lora(cls, lora: dict[str, Any] | None) -> dict[str, Any] | None:
        if lora is None:
            return None
        lora = dict(lora)
        known = native_fields(LORA_CLASS)
        problems = [unknown_key("", key, known) for key in lora if key not in known]
        problems += [p.removeprefix(".") for p in check_values("", LORA_CLASS, lora)]
        if "task_type" in lora:
            problems.append("task_type: is set by `kind`")
        return or_raise(problems, lora)


def or_raise(problems: list[str], value: T) -> T:
    """The value, or all its problems as one ValueError with a line each."""
    if problems:
        raise ValueError("\n".join(problems))
    return value
