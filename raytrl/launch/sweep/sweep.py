"""`raytrl tune`: many runs of one base file with other values, side by side on one Ray, and the best of them."""

import functools
import os
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from raytrl.config.load import LoadedRun
from raytrl.config.runs.base import TrainingRun
from raytrl.config.runs.ppo import PpoRun
from raytrl.config.runs.sweep import TuneRun
from raytrl.config.trials import Edge, check_edges, load_base
from raytrl.errors import ConfigError, RunError
from raytrl.launch.runs.resume import refuse_changes
from raytrl.launch.runs.run import failure_noted, kind_of, write_start
from raytrl.launch.session.session import check_output_dir, cluster_of, prepare_environment, ray_session
from raytrl.launch.sweep.book import TrialBook, best_trial, trials_folder
from raytrl.launch.sweep.end import write_end
from raytrl.launch.sweep.room import AtOnce, Sweep, concurrent_trials
from raytrl.plan.cluster import Cluster, Need
from raytrl.plan.where import check_one_node, joins_cluster, refuse_client
from raytrl.records.progress import Progress
from raytrl.records.sweep import Trial
from raytrl.rundir import RunDirectory, now

# Read by Ray Tune. Trials keep their own records; and a row need not hold the metric of an evaluation that was not due.
_ENVIRONMENT = {
    "TUNE_DISABLE_AUTO_CALLBACK_LOGGERS": "1",
    "TUNE_DISABLE_STRICT_METRIC_CHECKING": "1",
    "RAY_AIR_NEW_OUTPUT": "0",
}

_BASE = "base.yaml"  # the base run, resolved

Show = Callable[[Progress], None]
ShowTrials = Callable[[Sequence[Trial]], None]


def tune(loaded: LoadedRun, command: str, fresh: bool, show: Show, show_trials: ShowTrials) -> dict[str, Any]:
    """Runs a sweep to its end, from wherever it stands.

    Args:
        loaded: the sweep's run file.
        command: what the user typed.
        fresh: throw away what the sweep's directory holds.
        show: called with the plan and with notices.
        show_trials: called with all trials, about once a second.

    Returns:
        The manifest with `trials`, a list of Trial.

    Raises:
        ConfigError: the request cannot be run; nothing was started.
        RunError: too many trials failed, or none came to its end.
    """
    prepare_environment()
    for name, value in _ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    check_output_dir(loaded.run)
    base = load_base(loaded)
    loaded = _at_address_of(base, loaded)
    sweep = Sweep(loaded, base, command)
    run = sweep.run
    edges = check_edges(loaded)
    run_dir = RunDirectory(run.output_dir, run.name)
    with run_dir.locked():
        goes_on = not fresh and run_dir.exists(_BASE)
        for notice in [] if fresh else _check_unchanged(sweep, run_dir):
            show(Progress("notice", text=notice))
        if goes_on and run_dir.manifest()["state"] == "done":
            return run_dir.manifest() | {"already_done": True, "trials": TrialBook(run, run_dir).all}
        refuse_client(run)
        if not joins_cluster(run):
            assert isinstance(base.run, TrainingRun)
            check_one_node(base.run)
        with cluster_of(run) as cluster:
            return _run(sweep, edges, cluster, run_dir, goes_on, show, show_trials)


def _run(
    sweep: Sweep,
    edges: Sequence[Edge],
    cluster: Cluster,
    run_dir: RunDirectory,
    goes_on: bool,
    show: Show,
    show_trials: ShowTrials,
) -> dict[str, Any]:
    """Checks the sweep against the cluster and its data, then runs it; the manifest as `tune` returns it."""
    from raytrl.launch.sweep.search import first_trials, make_optuna, make_scheduler

    run = sweep.run
    scheduler, optuna = make_scheduler(run), make_optuna(run)
    at_once = concurrent_trials(sweep, edges, cluster)
    trials = [] if goes_on else first_trials(run)
    words = _check_runs(sweep, edges)
    if not goes_on:
        run_dir.clear()
    write_start(sweep.loaded, run_dir, sweep.command)
    book = TrialBook(run, run_dir)
    book.add(trials)
    run_dir.write(_BASE, sweep.base.as_yaml())  # last: from now on there is a sweep to go on with
    book.take_up_again()
    for notice in at_once.notes:
        show(Progress("notice", text=notice))
    show(Progress("plan", text=_describe(sweep, book, words, at_once, run_dir)))
    with failure_noted(run_dir):
        _run_on_ray(sweep, at_once, book, scheduler, optuna, run_dir, show, show_trials)
        best = _best(run, book)
    model = write_end(run, book, best, run_dir)
    run_dir.delete(".tune")
    run_dir.update_manifest(state="done", finished=now(), best=best.name, model=model)
    return run_dir.manifest() | {"trials": book.all}


