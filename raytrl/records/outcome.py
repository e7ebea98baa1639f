"""What a run came to, for whoever started it."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from raytrl.records.sweep import Trial


@dataclass(frozen=True)
class Outcome:
    """A run that is done."""

    place: str  # the run directory
    already_done: bool  # by an earlier start: nothing was done now


@dataclass(frozen=True)
class Trained(Outcome):
    """Of SFT, reward modelling, DPO and PPO."""

    model: str
    metrics: Mapping[str, float]  # at the end


@dataclass(frozen=True)
class Evaluated(Outcome):
    """Of an evaluation."""

    results: Mapping[str, Any]  # what results.json holds
    samples: Sequence[Mapping[str, Any]]  # rows of samples.jsonl


@dataclass(frozen=True)
class Served(Outcome):
    """Of a server that was stopped."""

    cut_off: int  # requests that were not finished in time


@dataclass(frozen=True)
class Swept(Outcome):
    """Of a sweep."""

    trials: Sequence[Trial]
    best: str  # its name
    model: str  # of the best
