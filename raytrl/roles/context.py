"""What a training process may ask of whoever started it (Ray Train in a run, a plain object in a test)."""

from contextlib import AbstractContextManager
from typing import Protocol, TypeVar

from raytrl.records.progress import Progress

# Workers wait for each other this long, and for one call of a library. That one of them hangs is seen sooner: by the driver,
# in `learner.stall_timeout_s` without any work.
EXCHANGE_LIMIT_S = 24 * 3600
T = TypeVar("T")


class WorkerContext(Protocol):
    """One rank's view of its run."""

    rank: int
    local_rank: int
    world_size: int
    scratch: str  # a folder of this run, shared by the ranks of one node

    def restored(self) -> AbstractContextManager[str | None]:
        """The folder of the last committed checkpoint while the block runs, None at the first start."""
        ...

    def commit(self, step: int, folder: str | None) -> None:
        """Stores a checkpoint. All ranks call it together; `folder` is None where another rank of the node gives it."""
        ...

    def progress(self, event: Progress) -> None:
        """Tells the driver; never blocks, never fails the run."""
        ...

    def beat(self) -> None:
        """Work was done: a run whose workers neither say so nor tell anything for long has stalled. As often as one likes."""
        ...

    def beating(self) -> AbstractContextManager[None]:
        """Beats while the block runs: one long call that cannot, of a library that reads, writes or prepares."""
        ...

    def from_rank_zero(self, value: T) -> T:
        """The first rank's value, on every rank; all call it together. Small, and no reference to an object of Ray's."""
        ...

    def barrier(self) -> None:
        """Returns when all ranks have called it; raises after EXCHANGE_LIMIT_S."""
        ...
