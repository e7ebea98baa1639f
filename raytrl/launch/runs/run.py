"""A training run on Ray Train, of whatever kind: checks, starts, watches, finishes."""

import os
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any, Protocol

from raytrl.config.load import LoadedRun
from raytrl.config.runs.base import TrainingRun
from raytrl.config.runs.ppo import PpoRun
from raytrl.config.runs.supervised import SupervisedRun
from raytrl.errors import RaytrlError
from raytrl.launch.runs.resume import Standing, inspect_run, sweep
from raytrl.launch.session.session import check_output_dir, cluster_of, prepare_environment, ray_session
from raytrl.plan.capacity import Room
from raytrl.plan.cluster import Need
from raytrl.plan.need import need_of
from raytrl.records.progress import Progress
from raytrl.rundir import RunDirectory, now
from raytrl.versions import versions

_RESIZE_CHECK_S = 20.0  # an elastic run looks this often for a node that could take another worker
Worker = Callable[[dict[str, Any]], dict[str, float]]


class Kind(Protocol):
    """What differs between the kinds of run."""

    reward_shared: bool  # whether its reward actors are a sweep's

    def check(self, run_dir: RunDirectory) -> str:
        """Everything that can be checked before Ray starts; returns what will run where, for people.

        A tokenizer that the run trains for itself is read from, or put into, this directory.

        Raises:
            ConfigError: the request cannot be run.
        """
        ...

    def running(self, command: str, versions: dict[str, str]) -> AbstractContextManager[tuple[Worker, dict[str, Any]]]:
        """Ray runs: starts what belongs to the driver; gives Ray Train's function and its config."""
        ...


def kind_of(run: TrainingRun) -> Kind:
    """The kind's own part of a run."""
    if isinstance(run, PpoRun):
        from raytrl.launch.runs.ppo import PpoKind

        return PpoKind(run)
    from raytrl.launch.runs.supervised import SupervisedKind

    assert isinstance(run, SupervisedRun)
    return SupervisedKind(run)


def train(
    loaded: LoadedRun,
    command: str,
    fresh: bool,
    show: Callable[[Progress], None],
    kind: Kind | None = None,
    *,
    memory_checked: bool = False,
) -> dict[str, Any]:
    """Runs SFT, reward modelling, DPO or PPO to its end, from wherever the run stands.

    Args:
        loaded: the checked run file.
        command: what the user typed, for the manifest and the model card.
        fresh: throw away what the run directory holds.
        show: called in this thread with each piece of progress.
        kind: the run's kind where it shares something with other runs; default: made for this run alone.
        memory_checked: by a sweep, for all its trials together; it takes seconds to import what counts parameters.

    Returns:
        The manifest's final values: model path, steps, metrics, seconds by phase of the start.

    Raises:
        ConfigError: the request cannot be run; nothing was started.
        RunError: it was started and failed.
    """
    run = loaded.run
    assert isinstance(run, TrainingRun)
    prepare_environment()
    check_output_dir(run)
    started = time.time()
    run_dir = RunDirectory(run.output_dir, run.name)
    kind = kind or kind_of(run)
    need = need_of(run, reward_shared=kind.reward_shared)
    with run_dir.locked():
        standing = Standing("fresh") if fresh else inspect_run(run, run_dir)
        if standing.state == "done":
            return run_dir.manifest() | {"already_done": True}
        for notice in standing.notices:
            show(Progress("notice", text=notice))
        with cluster_of(run) as cluster:
            room = Room.on(cluster, need)
            with (
                tempfile.TemporaryDirectory() as staging
            ):  # nothing of an earlier run is touched before all checks passed
                staged = run_dir if standing.state == "continue" else RunDirectory(staging, run.name)
                plan = kind.check(staged)
                memory, notes = ("", []) if memory_checked else room.memory(run)
                plan += memory
                for note in notes:
                    show(Progress("notice", text=note))
                if staged is not run_dir:
                    run_dir.clear()
                    if staged.exists("tokenizer"):
                        run_dir.store(staged.at("tokenizer"), "tokenizer")
            if standing.checkpoint is not None:
                plan += f"\nresume   from step {standing.checkpoint.step}"
            plan += f"\noutput   {run_dir}\nlogs     {log_place(run_dir)}"
            clock = {"checks_s": time.time() - started}
            show(Progress("plan", text=plan))
            write_start(loaded, run_dir, command)
            with failure_noted(run_dir):
                metrics = _run_on_ray(run, kind, need, run_dir, command, clock, show)
        run_dir.update_manifest(state="done", finished=now(), model=f"{run_dir}/model", metrics=metrics, startup=clock)
        sweep(run_dir)
        return run_dir.manifest()


