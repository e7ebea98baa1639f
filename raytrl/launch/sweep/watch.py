"""The driver's side of a running sweep: starts Ray Tune, keeps the book of trials, shows them."""

import functools
import threading
import time
from collections.abc import Callable, Sequence
from typing import Any

from ray import tune
from ray.tune import Callback, Stopper

from raytrl.config.runs.sweep import TuneRun
from raytrl.errors import RunError
from raytrl.launch.sweep.book import TrialBook, folder_below
from raytrl.launch.sweep.leftovers import free_left_places
from raytrl.launch.sweep.room import Sweep
from raytrl.launch.sweep.search import TrialSearcher
from raytrl.launch.sweep.trial import run_trial, trial_resources
from raytrl.records.progress import Progress
from raytrl.records.sweep import Trial
from raytrl.rundir import RunDirectory

_LOST_PROCESSES = 2  # a trial's own process may die this often, with its node say; each time it goes on


class SweepWatch:
    """Runs one `Tuner.fit()` in a thread and answers for it in this one."""

    def __init__(
        self,
        sweep: Sweep,
        book: TrialBook,
        run_dir: RunDirectory,
        show: Callable[[Progress], None],
        show_trials: Callable[[Sequence[Trial]], None],
    ) -> None:
        self._run, self._chosen, self._book, self._run_dir = sweep.run, sweep.chosen, book, run_dir
        self._show, self._show_trials = show, show_trials
        self._poll_s = 1.0 if run_dir.is_local else 5.0

    def until_done(
        self, command: str, most: int, scheduler: Any, optuna: Any, reward_actors: Sequence[Any] | None
    ) -> None:
        """Returns when all trials have ended.

        Raises:
            RunError: too many failed, or Ray Tune itself did.
        """
        keeper = _Keeper(self._run, self._book, self._show)
        searcher = TrialSearcher(self._run, self._book, optuna, keeper.refused, self._chosen)
        tuner = tune.Tuner(
            tune.with_resources(
                tune.with_parameters(run_trial, sweep=self._run, command=command, reward_actors=reward_actors),
                functools.partial(trial_resources, shares_reward=reward_actors is not None),
            ),
            tune_config=tune.TuneConfig(
                search_alg=searcher,
                scheduler=scheduler,
                num_samples=self._run.num_trials,
                max_concurrent_trials=most,
                trial_name_creator=lambda trial: trial.config["loaded"].run.name,
                trial_dirname_creator=lambda trial: trial.config["loaded"].run.name,
            ),
            run_config=tune.RunConfig(
                name=str(time.time_ns()),
                storage_path=self._storage(),
                verbose=0,
                callbacks=[keeper],
                stop=keeper.stopper,
                failure_config=tune.FailureConfig(max_failures=_LOST_PROCESSES),
            ),
        )
        self._fit(tuner)
        if keeper.stopper.reason:
            raise RunError(keeper.stopper.reason)

    def _storage(self) -> str:
        """Where Ray Tune keeps what it needs while it runs."""
        return self._run_dir.at(".tune") if self._run_dir.is_local else folder_below(self._run, ".tune")

    def _fit(self, tuner: Any) -> None:
        outcome: list[BaseException] = []

        def fit() -> None:
            try:
                tuner.fit()
            except BaseException as error:  # handed to the main thread below
                outcome.append(error)

        thread = threading.Thread(target=fit, name="ray-tune-fit", daemon=True)
        thread.start()
        while thread.is_alive():
            thread.join(self._poll_s)
            free_left_places()
            for trial in self._book.all:
                if trial.state == "running":
                    self._book.look(trial.name)
            self._show_trials(self._book.all)
        if outcome:
            error = outcome[0]
            if isinstance(error, KeyboardInterrupt):
                raise error
            raise RunError(
                f"Ray Tune: {type(error).__name__}: {str(error).strip().splitlines()[0] if str(error) else ''}"
            )


class _EnoughFailures(Stopper):  # type: ignore[misc]
    """Ends the sweep when there is a reason to."""

    def __init__(self) -> None:
        self.reason = ""

    def __call__(self, trial_id: str, result: dict[str, Any]) -> bool:
        return False

    def stop_all(self) -> bool:
        return bool(self.reason)


class _Keeper(Callback):  # type: ignore[misc]
    """Writes into the book what Ray Tune does with the trials. Called in the thread of `Tuner.fit`."""

    def __init__(self, run: TuneRun, book: TrialBook, show: Callable[[Progress], None]) -> None:
        self._run, self._book, self._show = run, book, show
        self.stopper = _EnoughFailures()
        self._started: dict[str, float] = {}

    def __getstate__(self) -> dict[str, Any]:
        """Nothing: Ray Tune stores itself with its callbacks, but a sweep goes on from its book."""
        return {}

    def on_trial_start(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        name = _name(trial)
        self._started.setdefault(name, time.monotonic())
        self._book.change(name, state="running")

    def on_trial_complete(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        result = trial.last_result or {}
        if "end" in result:
            self._end(_name(trial), result["end"], result["cause"])
        elif self.stopper.reason:  # it was going well; the sweep as a whole is given up
            self._book.change(_name(trial), state="waiting")
        else:
            self._end(_name(trial), "stopped", f"by {self._run.scheduler.name} at step {result.get('step', 0)}")

    def on_trial_error(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        error = trial.get_pickled_error()
        text = (
            f"{type(error).__name__}: {str(error).strip().splitlines()[-1]}"
            if error is not None
            else "its process died"
        )
        self._end(_name(trial), "failed", text)

    def refused(self, trial: Trial) -> None:
        """A trial failed before it started."""
        self._show(Progress("failure", text=f"{trial.name}: {trial.cause}"))
        self._count_failures()

    def _end(self, name: str, state: str, cause: str) -> None:
        seconds = self._book[name].seconds + time.monotonic() - self._started.pop(name, time.monotonic())
        trial = self._book.end(name, state, cause, seconds)
        if state == "stopped":
            self._book.directory(name).update_manifest(state="stopped", error=cause)
        if trial.state == "failed":
            self._show(Progress("failure", text=f"{name}: {trial.cause}"))
            self._count_failures()

    def _count_failures(self) -> None:
        failed = [trial for trial in self._book.all if trial.state == "failed"]
        if len(failed) > self._run.max_failed:
            causes = "; ".join(f"{trial.name}: {trial.cause}" for trial in failed)
            self.stopper.reason = (
                f"{len(failed)} trials failed, more than max_failed {self._run.max_failed}: {causes}; the same command "
                f"tries them again and goes on with the others"
            )


def _name(trial: Any) -> str:
    return str(trial.config["loaded"].run.name)
