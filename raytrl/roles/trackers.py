"""Trackers other than TensorBoard: transformers' own callbacks, told of PPO's steps as of a trainer's."""

from collections.abc import Mapping, Sequence
from typing import Any

from transformers import PrinterCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.integrations import get_reporting_integration_callbacks


class Trackers:
    """Reports from one process. A restart of the learners begins a new run in the tracker, as with SFT."""

    def __init__(
        self, names: Sequence[str], values: Mapping[str, Any], run_name: str, folder: str, model: Any, steps: int
    ) -> None:
        """
        Args:
            names: as in `report_to`, by transformers' names.
            values: the run's settings, which trackers keep as parameters.
            folder: where a tracker may put files.
            model: the policy; trackers keep its config.
            steps: of the whole run.
        """
        self._callbacks = [
            callback() for callback in get_reporting_integration_callbacks(list(names)) if callback != PrinterCallback
        ]
        self._arguments = _Arguments(output_dir=folder, run_name=run_name, report_to=list(names), use_cpu=True)
        self._arguments.values = dict(values)
        self._state = TrainerState(max_steps=steps, is_world_process_zero=True, is_local_process_zero=True)
        self._model, self._control = model, TrainerControl()
        self._tell("on_train_begin")

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        """Metrics after `step` steps; transformers puts `train/` before their names."""
        self._state.global_step = step
        self._tell("on_log", logs=dict(metrics))

    def close(self) -> None:
        """The run is done."""
        self._tell("on_train_end")

    def _tell(self, event: str, **more: Any) -> None:
        for callback in self._callbacks:
            getattr(callback, event)(self._arguments, self._state, self._control, model=self._model, **more)


class _Arguments(TrainingArguments):  # type: ignore[misc]  # transformers' class is untyped
    """Trackers keep `to_dict()` as the run's parameters: those of the run file, not a trainer's defaults."""

    values: Mapping[str, Any] = {}

    def to_dict(self) -> dict[str, Any]:
        return dict(self.values)
