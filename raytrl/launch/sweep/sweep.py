"""`raytrl tune`: many runs of one base file with other values, side by side on one Ray, and the best of them."""

import functools
import os
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

from raytrl.config.load import LoadedRun
from raytrl.config.runs.rollout import RolloutRun
from raytrl.config.runs.sweep import TuneRun
from raytrl.config.trials import check_edges, load_base
from raytrl.errors import ConfigError, RunError
from raytrl.launch.runs.resume import Standing, refuse_changes
from raytrl.launch.runs.run import Kind, Lent, Planned, Start, kind_of
from raytrl.launch.sweep.book import TrialBook, best_trial, trials_folder
from raytrl.launch.sweep.end import write_end
from raytrl.launch.sweep.room import AtOnce, Sweep, concurrent_trials
from raytrl.plan.checks.common import Facts
from raytrl.plan.checks.rows import in_no_hurry
from raytrl.plan.cluster import Cluster, Need
from raytrl.plan.fit import fitted, in_words, with_chosen
from raytrl.plan.inputs import Inputs, inputs_of
from raytrl.plan.shapes import read_shapes
from raytrl.plan.where import check_one_node, joins_cluster, refuse_client
from raytrl.plan.words import Words, words_of
from raytrl.records.outcome import Swept
from raytrl.records.sweep import Trial
from raytrl.rundir import RunDirectory

# Read by Ray Tune. Trials keep their own records; and a row need not hold the metric of an evaluation that was not due.
_ENVIRONMENT = {
    "TUNE_DISABLE_AUTO_CALLBACK_LOGGERS": "1",
    "TUNE_DISABLE_STRICT_METRIC_CHECKING": "1",
    "RAY_AIR_NEW_OUTPUT": "0",
}

_BASE = "base.yaml"  # the base run, resolved

ShowTrials = Callable[[Sequence[Trial]], None]


class SweepKind(Kind[TuneRun, Swept]):
    """`run.Kind` of a sweep: its checks are those of its base run, for every value that is searched."""

    show_trials: ShowTrials = staticmethod(lambda trials: None)  # called with all trials, about once a second

    def __init__(self, loaded: LoadedRun, lent: Lent | None = None) -> None:
        """
        Raises:
            ConfigError: the base file, or a value of the search space on it, is refused.
        """
        base = load_base(loaded)
        super().__init__(_at_address_of(base, loaded), lent)
        self._sweep, self._edges = Sweep(self.run, base), check_edges(self.loaded)
        self._goes_on = False
        self._first_trials: list[Trial] = []
        for name, value in _ENVIRONMENT.items():
            os.environ.setdefault(name, value)

    def standing(self, run_dir: RunDirectory, fresh: bool) -> Standing:
        notices = [] if fresh else self._check_unchanged(run_dir)
        self._goes_on = not fresh and run_dir.exists(_BASE)
        if self._goes_on and run_dir.manifest()["state"] == "done":
            return Standing("done")
        refuse_client(self.run)
        if not self._goes_on:
            return Standing("fresh", notices=tuple(notices))
        trials = TrialBook(self.run, run_dir).all
        ended = f"{sum(trial.is_ended for trial in trials)} of {len(trials)} trials have ended"
        return Standing("continue", notices=tuple(notices), resume=ended)

    def _check_unchanged(self, run_dir: RunDirectory) -> list[str]:
        """Notices about what changed since the sweep was started.

        Raises:
            ConfigError: it is another sweep now.
        """
        found = [("config.yaml", self.run), (_BASE, self._sweep.base.run)]
        return [notice for name, run in found if run_dir.exists(name) for notice in refuse_changes(run_dir, name, run)]

    def made_from(self) -> Inputs:
        """Of the base run, and of every value that may name other data or models."""
        found = inputs_of(self._sweep.base.run)
        for edge in self._edges:
            if isinstance(edge.value, str | dict | list):
                for key, files in inputs_of(edge.loaded.run).items():
                    found[key] = {**found.get(key, {}), **files}
        return found

    def plan(self, cluster: Cluster, run_dir: RunDirectory) -> Planned:
        from raytrl.launch.sweep.search import first_trials, make_optuna, make_scheduler

        if not joins_cluster(self.run):
            check_one_node(self._sweep.base.run)
        base, chosen = fitted(self._sweep.base, cluster)
        self._sweep = replace(self._sweep, base=base, chosen=chosen)
        self._edges = [replace(edge, loaded=with_chosen(edge.loaded, chosen)) for edge in self._edges]
        self._scheduler, self._optuna = make_scheduler(self.run), make_optuna(self.run)
        self._at_once = concurrent_trials(self._sweep, self._edges, cluster)
        self._first_trials = [] if self._goes_on else first_trials(self.run)
        one = self._sweep.trial_need(base)
        store = one.object_store_bytes * self._at_once.count
        need = Need((*self._sweep.shared_need().groups, *one.groups), store)
        facts = self.check(run_dir, functools.partial(self.begin_ray, need))
        return Planned(
            need, _words(self._sweep, self._at_once, facts), [*in_words(chosen), *facts.notices, *self._at_once.notes]
        )

    def check(self, run_dir: RunDirectory, before_last: Callable[[], None]) -> Facts:
        """Data, models and reward sources of the base run, and of every value that may name others."""
        with tempfile.TemporaryDirectory() as staging:
            base = kind_of(self._sweep.base)
            base.show = self.show
            facts = base.check(RunDirectory(staging, "base"), before_last)
            for number, edge in enumerate(self._edges):
                if edge.key.startswith("ppo.") or isinstance(edge.value, float):
                    continue  # a matter of numbers, which the loader has checked
                try:
                    kind_of(edge.loaded).check(RunDirectory(staging, str(number)), in_no_hurry)
                except ConfigError as error:
                    raise ConfigError(f"search.{edge.key}: value {edge.value!r} is refused: {error}") from None
        return facts

    def begin(self, run_dir: RunDirectory) -> None:
        book = TrialBook(self.run, run_dir)
        book.add(self._first_trials)
        run_dir.write(_BASE, self._sweep.base.as_yaml())  # last: from now on there is a sweep to go on with
        book.take_up_again()

    def work(self, start: Start) -> dict[str, Any]:
        run, run_dir = self.run, start.run_dir
        book = TrialBook(run, run_dir)
        if len(book) < run.num_trials or not all(trial.is_ended for trial in book.all):
            self._run_trials(book, start)
        best = _best(run, book)
        model = write_end(run, book, best, run_dir)
        run_dir.delete(".tune")
        return {"best": best.name, "model": model}

    def _run_trials(self, book: TrialBook, start: Start) -> None:
        with start.ray.running(start.need):
            from raytrl.launch.session.storage import check_storage
            from raytrl.launch.sweep.search import replay
            from raytrl.launch.sweep.watch import SweepWatch

            check_storage(start.run_dir)
            replay(self._scheduler, self.run, book)
            with _reward_actors(self._sweep) as rewards:
                SweepWatch(self._sweep, book, start.run_dir, start.show, self.show_trials).until_done(
                    start.command, self._at_once.count, self._scheduler, self._optuna, rewards
                )

    def outcome(self, run_dir: RunDirectory, already_done: bool) -> Swept:
        manifest = run_dir.manifest()
        trials = TrialBook(self.run, run_dir).all
        return Swept(str(run_dir), already_done, trials, manifest["best"], manifest["model"])


