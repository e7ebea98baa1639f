"""The driver's side of a running fit(): shows progress, keeps metrics.jsonl, notices failures and standstill."""

import contextlib
import sys
import threading
import time
from collections.abc import Callable
from typing import Any, assert_never

import ray
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from raytrl.config.runs.base import TrainingRun
from raytrl.errors import RunError, StalledError, WorkerError
from raytrl.launch.actors.shelf import Shelf
from raytrl.launch.runs.checkpoints import RecordCopy
from raytrl.launch.session.gauges import step_gauges
from raytrl.records.progress import Progress
from raytrl.rundir import MetricsLog, RunDirectory, StepLog, now

_POLL_S = 0.2
_END_S = 10.0  # for a thread to hear that what it waits for is gone


class Board(Shelf):
    """An actor that holds what workers have told until the driver fetches it, and shows it in Ray's metrics.

    The driver could not show it: one that has joined through `ray://` is no process of the cluster.
    """

    def __init__(self, run: TrainingRun) -> None:
        super().__init__()
        self._events: list[Progress] = []
        self._forgotten = 0  # events that the driver has
        self._attempt = 0
        self._gauges = step_gauges(run)

    def post(self, event: Progress) -> None:
        self._events.append(event)
        self._gauges.take(event)

    def new_attempt(self) -> int:
        """A number above all that came before, also of an earlier start: learners move between nodes, whose clocks differ."""
        self._attempt = max(self._attempt + 1, time.time_ns())
        return self._attempt

    def after(self, taken: int) -> list[Progress]:
        """All events but the first `taken`, which the driver has: an answer that came too late is given again."""
        del self._events[: taken - self._forgotten]
        self._forgotten = taken
        return list(self._events)


def start_board(run: TrainingRun) -> Any:
    """The board's actor: on the driver's own node, so that no other node's death silences the run; it ends with the driver."""
    here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
    return ray.remote(num_cpus=0)(Board).options(scheduling_strategy=here).remote(run)


