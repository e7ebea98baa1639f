"""The exceptions that raytrl raises on purpose.

    RaytrlError                    1
    ├── ConfigError                2   the request is wrong
    │   ├── DataError
    │   ├── NotHadError
    │   ├── ResourceError
    │   └── UncountedError
    ├── RunError                   1   a run was started and failed
    │   ├── WorkerError
    │   ├── StalledError
    │   ├── RewardError
    │   ├── NonFiniteError
    │   ├── ActorBrokenError
    │   ├── WeightsVersionError
    │   ├── WeightsGoneError
    │   ├── ActorsGoneError
    │   ├── WeightGroupError
    │   └── StaleAttemptError
    └── TrialStoppedError          1   of a sweep

The number is `exit_status`, which the command line exits with: 2 when nothing was started, 1 when a run failed.

Each takes exactly one string, so that every one of them pickles across Ray unchanged. Messages read
*where: what is wrong; found; expected; what to do*. A new one goes below the class whose exit status it has: a
docstring that says what happened, no `__init__`, and a line in this tree.
"""


class RaytrlError(Exception):
    """Base of all errors that raytrl reports without a traceback."""

    exit_status = 1


class ConfigError(RaytrlError):
    """The run file, an override or the command line asks for something that cannot be done."""

    exit_status = 2


class DataError(ConfigError):
    """A dataset is missing, empty, or has a row or column that the run cannot use."""


class NotHadError(ConfigError):
    """A model is neither on this machine nor had from the hub."""


class ResourceError(ConfigError):
    """The machine or cluster does not have what the run asks for."""


class UncountedError(ConfigError):
    """A model that may well run, but whose memory nobody has counted; told, not refused."""


class RunError(RaytrlError):
    """A run was started and failed."""


class TrialStoppedError(RaytrlError):
    """A sweep's trial need not go on; the message says why."""


class WorkerError(RunError):
    """A worker process failed; the message names its rank and node and the one cause."""


class StalledError(RunError):
    """A bounded wait passed its limit; the message says who waited for whom."""


class RewardError(RunError):
    """A reward source raised, hung, or returned something that is not one finite number a response."""


class NonFiniteError(RunError):
    """A loss, gradient or reward is NaN or infinite; the message names the rows."""


class ActorBrokenError(RunError):
    """An actor's work raised what nobody meant to raise (a CUDA error, a dead engine): the actor is to be started anew."""


class WeightsVersionError(RunError):
    """A rollout engine holds (or answered with) other weights than the request named."""


class WeightsGoneError(RunError):
    """A rollout engine has not the weights it should serve, and they are sent only once; it takes the next ones."""


class ActorsGoneError(RunError):
    """All actors of a pool are gone for good."""


class WeightGroupError(RunError):
    """The process group that weights travel through lost a member, or one did not come in time."""


class StaleAttemptError(RunError):
    """A request of a learner group that has ended reached an actor; nobody waits for the answer."""
