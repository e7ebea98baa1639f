"""What every run has that trains a network: Ray Train around its workers, and a model in the end."""

import math
import os
import threading
import time
from abc import abstractmethod
from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any, TypeVar

from raytrl.config.runs.base import TrainingRun
from raytrl.launch.runs.checkpoints import settle
from raytrl.launch.runs.run import Kind, Start
from raytrl.records.outcome import Trained
from raytrl.records.progress import Progress
from raytrl.roles.context import EXCHANGE_LIMIT_S
from raytrl.rundir import RunDirectory

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
        # No daemon: a process that ends while torch is imported crashes.
        importer = threading.Thread(target=_import_train)
        importer.start()
        mark = time.time()
        with start.ray.running(start.need):
            importer.join()
            start.clock["ray_s"] = time.time() - mark
            from raytrl.launch.runs.train import make_trainer, start_coordinator
            from raytrl.launch.runs.watch import Watch, start_board
            from raytrl.launch.session.storage import check_storage

            start_coordinator()
            check_storage(run_dir)
            # Not before: a start that was killed a moment ago put checkpoints on record until the manifest named this one.
            if start.is_fresh:
                run_dir.delete("checkpoints")
            for notice in settle(run_dir):
                start.show(Progress("notice", text=notice))
            board = start_board(run)
            start.show(Progress("phase", text="starting workers"))
            with self.running(start.command) as (worker, config):
                trainer = make_trainer(
                    run, run_dir, board, worker, config, alone=start.ray.is_own and self.lent is None
                )
                metrics = Watch(run, run_dir, board, start.clock, start.show).until_done(trainer)
        return {"model": f"{run_dir}/model", "metrics": metrics, "startup": start.clock}

    def outcome(self, run_dir: RunDirectory, already_done: bool) -> Trained:
        manifest = run_dir.manifest()
        metrics = {key: math.nan if value is None else value for key, value in manifest["metrics"].items()}
        return Trained(str(run_dir), already_done, manifest["model"], metrics)


def _import_train() -> None:
    import raytrl.launch.runs.train  # noqa: F401
