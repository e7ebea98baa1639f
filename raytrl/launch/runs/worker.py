"""The Ray Train side of a training process: its context, its checkpoints, its failures."""

import contextlib
import json
import logging
import os
import posixpath
import shutil
import sys
import threading
import time
import traceback
import warnings
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any, TypeVar

import ray
import ray.train
import ray.train.collective

from raytrl.errors import ConfigError, NonFiniteError, RaytrlError, RewardError, RunError, WorkerError
from raytrl.launch.runs.checkpoints import start_of
from raytrl.launch.session.logs import LOG, set_version, start_log
from raytrl.launch.session.session import QUIET_LIBRARIES, work_in
from raytrl.records.progress import Progress
from raytrl.roles.context import EXCHANGE_LIMIT_S
from raytrl.rundir import RunDirectory, is_disk_full

# A peer's death seen from another rank: most likely a consequence, so the message for the user only where no other is.
_PEER_DEATH = (
    *("connection closed by peer", "connection reset", "nccl", "gloo", "broken pipe", "timed out waiting"),
    "backend not set",  # DeepSpeed's, when Ray Train has ended the group under it
)
T = TypeVar("T")
_BOARD_LIMIT_S = 30
_BEAT_S = 5.0
# A restart from the last checkpoint would come to the same end.
_SAME_AGAIN = (ConfigError, NonFiniteError, RewardError)
# Workers outlive a killed driver by seconds and may commit checkpoints in them. So a checkpoint holds the latest
# progress: the driver that continues from it writes down what the dead one no longer could.
_PROGRESS, _KEPT = "progress.json", 256


class Heart:
    """Tells of work that goes on, and not too often."""

    def __init__(self, post: Callable[[Progress], object], every_s: float) -> None:
        self._post, self._every_s, self._due = post, every_s, 0.0

    def beat(self) -> None:
        if time.monotonic() >= self._due:
            self._due = time.monotonic() + self._every_s
            self._post(Progress("beat"))

    @contextlib.contextmanager
    def beating(self) -> Iterator[None]:
        """Beats while the block runs, and no longer than EXCHANGE_LIMIT_S."""
        done = threading.Event()

        def beat_on() -> None:
            for _ in range(int(EXCHANGE_LIMIT_S / self._every_s)):
                if done.wait(self._every_s):
                    return
                self.beat()

        thread = threading.Thread(target=beat_on, name="heart", daemon=True)
        thread.start()
        try:
            yield
        finally:
            done.set()
            thread.join()


class RayWorkerContext:
    """`roles.context.WorkerContext` on Ray Train."""

    def __init__(
        self, board: Any, scratch: str, run_dir: RunDirectory, tensorboard: str, beat_s: float, start: str
    ) -> None:
        """
        Args:
            tensorboard: where event files are written on this node.
            beat_s: the driver is told of work that goes on so often.
            start: of `start_of`, the run's start that this worker belongs to.
        """
        context = ray.train.get_context()
        self.rank: int = context.get_world_rank()
        self.local_rank: int = context.get_local_rank()
        self.world_size: int = context.get_world_size()
        self.scratch = f"{scratch}/node-{context.get_node_rank()}"  # nodes may share the run's disk
        self.board, self._run_dir, self._tensorboard = board, run_dir, tensorboard
        self._latest: deque[Progress] = deque(maxlen=_KEPT)
        self._heart, self._start = Heart(board.post.remote, beat_s), start
        if self.local_rank == 0:
            shutil.rmtree(self.scratch, ignore_errors=True)  # of a killed attempt
            os.makedirs(self.scratch)
        self.barrier()

    @contextlib.contextmanager
    def restored(self) -> Iterator[str | None]:
        checkpoint = ray.train.get_checkpoint()
        if checkpoint is None:
            yield None
            return
        with checkpoint.as_directory() as folder:
            if self.rank == 0:
                for values in json.loads(Path(folder, _PROGRESS).read_text()):
                    self._latest.append(Progress(**values))
                    self.board.post.remote(replace(self._latest[-1], kind="earlier"))
            yield folder

    def commit(self, step: int, folder: str | None) -> None:
        if self.rank == 0 and folder is not None:
            Path(folder, _PROGRESS).write_text(json.dumps([asdict(event) for event in self._latest]))
        self.store_curves()
        set_version(step)
        LOG.info("hands in the checkpoint of step %d", step)

        def move(checkpoint: Any, name: str) -> Any:
            self._refuse_later_start()
            with self.beating():
                moved = _move(checkpoint, name)
            self._refuse_later_start()  # nothing of ours comes on record any more
            return moved

        ray.train.report(
            {"step": step, "world_size": self.world_size},
            checkpoint=ray.train.Checkpoint.from_directory(folder) if folder else None,
            checkpoint_upload_fn=move if folder else None,
            delete_local_checkpoint_after_upload=True,
        )

    def _refuse_later_start(self) -> None:
        """A driver that is killed takes its workers with it, but not at once, and through `ray://` after half a minute: by then
        the run may have been started again."""
        if self.rank == 0 and start_of(self._run_dir) != self._start:
            raise RunError(
                f"{self._run_dir}: the run was started again meanwhile; this start of it stores nothing more"
            )

    def store_curves(self) -> None:
        """Event files are appended to, which an object store cannot: they are put there with each checkpoint, and at the end."""
        if self.rank == 0 and not self._run_dir.is_local and os.path.isdir(self._tensorboard):
            with self.beating():
                self._run_dir.mirror(self._tensorboard, "tensorboard")

    def new_attempt(self) -> int:
        """The number of this life of the learner group; on rank 0."""
        return int(ray.get(self.board.new_attempt.remote(), timeout=_BOARD_LIMIT_S))

    def progress(self, event: Progress) -> None:
        if event.kind in ("step", "eval"):
            self._latest.append(event)
        if event.kind in ("start", "step"):
            set_version(event.step)
        shown = " ".join(f"{key} {value:.4g}" for key, value in event.metrics.items())
        LOG.info("%s", " ".join(filter(None, (event.kind, event.text or f"{event.step}/{event.total_steps}", shown))))
        self.board.post.remote(event)

    def from_rank_zero(self, value: T) -> T:
        found: T = ray.train.collective.broadcast_from_rank_zero(value)
        return found

    def beat(self) -> None:
        self._heart.beat()

    def beating(self) -> contextlib.AbstractContextManager[None]:
        return self._heart.beating()

    def barrier(self) -> None:
        ray.train.collective.barrier()