def _at_address_of(base: LoadedRun, loaded: LoadedRun) -> LoadedRun:
    """A sweep runs where its base file says, unless it says something itself."""
    run = loaded.run
    if run.cluster.address is not None or base.run.cluster.address is None:
        return loaded
    return LoadedRun(run.model_copy(update={"cluster": base.run.cluster}), loaded.origins, loaded.file)


def _check_unchanged(sweep: Sweep, run_dir: RunDirectory) -> list[str]:
    """Notices about what changed since the sweep was started.

    Raises:
        ConfigError: it is another sweep now.
    """
    found = [("config.yaml", sweep.run), (_BASE, sweep.base.run)]
    return [notice for name, run in found if run_dir.exists(name) for notice in refuse_changes(run_dir, name, run)]


def _check_runs(sweep: Sweep, edges: Sequence[Edge]) -> str:
    """Data, models and reward sources of the base run, and of every value that may name others; words for people."""
    assert isinstance(sweep.base.run, TrainingRun)
    with tempfile.TemporaryDirectory() as staging:
        words = kind_of(sweep.base.run).check(RunDirectory(staging, "base"))
        for number, edge in enumerate(edges):
            if edge.key.startswith("ppo.") or isinstance(edge.value, float):
                continue  # a matter of numbers, which the loader has checked
            assert isinstance(edge.loaded.run, TrainingRun)
            try:
                kind_of(edge.loaded.run).check(RunDirectory(staging, str(number)))
            except ConfigError as error:
                raise ConfigError(f"search.{edge.key}: value {edge.value!r} is refused: {error}") from None
    return words


def _describe(sweep: Sweep, book: TrialBook, words: str, at_once: AtOnce, run_dir: RunDirectory) -> str:
    run = sweep.run
    searched = [f"{key}: {d.name} {list(d.arguments)}" for key, d in run.search.items()]
    stopping = "no trial is stopped early" if run.scheduler.name == "none" else f"{run.scheduler.name} stops early"
    limits = "".join(f"; {key} at most {value:g}" for key, value in run.limit.items())
    ended = sum(trial.is_ended for trial in book.all)
    lines = [
        f"base     {run.base}",
        *(f"         {line}" for line in words.splitlines()),
        *(f"{'search' if i == 0 else '':<9}{line}" for i, line in enumerate(searched)),
        f"trials   {run.num_trials} by {run.algorithm.name}" + (f", {ended} of them ended" if ended else ""),
        f"aim      {run.mode} {run.metric}{limits}; {stopping}",
        f"at once  {at_once.words}",
    ]
    return "\n".join([*lines, f"output   {run_dir}"])


def _run_on_ray(
    sweep: Sweep,
    at_once: AtOnce,
    book: TrialBook,
    scheduler: Any,
    optuna: Any,
    run_dir: RunDirectory,
    show: Show,
    show_trials: ShowTrials,
) -> None:
    if all(trial.is_ended for trial in book.all) and len(book) >= sweep.run.num_trials:
        return
    run, one = sweep.run, sweep.trial_need(sweep.base)
    shared = sweep.shared_need()
    store = one.object_store_bytes * at_once.count
    with ray_session(run, Need((*shared.groups, *one.groups), store)):
        from raytrl.launch.session.storage import check_storage
        from raytrl.launch.sweep.search import replay
        from raytrl.launch.sweep.watch import SweepWatch

        check_storage(run_dir)
        replay(scheduler, run, book)
        with _reward_actors(sweep) as rewards:
            SweepWatch(run, book, run_dir, show, show_trials).until_done(
                sweep.command, at_once.count, scheduler, optuna, rewards
            )


@contextmanager
def _reward_actors(sweep: Sweep) -> Iterator[list[Any] | None]:
    """The reward actors of all trials, where they are the same; they belong to this process."""
    if not sweep.shares_reward:
        yield None
        return
    from raytrl.launch.actors.start import started_actors
    from raytrl.launch.runs.ppo import make_sources

    assert isinstance(sweep.base.run, PpoRun)
    base, run = sweep.base.run, sweep.run
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
