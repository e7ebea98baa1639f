"""What a training process may ask of whoever started it (Ray Train in a run, a plain object in a test)."""

from contextlib import AbstractContextManager
from typing import Protocol

from raytrl.records.progress import Progress


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

    def barrier(self) -> None:
        """Returns when all ranks have called it."""
        ...
