"""What a sweep takes from Ray Tune: distributions, searchers, schedulers; and how they go on after a cut."""

import importlib
import inspect
import logging
import math
from collections.abc import Callable, Mapping, Sequence
from types import SimpleNamespace
from typing import Any

from ray import tune
from ray.tune.schedulers import ASHAScheduler, FIFOScheduler, MedianStoppingRule
from ray.tune.search import Searcher
from ray.tune.search.variant_generator import generate_variants

from raytrl.config.load import LoadedRun
from raytrl.config.runs.sweep import Distribution, TuneRun
from raytrl.config.trials import trial_name, trial_run
from raytrl.errors import ConfigError
from raytrl.launch.sweep.book import TrialBook, over_limit, trials_folder
from raytrl.plan.fit import Chosen, with_chosen
from raytrl.records.sweep import Trial

_NO_END = 1_000_000_000  # asha: no rung is the last because of it


def _domain(distribution: Distribution) -> Any:
    if distribution.name == "choice":
        return tune.choice(list(distribution.arguments))
    if distribution.name == "grid":
        return tune.grid_search(list(distribution.arguments))
    return getattr(tune, distribution.name)(*distribution.arguments)


def known_points(run: TuneRun) -> list[dict[str, Any]]:
    """The values of all trials, where they do not depend on results: Ray's own random and grid variants.

    Raises:
        ConfigError: an argument that Ray refuses.
    """
    if run.algorithm.name != "random":
        return []
    import numpy

    try:
        space = {key: _domain(distribution) for key, distribution in run.search.items()}
    except ValueError as error:
        raise ConfigError(f"search: Ray Tune refuses: {error}") from None
    random_state = numpy.random.RandomState(run.seed)
    points: list[dict[str, Any]] = []
    while len(points) < run.num_trials:
        for _, spec in generate_variants({"config": space}, random_state=random_state):
            points.append({key: _plain(spec["config"][key]) for key in run.search})
    return points[: run.num_trials]


def _plain(value: Any) -> Any:
    """numpy's numbers as Python's, which YAML and JSON can hold."""
    return value.item() if hasattr(value, "item") else value


def make_scheduler(run: TuneRun) -> Any:
    """Ray's scheduler with the file's own arguments.

    Raises:
        ConfigError: an argument that it does not know, or refuses.
    """
    classes = {"none": FIFOScheduler, "asha": ASHAScheduler, "median": _Median}
    ours: dict[str, Any] = {}
    if run.scheduler.name != "none":
        ours = {"metric": run.metric, "mode": run.mode, "time_attr": "step"}
    if run.scheduler.name == "asha":
        # A trial at its last step has only its model to save: not the moment to stop it.
        ours |= {"max_t": _NO_END, "stop_last_trials": False}
    kind, given = classes[run.scheduler.name], run.scheduler.arguments
    known = inspect.signature(kind).parameters
    for key in given:
        if key not in known:
            names = ", ".join(name for name in known if name not in ("self", "metric", "mode", "time_attr"))
            raise ConfigError(f"scheduler.{key}: {run.scheduler.name} does not know it; it knows: {names}")
    try:
        return kind(**(ours | given))
    except (AssertionError, TypeError, ValueError) as error:
        raise ConfigError(f"scheduler: Ray Tune refuses {given}: {error}") from None


class _Median(MedianStoppingRule):  # type: ignore[misc]
    """Ray's rule reads the metric of a trial's last result, which a trial that failed at once does not have."""

    def on_trial_complete(self, tune_controller: Any, trial: Any, result: dict[str, Any]) -> None:
        if self._metric in result:
            super().on_trial_complete(tune_controller, trial, result)


def _is_number(value: float | None) -> bool:
    return value is not None and math.isfinite(value)


def replay(scheduler: Any, run: TuneRun, book: TrialBook) -> None:
    """Shows a new scheduler the trials that ended before the sweep was cut off, by Ray's interface of schedulers."""
    if run.scheduler.name == "none":
        return
    for trial in book.all:
        rows = [row for row in book.rows(trial.name) if _is_number(row.get(run.metric))] if trial.is_ended else []
        if not rows:
            continue
        stand_in = SimpleNamespace(trial_id=f"ended-{trial.name}")
        scheduler.on_trial_add(None, stand_in)
        for row in rows:
            scheduler.on_trial_result(None, stand_in, {"step": row["step"], run.metric: row[run.metric]})


def make_optuna(run: TuneRun) -> Any:
    """Optuna's suggestions, or None where the values are known beforehand.

    Raises:
        ConfigError: Optuna is not installed, or refuses its arguments or a distribution.
    """
    if run.algorithm.name != "optuna":
        return None
    try:
        optuna = importlib.import_module("optuna")
    except ImportError:
        raise ConfigError(
            "algorithm.name: optuna is not installed; expected: `pip install 'raytrl[tune]'`, or name: random"
        ) from None
    from ray.tune.search.optuna import OptunaSearch

    optuna.logging.set_verbosity(logging.ERROR)
    name = run.algorithm.sampler or "TPESampler"
    kind = getattr(optuna.samplers, name, None)
    if not (inspect.isclass(kind) and issubclass(kind, optuna.samplers.BaseSampler)):
        known = [n for n in dir(optuna.samplers) if n.endswith("Sampler") and n != "BaseSampler"]
        raise ConfigError(f"algorithm.sampler: found: {name!r}; expected: one of {', '.join(known)}")
    make: Any = kind
    try:
        sampler = make(seed=run.seed, **run.algorithm.sampler_arguments)
        space = OptunaSearch.convert_search_space({key: _domain(value) for key, value in run.search.items()})
    except (TypeError, ValueError) as error:
        raise ConfigError(f"algorithm: Optuna refuses: {error}") from None
    return OptunaSearch(space, metric=run.metric, mode=run.mode, sampler=sampler)