class Watch:
    """Runs one `TorchTrainer.fit()` in a thread and answers for it in this one."""

    def __init__(
        self,
        run: TrainingRun,
        run_dir: RunDirectory,
        board: Any,
        clock: dict[str, float],
        show: Callable[[Progress], None],
    ) -> None:
        self._run, self._run_dir, self._board, self._show = run, run_dir, board, show
        self._clock = clock
        self._log = MetricsLog(run_dir)
        self._samples = StepLog(run_dir, "samples.jsonl")
        self._record = RecordCopy(run_dir)
        self._began = time.time()
        self._last_event = time.monotonic()
        self._last: Progress | None = None
        self._attempts = 0
        self._workers = 0  # of the attempt that runs
        self._stepped = False
        self._failure: Progress | None = None
        self._consequence: Progress | None = None  # a failure that most likely follows from another
        self._taken = 0  # events of the board

    def until_done(self, trainer: Any) -> dict[str, float]:
        outcome: dict[str, Any] = {}

        def fit() -> None:
            try:
                outcome["result"] = trainer.fit()
            except BaseException as error:  # handed to the main thread below
                outcome["error"] = error

        thread = threading.Thread(target=fit, name="ray-train-fit", daemon=True)
        thread.start()
        try:
            while thread.is_alive():
                thread.join(_POLL_S)
                self._take()
                self._check_stall()
        except BaseException:
            _end(thread)
            raise
        self._take()
        self._log.flush()
        self._samples.flush()
        if "error" in outcome:
            raise self._readable(outcome["error"])
        value = outcome["result"].return_value
        return dict(value) if isinstance(value, dict) else {}

    def _take(self) -> None:
        try:
            events = ray.get(self._board.after.remote(self._taken), timeout=30)
        except ray.exceptions.GetTimeoutError:
            return  # a busy machine; the next round asks again, and `_check_stall` bounds how often
        except (ray.exceptions.RayError, ConnectionError) as error:
            raise RunError(
                f"the driver's progress board is gone: {_first_line(error)}; start again to continue"
            ) from None
        self._record.keep()
        self._taken += len(events)
        for event in events:
            self._last_event = time.monotonic()
            if event.kind != "beat":
                self._last = event
            self._handle(event)

    def _handle(self, event: Progress) -> None:
        match event.kind:
            case "beat":
                return
            case "earlier":
                self._catch_up(event)
                return
            case "start":
                self._note_start(event)
            case "step" | "eval":
                self._note_step(event)
            case "checkpoint":
                if not self._run_dir.is_local:
                    self._log.flush()
                    self._samples.flush()
            case "failure":
                self._note_failure(event)
                if event.follows:
                    return
            case "plan" | "phase" | "notice":
                pass  # only shown
            case _:
                assert_never(event.kind)
        self._show(event)

    def _note_start(self, event: Progress) -> None:
        """A group of workers begins, at the step of the checkpoint that it loaded."""
        if self._attempts == 0:
            self._clock["workers_s"] = time.time() - self._began
        self._attempts += 1
        self._failure = self._consequence = None
        self._note_workers(event)
        self._log.rewind(event.step)
        self._samples.rewind(event.step)

    def _note_step(self, event: Progress) -> None:
        if not self._stepped:
            self._stepped = True
            self._clock["first_step_s"] = time.time() - self._began
        self._log.append({"step": event.step, **event.metrics})
        self._samples.extend(event.samples)

    def _catch_up(self, event: Progress) -> None:
        """Writes down what a driver that died did not."""
        if event.step >= self._log.last_step:
            self._log.append({"step": event.step, **event.metrics})
        if event.step > self._samples.last_step:
            self._samples.extend(event.samples)

    def _note_workers(self, event: Progress) -> None:
        """An elastic run says when it goes on with more or fewer workers, and what that changes."""
        workers, before = int(event.metrics.get("workers", 0)), self._workers
        self._workers = workers
        if before in (0, workers):
            return
        text = (
            f"{workers} {'worker' if workers == 1 else 'workers'} instead of {before} from step {event.step} on: the rows "
            f"of each step stay the same, sums are taken in another order, so the result is equal to rounding only"
        )
        self._show(Progress("notice", text=text))

    def _note_failure(self, event: Progress) -> None:
        if event.follows:
            self._consequence = self._consequence or event
        else:
            self._failure = self._failure or event  # the first of an attempt; the others follow from it
        text = (self._run_dir.read("failures.log") or "") + f"{now()} {event.text}\n{event.details}\n"
        self._run_dir.write("failures.log", text)
        if event.final or (self._attempts == 0 and not event.follows):
            # Nothing was trained yet, or the step itself fails: a restart would fail the same way.
            raise self._worker_error(event)

    def _worker_error(self, event: Progress) -> RunError:
        return WorkerError(f"{event.text}; traceback: {self._run_dir}/failures.log")

    def _check_stall(self) -> None:
        limit, keys = self._run.learner.stall_timeout_s, "learner.stall_timeout_s"
        if self._last is None:  # to be placed and started has a limit of its own
            limit, keys = limit + self._run.learner.start_timeout_s, f"learner.start_timeout_s and {keys}"
        if time.monotonic() - self._last_event > limit:
            last = (
                f"{self._last.kind} {self._last.text or self._last.step}"
                if self._last
                else "none: no worker has started"
            )
            raise StalledError(
                f"the driver has waited {limit:g} s ({keys}) for the workers to do anything; last told: {last}"
            )

    def _readable(self, error: BaseException) -> BaseException:
        if isinstance(error, KeyboardInterrupt):
            return error
        if self._failure is not None:
            return self._worker_error(self._failure)
        causes = getattr(error, "worker_failures", None) or {}
        died = {rank: cause for rank, cause in causes.items() if hasattr(cause, "health_check_failure")}
        if not died and self._consequence is not None:
            return self._worker_error(self._consequence)
        if causes:
            rank, cause = next(iter((died or causes).items()))
            return WorkerError(f"worker {rank}: {_first_line(cause)}")
        cause = getattr(error, "controller_failure", error)
        return RunError(f"Ray Train: {_first_line(cause)}")


def _end(thread: threading.Thread) -> None:
    """Ends a fit() that nobody waits for: Ray must not be shut down under a thread that waits in it, whose process then
    crashes as it exits."""
    limit = time.monotonic() + _END_S
    while (controller := controller_of(thread)) is None and thread.is_alive() and time.monotonic() < limit:
        time.sleep(_POLL_S)  # it is being started
    if controller is not None:
        with contextlib.suppress(Exception):  # a Ray that is gone: what led here says so
            ray.kill(controller)  # its workers go with it, and the thread is told
            thread.join(_END_S)


def controller_of(thread: threading.Thread) -> Any:
    """Ray Train's controller, which only the frame of its fit() knows; None where there is none yet, or no more."""
    frame = sys._current_frames().get(thread.ident or 0)
    while frame is not None and frame.f_code.co_name != "_initialize_and_run_controller":
        frame = frame.f_back
    return None if frame is None else frame.f_locals.get("controller")


def _first_line(error: BaseException) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return f"{type(error).__name__}: {lines[0] if lines else ''}"