def _move(checkpoint: Any, name: str) -> Any:
    """Stores a checkpoint with each byte written once: files are moved where scratch and storage share a disk."""
    storage = ray.train.get_context().get_storage()
    target = storage.build_checkpoint_path_from_name(name)
    if type(storage.storage_filesystem).__name__ != "LocalFileSystem":
        return storage.persist_current_checkpoint(checkpoint, name)
    for folder, _, files in os.walk(checkpoint.path):
        place = posixpath.join(target, os.path.relpath(folder, checkpoint.path))
        os.makedirs(place, exist_ok=True)  # several nodes put their files into one checkpoint
        for file in files:
            shutil.move(os.path.join(folder, file), os.path.join(place, file))
    return ray.train.Checkpoint(path=target, filesystem=storage.storage_filesystem)


def supervised_worker(config: dict[str, Any]) -> dict[str, float]:
    """The train function that Ray Train runs in each worker of a supervised run."""

    def work(context: RayWorkerContext) -> dict[str, float]:
        with context.beating():
            from raytrl.roles.supervised.trainer import train

        return train(config["job"], context)

    return as_worker(config, work)


def as_worker(config: dict[str, Any], work: Callable[[RayWorkerContext], dict[str, float]]) -> dict[str, float]:
    """Prepares a Ray Train worker process, does its work, and tells the driver what it failed of."""
    work_in(config["cwd"])
    for name, value in QUIET_LIBRARIES.items():  # a cluster's nodes do not have the driver's environment
        os.environ.setdefault(name, value)
    # A virtual environment's bin holds ninja, which DeepSpeed's compiler calls by name.
    os.environ["PATH"] = os.pathsep.join([os.path.dirname(sys.executable), os.environ.get("PATH", "")])
    os.environ.setdefault("TENSORBOARD_LOGGING_DIR", config["tensorboard"])
    _quiet()
    run = config["job"].run
    run_dir = RunDirectory(run.output_dir, run.name)
    beat_s = min(_BEAT_S, run.learner.stall_timeout_s / 4)
    places = (config["scratch"], run_dir, config["tensorboard"])
    context = RayWorkerContext(config["board"], *places, beat_s, config["start"])
    start_log(run_dir, "learner", context.rank)
    try:
        outcome = work(context)
        context.store_curves()
        return outcome
    except Exception as error:
        node = ray.util.get_node_ip_address()
        cause = str(error) if isinstance(error, RaytrlError) else f"{type(error).__name__}: {error}"
        text = f"worker {context.rank} on node {node}: {cause}"
        LOG.exception("failed: %s", cause)
        same_again = isinstance(error, _SAME_AGAIN) or is_disk_full(error)
        failure = Progress(
            "failure", text=text, details=traceback.format_exc(), final=same_again, follows=_follows(error)
        )
        try:
            ray.get(config["board"].post.remote(failure), timeout=_BOARD_LIMIT_S)  # before this process may be ended
        except ray.exceptions.RayActorError:
            LOG.error("nobody is told of it: the driver has ended")
        raise WorkerError(text) from None


def _follows(error: Exception) -> bool:
    """Whether it is most likely another worker's death; what raytrl says of itself is not, whatever words are in it."""
    return not isinstance(error, RaytrlError) and any(word in str(error).lower() for word in _PEER_DEATH)


def _quiet() -> None:
    warnings.filterwarnings("ignore", category=FutureWarning)
    warnings.filterwarnings("ignore", category=UserWarning, module="torch|transformers|accelerate|deepspeed|peft")
    logging.getLogger("DeepSpeed").setLevel(logging.ERROR)