def log_place(run_dir: RunDirectory) -> str:
    """Where the processes' log files are, in words; `logs.log_path` says it for each."""
    if run_dir.is_local:
        return f"{run_dir}/logs"
    return f"raytrl-{os.path.basename(run_dir.path)}-* in Ray's log folder of each node (object stores cannot append)"


@contextmanager
def failure_noted(run_dir: RunDirectory) -> Iterator[None]:
    """An error of the block goes into the manifest on its way."""
    try:
        yield
    except RaytrlError as error:
        run_dir.update_manifest(state="failed", error=str(error))
        raise


def write_start(loaded: LoadedRun, run_dir: RunDirectory, command: str) -> None:
    """Writes config.yaml and the manifest of a run that starts, or starts again."""
    run_dir.write("config.yaml", loaded.as_yaml())
    earlier = run_dir.manifest()
    run_dir.update_manifest(
        state="running",
        kind=loaded.run.kind,
        command=command,
        seed=loaded.run.seed,
        versions=versions(),
        origins={key: origin for key, _, origin in loaded.values() if origin != "default"},
        started=earlier.get("started", now()),
        starts=earlier.get("starts", 0) + 1,
    )


def _run_on_ray(
    run: TrainingRun,
    kind: Kind,
    need: Need,
    run_dir: RunDirectory,
    command: str,
    clock: dict[str, float],
    show: Callable[[Progress], None],
) -> dict[str, float]:
    os.environ["RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S"] = str(run.learner.start_timeout_s)
    os.environ["RAY_TRAIN_COLLECTIVE_TIMEOUT_S"] = str(run.learner.stall_timeout_s)
    show(Progress("phase", text="starting Ray"))
    # The driver needs Ray Train's torch backend, whose import takes as long as Ray's own start: do both at once.
    importer = threading.Thread(target=_import_train, daemon=True)
    importer.start()
    mark = time.time()
    with ray_session(run, need):
        importer.join()
        clock["ray_s"] = time.time() - mark
        from raytrl.launch.runs.watch import Watch, start_board
        from raytrl.launch.session.storage import check_storage

        check_storage(run_dir)
        board = start_board(run)
        show(Progress("phase", text="starting workers"))
        with kind.running(command, versions()) as (worker, config):
            trainer = _trainer(run, run_dir, board, worker, config)
            return Watch(run, run_dir, board, clock, show).until_done(trainer)


def _import_train() -> None:
    import ray.train.torch  # noqa: F401


def _trainer(run: TrainingRun, run_dir: RunDirectory, board: Any, worker: Worker, config: dict[str, Any]) -> Any:
    from ray.train import CheckpointConfig, FailureConfig, RunConfig, ScalingConfig
    from ray.train.torch import TorchConfig, TorchTrainer

    local = run_dir.path if run_dir.is_local else os.path.join(tempfile.gettempdir(), f"raytrl-{run.name}")
    return TorchTrainer(
        worker,
        train_loop_config={
            "board": board,
            "cwd": os.getcwd(),
            "scratch": os.path.join(local, ".scratch"),
            "tensorboard": os.path.join(local, "tensorboard"),
            **config,
        },
        torch_config=TorchConfig(timeout_s=int(run.learner.stall_timeout_s)),
        scaling_config=ScalingConfig(
            num_workers=run.learner.workers,
            use_gpu=run.learner.uses_gpu,
            resources_per_worker=run.learner.resources,
            placement_strategy=run.learner.placement.upper(),
            label_selector=run.learner.labels or None,
            elastic_resize_monitor_interval_s=_RESIZE_CHECK_S,
        ),
        run_config=RunConfig(
            name="checkpoints",
            storage_path=run_dir.uri,
            failure_config=FailureConfig(max_failures=run.learner.max_failures, controller_failure_limit=2),
            checkpoint_config=CheckpointConfig(num_to_keep=run.checkpoint.keep),
        ),
    )
