"""What a driver hands to its workers. Imports nothing heavy, so that a driver can make it at once."""

from dataclasses import dataclass

from raytrl.config.runs.ppo import PpoRun
from raytrl.config.runs.supervised import SupervisedRun


@dataclass(frozen=True)
class SupervisedJob:
    """A supervised run as a worker needs it; pickled once, the same for every attempt."""

    run: SupervisedRun
    command: str
    versions: dict[str, str]
    has_tokenizer: bool  # the driver trained one: it lies in the run directory


@dataclass(frozen=True)
class PpoJob:
    """A PPO run as a learner worker needs it; pickled once, the same for every attempt."""

    run: PpoRun
    command: str
    versions: dict[str, str]