def _at_address_of(base: LoadedRun, loaded: LoadedRun) -> LoadedRun:
    """A sweep runs where its base file says, unless it says something itself."""
    run = loaded.run
    if run.cluster.address is not None or base.run.cluster.address is None:
        return loaded
    return LoadedRun(run.model_copy(update={"cluster": base.run.cluster}), loaded.origins, loaded.file)


def _words(sweep: Sweep, at_once: AtOnce, facts: Facts) -> Words:
    run, base = sweep.run, sweep.base.run
    searched = [f"{key}: {d.name} {list(d.arguments)}" for key, d in run.search.items()]
    stopping = "no trial is stopped early" if run.scheduler.name == "none" else f"{run.scheduler.name} stops early"
    limits = "".join(f"; {key} at most {value:g}" for key, value in run.limit.items())
    of_base = words_of(base, read_shapes(base)[0], facts)
    return [
        ("base", run.base),
        *((f"  {subject}", sentence) for subject, sentence in of_base),
        *(("search" if i == 0 else "", line) for i, line in enumerate(searched)),
        ("trials", f"{run.num_trials} by {run.algorithm.name}"),
        ("aim", f"{run.mode} {run.metric}{limits}; {stopping}"),
        ("at once", at_once.words),
        ("memory", at_once.memory),
    ]


@contextmanager
def _reward_actors(sweep: Sweep) -> Iterator[list[Any] | None]:
    """The reward actors of all trials, where they are the same; they belong to this process."""
    if not sweep.shares_reward:
        yield None
        return
    from raytrl.launch.actors.start import started_actors
    from raytrl.launch.runs.ppo import make_sources

    base, run = sweep.base.run, sweep.run
    assert isinstance(base, RolloutRun)  # nothing else has reward actors
    owner = base.model_copy(update={"output_dir": run.output_dir, "name": run.name})  # their logs are the sweep's
    with started_actors(owner, None, functools.partial(make_sources, base)) as (_, rewards):
        yield rewards


def _best(run: TuneRun, book: TrialBook) -> Trial:
    best = best_trial(book.all, run.metric, run.mode)
    if best is None:
        ends = "; ".join(
            f"{trial.name}: {trial.state}{': ' + trial.cause if trial.cause else ''}" for trial in book.all
        )
        raise RunError(f"no trial came to its end within the limits: {ends}; trials: {trials_folder(run)}")
    return best
