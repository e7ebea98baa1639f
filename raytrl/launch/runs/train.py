"""Ray Train, with as much of it as a run uses."""

import os
import tempfile
from typing import Any

from ray.data._internal.cluster_autoscaler.default_autoscaling_coordinator import get_or_create_autoscaling_coordinator
from ray.train import CheckpointConfig, FailureConfig, RunConfig, ScalingConfig
from ray.train.torch import TorchConfig, TorchTrainer
from ray.train.v2._internal.callbacks.datasets import DatasetsCallback
from ray.train.v2._internal.callbacks.placement_group_callback import PlacementGroupCleanerCallback

from raytrl.config.runs.base import TrainingRun
from raytrl.launch.runs.checkpoints import start_of
from raytrl.roles.context import EXCHANGE_LIMIT_S
from raytrl.rundir import RunDirectory

_RESIZE_CHECK_S = 20.0  # an elastic run looks this often for a node that could take another worker


class _Trainer(TorchTrainer):  # type: ignore[misc]  # Ray Train is untyped
    """Without two actors that nobody would ask for anything: each costs a start as much as importing Ray Data does."""

    def __init__(self, *args: Any, alone: bool, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._alone = alone

    def _create_default_callbacks(self) -> list[Any]:
        unused: tuple[type, ...] = (DatasetsCallback,)  # rows are read by `data`, not by Ray Data
        if self._alone:  # it frees a dead controller's place, for others
            unused += (PlacementGroupCleanerCallback,)
        return [callback for callback in super()._create_default_callbacks() if not isinstance(callback, unused)]


def start_coordinator() -> None:
    """Starts the actor that Train's controller asks first, and does not wait: the controller takes as long to start."""
    get_or_create_autoscaling_coordinator()


def make_trainer(
    run: TrainingRun, run_dir: RunDirectory, board: Any, worker: Any, config: dict[str, Any], *, alone: bool
) -> Any:
    """What runs `worker` in each of the run's workers.

    Args:
        config: what `worker` is given, beside what all kinds of run give theirs.
        alone: Ray runs nothing else, and ends with the run.
    """
    local = run_dir.path if run_dir.is_local else os.path.join(tempfile.gettempdir(), run_dir.own_name)
    return _Trainer(
        worker,
        alone=alone,
        train_loop_config={
            "board": board,
            "cwd": os.getcwd(),
            "start": start_of(run_dir),
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
