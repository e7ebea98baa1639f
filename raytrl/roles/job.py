"""What a driver hands to its workers. Imports nothing heavy, so that a driver can make it at once."""

from dataclasses import dataclass
from typing import Generic, TypeVar

from raytrl.config.runs.base import TrainingRun

R_co = TypeVar("R_co", bound=TrainingRun, covariant=True)


@dataclass(frozen=True)
class Job(Generic[R_co]):
    """A run as a worker needs it; pickled once, the same for every attempt."""

    run: R_co
    command: str
    versions: dict[str, str]
