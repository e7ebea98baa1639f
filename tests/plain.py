"""Training processes without Ray: the worker function on a context that only knows torch.distributed."""

import contextlib
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any, TypeVar

import torch.distributed

from raytrl.config.load import load_run
from raytrl.config.runs.supervised import SupervisedRun
from raytrl.plan.checks.supervised import prepare_supervised
from raytrl.records.progress import Progress
from raytrl.roles.job import Job
from raytrl.rundir import RunDirectory

T = TypeVar("T")


class CutOffError(Exception):
    """Stands for a death right after a checkpoint was committed."""


class PlainContext:
    """A `WorkerContext` of one machine; checkpoints are folders named by their step."""

    def __init__(self, folder: Path, rank: int = 0, world_size: int = 1, die_after: int | None = None) -> None:
        self.rank = self.local_rank = rank
        self.world_size = world_size
        self.scratch = str(folder / "scratch")
        self.events: list[Progress] = []
        self.beats = 0
        self._checkpoints = folder / "plain-checkpoints"
        self._die_after = die_after
        os.makedirs(self.scratch, exist_ok=True)

    @contextlib.contextmanager
    def restored(self) -> Iterator[str | None]:
        steps = sorted(int(p.name) for p in self._checkpoints.glob("*"))
        yield str(self._checkpoints / str(steps[-1])) if steps else None

    def commit(self, step: int, folder: str | None) -> None:
        if folder is not None:
            shutil.copytree(folder, self._checkpoints / str(step))
        self.barrier()
        if step == self._die_after:
            raise CutOffError

    def progress(self, event: Progress) -> None:
        self.events.append(event)

    def beat(self) -> None:
        self.beats += 1

    @contextlib.contextmanager
    def beating(self) -> Iterator[None]:
        yield
        self.beats += 1

    def from_rank_zero(self, value: T) -> T:
        found: list[Any] = [value]
        if self.world_size > 1:
            torch.distributed.broadcast_object_list(found)
        return found[0]  # type: ignore[no-any-return]

    def barrier(self) -> None:
        if self.world_size > 1:
            torch.distributed.barrier()

    @property
    def losses(self) -> list[float]:
        return [event.metrics["loss"] for event in self.events if event.kind == "step"]


def job_of(file: str, *overrides: str) -> Job[SupervisedRun]:
    """What the driver would hand to its workers, after the driver's own checks."""
    run = load_run(file, list(overrides)).run
    assert isinstance(run, SupervisedRun)
    run_dir = RunDirectory(run.output_dir, run.name)
    prepare_supervised(run, run_dir)
    return Job(run, "a test", {})


def train_alone(file: str, *overrides: str, die_after: int | None = None) -> tuple[PlainContext, Path]:
    """One worker in this process; returns its context and the run directory."""
    from raytrl.roles.supervised.trainer import train

    job = job_of(file, *overrides)
    folder = Path(RunDirectory(job.run.output_dir, job.run.name).path)
    context = PlainContext(folder, die_after=die_after)
    with contextlib.suppress(CutOffError):
        train(job, context)
    return context, folder


def join_group(rank: int, world_size: int, port: int) -> None:
    """What Ray Train does before a worker function: environment and process group."""
    os.environ.update(
        RANK=str(rank),
        LOCAL_RANK=str(rank),
        WORLD_SIZE=str(world_size),
        LOCAL_WORLD_SIZE=str(world_size),
        MASTER_ADDR="127.0.0.1",
        MASTER_PORT=str(port),
    )
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", rank=rank, world_size=world_size)


def forget_engines() -> None:
    """Lets the next training in this process start as if it were the first."""
    from accelerate.state import AcceleratorState, GradientState
    from transformers.integrations.deepspeed import unset_hf_deepspeed_config

    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()
    unset_hf_deepspeed_config()


def spawn(function: Any, *arguments: Any, processes: int = 2) -> None:
    """Runs `function(rank, *arguments)` in fresh processes; an exception in one fails the test."""
    torch.multiprocessing.spawn(function, arguments, nprocs=processes, join=True)
