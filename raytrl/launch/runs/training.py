"""What every run has that trains a network: Ray Train around its workers, and a model in the end."""

import math
import os
import tempfile
import threading
import time
from abc import abstractmethod
from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any, TypeVar

from raytrl.config.runs.base import TrainingRun
from raytrl.launch.runs.run import Kind, Start
from raytrl.launch.session.session import ray_session
from raytrl.records.outcome import Trained
from raytrl.records.progress import Progress
from raytrl.roles.context import EXCHANGE_LIMIT_S
from raytrl.rundir import RunDirectory

_RESIZE_CHECK_S = 20.0  # an elastic run looks this often for a node that could take another worker
T = TypeVar("T", bound=TrainingRun)
Worker = Callable[[dict[str, Any]], dict[str, float]]


class TrainingKind(Kind[T, Trained]):
    """`run.Kind` of what Ray Train runs."""

    @abstractmethod
    def running(self, command: str) -> AbstractContextManager[tuple[Worker, dict[str, Any]]]:
        """Ray runs: starts what belongs to the driver; gives Ray Train's function and its config."""

    def work(self, start: Start) -> dict[str, Any]:
        run, run_dir = self.run, start.run_dir
        os.environ["RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S"] = str(run.learner.start_timeout_s)
        os.environ["RAY_TRAIN_COLLECTIVE_TIMEOUT_S"] = str(EXCHANGE_LIMIT_S)
        start.show(Progress("phase", text="starting Ray"))
        # The driver needs Ray Train's torch backend, whose import takes as long as Ray's own start: do both at once.
        importer = threading.Thread(target=_import_train, daemon=True)
        importer.start()
        mark = time.time()
        with ray_session(run, start.need):
            importer.join()
            start.clock["ray_s"] = time.time() - mark
            from raytrl.launch.runs.watch import Watch, start_board
            from raytrl.launch.session.storage import check_storage

            check_storage(run_dir)
            board = start_board(run)
            start.show(Progress("phase", text="starting workers"))
            with self.running(start.command) as (worker, config):
                trainer = _trainer(run, run_dir, board, worker, config)
                metrics = Watch(run, run_dir, board, start.clock, start.show).until_done(trainer)
        return {"model": f"{run_dir}/model", "metrics": metrics, "startup": start.clock}

    def outcome(self, run_dir: RunDirectory, already_done: bool) -> Trained:
        manifest = run_dir.manifest()
        metrics = {key: math.nan if value is None else value for key, value in manifest["metrics"].items()}
        return Trained(str(run_dir), already_done, manifest["model"], metrics)


def _import_train() -> None:
    import ray.train.torch  # noqa: F401


def _trainer(run: TrainingRun, run_dir: RunDirectory, board: Any, worker: Worker, config: dict[str, Any]) -> Any:
    from ray.train import CheckpointConfig, FailureConfig, RunConfig, ScalingConfig
    from ray.train.torch import TorchConfig, TorchTrainer

    local = run_dir.path if run_dir.is_local else os.path.join(tempfile.gettempdir(), run_dir.own_name)
    return TorchTrainer(
        worker,
        train_loop_config={
            "board": board,
            "cwd": os.getcwd(),
            "scratch": os.path.join(local, ".scratch"),
            "tensorboard": os.path.join(local, "tensorboard"),
            **config,
        },
        torch_config=TorchConfig(timeout_s=EXCHANGE_LIMIT_S),
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