class TrialSearcher(Searcher):  # type: ignore[misc]
    """Hands trials to Ray Tune: those of the book that have not ended, then new ones; each is in the book first."""

    def __init__(
        self,
        run: TuneRun,
        book: TrialBook,
        optuna: Any,
        on_refused: Callable[[Trial], None],
        chosen: Chosen | None = None,
    ) -> None:
        """`chosen`: resources that nobody wrote, of every trial."""
        super().__init__(metric=run.metric, mode=run.mode)
        self._chosen = chosen or {}
        self._run, self._book, self._optuna, self._on_refused = run, book, optuna, on_refused
        self._names: dict[str, str] = {}  # Ray Tune's trial id → trial
        self._waiting = [trial.name for trial in book.all if not trial.is_ended]
        self._suggested: set[str] = set()  # trials that Optuna waits to hear of
        for trial in book.all if optuna is not None else ():
            if trial.is_ended:
                self._tell(trial, self._value(trial) if trial.state in ("done", "stopped") else None)

    def __getstate__(self) -> dict[str, Any]:
        """Nothing: Ray Tune stores itself with its searcher, but a sweep goes on from its book."""
        return {}

    def set_search_properties(self, metric: Any, mode: Any, config: Any, **spec: Any) -> bool:
        return True

    def suggest(self, trial_id: str) -> Any:
        while True:
            if self._waiting:
                trial = self._book[self._waiting.pop(0)]
            elif self._optuna is not None and len(self._book) < self._run.num_trials:
                trial = self._new()
            else:
                return Searcher.FINISHED
            try:
                loaded = self.loaded(trial)
            except ConfigError as error:  # values that fit alone, but not together
                self._tell(trial, None)
                self._on_refused(self._book.end(trial.name, "failed", str(error), 0.0))
                continue
            self._names[trial_id] = trial.name
            return {"loaded": loaded}

    def loaded(self, trial: Trial) -> LoadedRun:
        return with_chosen(trial_run(self._run, trial.values, trial.name, trials_folder(self._run)), self._chosen)

    def on_trial_result(self, trial_id: str, result: dict[str, Any]) -> None:
        """Optuna is told how a trial ended."""

    def on_trial_complete(self, trial_id: str, result: dict[str, Any] | None = None, error: bool = False) -> None:
        if self._optuna is None:
            return
        trial = self._book.look(self._names[trial_id])  # Ray Tune calls this before the book knows how it ended
        counts = not error and (result or {}).get("end", "done") == "done"
        self._tell(trial, self._value(trial) if counts else None)

    def _new(self) -> Trial:
        number = len(self._book) + 1
        suggested = self._optuna.suggest(f"{number:02}")
        values = {key: _plain(suggested[key]) for key in self._run.search}
        trial = Trial(trial_name(number, values), values)
        self._suggested.add(trial.name)
        self._book.add([trial])
        return trial

    def _value(self, trial: Trial) -> float | None:
        """What Optuna hears of a trial; nothing of one over a limit, or it would look for more of the kind."""
        value = trial.metrics.get(self._run.metric)
        return None if over_limit(trial.metrics, self._run.limit) or not _is_number(value) else value

    def _tell(self, trial: Trial, value: float | None) -> None:
        if trial.name in self._suggested:
            found = None if value is None else {self._run.metric: value}
            self._optuna.on_trial_complete(trial.name.partition("-")[0], found, error=value is None)
        elif self._optuna is not None:
            self._told_before(trial, value)

    def _told_before(self, trial: Trial, value: float | None) -> None:
        """A trial that an earlier start of the sweep suggested."""
        self._optuna.add_evaluated_point(dict(trial.values), value, error=value is None)

    def save(self, checkpoint_path: str) -> None:
        """Nothing: the book is on disk."""

    def restore(self, checkpoint_path: str) -> None:
        """Nothing: the book is on disk."""


def first_trials(run: TuneRun) -> list[Trial]:
    """All trials of a new sweep whose values are known beforehand.

    Raises:
        ConfigError: the values of one do not fit together.
    """
    trials = []
    for number, values in enumerate(known_points(run), 1):
        name = trial_name(number, values)
        try:
            trial_run(run, values, name, trials_folder(run))
        except ConfigError as error:
            raise ConfigError(f"search: the values {_words(values)} do not fit together: {error}") from None
        trials.append(Trial(name, values))
    return trials


def _words(values: Mapping[str, Any] | Sequence[Any]) -> str:
    return ", ".join(f"{key}={value}" for key, value in dict(values).items())
