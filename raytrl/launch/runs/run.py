"""The frame of every run, of whatever kind: look where it stands, check, plan, start, finish."""

import functools
import pkgutil
import tempfile
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import Any, Generic, TypeVar, cast

from raytrl.config.load import LoadedRun
from raytrl.config.runs.base import Run
from raytrl.errors import RaytrlError, RunError
from raytrl.launch.runs.checkpoints import drop_half_written
from raytrl.launch.runs.resume import Standing, changed_inputs, inspect_run
from raytrl.launch.session.session import Session, check_output_dir, cluster_of, prepare_environment
from raytrl.plan.capacity import Room, check_memory
from raytrl.plan.checks.common import Facts
from raytrl.plan.cluster import Cluster, Need
from raytrl.plan.fit import fitted, in_words
from raytrl.plan.inputs import Inputs, inputs_of
from raytrl.plan.need import need_of
from raytrl.plan.shapes import read_shapes
from raytrl.plan.words import Words, processes_of, words_of
from raytrl.records.outcome import Outcome
from raytrl.records.progress import Progress
from raytrl.rundir import RunDirectory, is_disk_full, now
from raytrl.versions import versions

Show = Callable[[Progress], None]
R = TypeVar("R", bound=Run)
O_co = TypeVar("O_co", bound=Outcome, covariant=True)


@dataclass(frozen=True)
class Lent:
    """What a sweep, which has checked all its runs and their memory, lends to one of them."""

    group: Any  # a placement group for the run's own actors
    reward_actors: Sequence[Any] | None  # handles of those that all trials share; None: the run starts its own


@dataclass(frozen=True)
class Planned:
    """What is known of a run before it starts: what it takes, and what its user is told."""

    need: Need
    words: Words
    notices: Sequence[str] = ()


@dataclass(frozen=True)
class Start:
    """A run that has passed all checks."""

    run_dir: RunDirectory
    command: str  # what the user typed, for the manifest and the model card
    need: Need
    ray: Session
    clock: dict[str, float]  # seconds by phase of the start
    show: Show
    is_fresh: bool


class Kind(ABC, Generic[R, O_co]):
    """What differs between the kinds of run; `run_to_end` asks in the order of these methods."""

    def __init__(self, loaded: LoadedRun, lent: Lent | None = None) -> None:
        self.loaded, self.lent = loaded, lent
        self.show: Show = _not_shown
        self.begin_ray: Callable[[Need], None] = _not_begun

    @property
    def run(self) -> R:
        return cast(R, self.loaded.run)  # the run file names its kind's class

    def standing(self, run_dir: RunDirectory, fresh: bool) -> Standing:
        """What an earlier start has left; `fresh`: it is to be thrown away.

        Raises:
            ConfigError: the directory holds a run of other settings.
        """
        # Of a trial nobody can say --fresh without throwing the whole sweep away.
        return Standing("fresh") if fresh else inspect_run(self.run, run_dir, may_begin_anew=self.lent is not None)

    def made_from(self) -> Inputs:
        """Fingerprints of its data, models and code; a sweep remembers those of its trials."""
        return {} if self.lent is not None else inputs_of(self.run)

    def plan(self, cluster: Cluster, run_dir: RunDirectory) -> Planned:
        """Everything that can be checked before anything starts, and what will run where.

        Args:
            run_dir: what the run makes for itself beforehand, a tokenizer, is read from or put there.

        Raises:
            ConfigError: the request cannot be run.
        """
        self.loaded, chosen = fitted(self.loaded, cluster)
        run = self.run
        need = need_of(run, reward_shared=self.lent is not None and self.lent.reward_actors is not None)
        room = Room.on(cluster, need)
        facts = self.check(run_dir, functools.partial(self.begin_ray, need))
        if self.lent is not None:
            return Planned(need, [("checked", "by the sweep")])
        shapes, unknown = read_shapes(run)
        loads, notices = check_memory(run, room, shapes)
        notices += [f"memory is not estimated: {problem}" for problem in unknown]
        words = words_of(run, shapes, facts)
        words += processes_of(run, cluster.where)
        if loads:
            words.append(("memory", f"about {', '.join(map(str, loads[:4]))}"))
        return Planned(
            need, words, [*in_words(chosen), *facts.notices, *notices, *room.emulated(run), *room.awaited(run)]
        )

    def tell_rows(self, where: str, done: int, count: int) -> None:
        """Shows how far a check is with many rows."""
        self.show(Progress("phase", done, count, f"trying the rows of {where}"))

    @abstractmethod
    def check(self, run_dir: RunDirectory, before_last: Callable[[], None]) -> Facts:
        """Data, models, tokenizers, rewards: what this kind is made from.

        Args:
            before_last: called before what takes longest and fails least: models are read, rows are tried.

        Raises:
            ConfigError: naming the key.
        """

    def begin(self, run_dir: RunDirectory) -> None:
        """All checks have passed, nothing has started: what has to be in the directory from now on."""

    @abstractmethod
    def work(self, start: Start) -> dict[str, Any]:
        """The run itself, on Ray; returns what its manifest says in the end.

        Raises:
            RunError: it failed.
        """

    @abstractmethod
    def outcome(self, run_dir: RunDirectory, already_done: bool) -> O_co:
        """What the directory of a finished run holds."""


def _settling(ray: Session, show: Show) -> Show:
    """Rows are tried for minutes, and a Ray that has started meanwhile would abort the process of a SIGTERM."""

    def shown(progress: Progress) -> None:
        ray.settle()
        show(progress)

    return shown


def _not_shown(_: Progress) -> None:
    """Until somebody runs it."""


def _not_begun(_: Need) -> None:
    """Until somebody runs it."""


def kind_of(loaded: LoadedRun, lent: Lent | None = None) -> Kind[Any, Outcome]:
    """What launches a run of this kind; `lent` by a sweep."""
    kind: Kind[Any, Outcome] = pkgutil.resolve_name(loaded.run.launcher)(loaded, lent)
    return kind


def run_to_end(kind: Kind[Any, O_co], command: str, fresh: bool, show: Show) -> O_co:
    """Runs whatever it is to its end, from wherever it stands.

    Args:
        command: what the user typed, for the manifest and the model card.
        fresh: throw away what the run directory holds.
        show: called in this thread with each piece of progress.

    Raises:
        ConfigError: the request cannot be run; nothing was started.
        RunError: it was started and failed.
    """
    prepare_environment()
    kind.show = show
    run, started = kind.run, time.time()
    check_output_dir(run)
    run_dir = RunDirectory(run.output_dir, run.name)
    with run_dir.locked(), full_disk_told(run_dir):
        standing = kind.standing(run_dir, fresh)
        if standing.state != "fresh":
            _tell(changed_inputs(run_dir, kind.made_from(), standing.state), show)
        if standing.state == "done":
            return kind.outcome(run_dir, already_done=True)
        _tell(standing.notices, show)
        show(Progress("phase", text="checking models and data"))
        with cluster_of(run) as cluster, Session(run) as ray:
            kind.begin_ray, kind.show = ray.begin, _settling(ray, show)
            planned = _planned(kind, cluster, run_dir, standing)
            words = [*planned.words, ("output", str(run_dir)), ("logs", log_place(run_dir))]
            if standing.resume:
                words.insert(-2, ("resume", standing.resume))
            _tell(planned.notices, show)
            show(Progress("plan", words=tuple(words)))
            _write_start(kind, run_dir, command)
            kind.begin(run_dir)
            with _failure_noted(run_dir):
                clock = {"checks_s": time.time() - started}
                start = Start(run_dir, command, planned.need, ray, clock, show, standing.state == "fresh")
                values = kind.work(start)
        run_dir.update_manifest(state="done", finished=now(), **values)
        drop_half_written(run_dir)
        return kind.outcome(run_dir, already_done=False)


def _planned(kind: Kind[Any, O_co], cluster: Cluster, run_dir: RunDirectory, standing: Standing) -> Planned:
    """Of a run that starts anew, nothing of an earlier one is touched before all checks have passed."""
    if standing.state == "continue":
        return kind.plan(cluster, run_dir)
    with tempfile.TemporaryDirectory() as folder:
        staged = RunDirectory(folder, kind.run.name)
        planned = kind.plan(cluster, staged)
        run_dir.clear()
        if staged.exists("tokenizer"):
            run_dir.store(staged.at("tokenizer"), "tokenizer")
    return planned


def _tell(notices: Sequence[str], show: Show) -> None:
    for notice in notices:
        show(Progress("notice", text=notice))


def log_place(run_dir: RunDirectory) -> str:
    """Where the processes' log files are, in words; `logs.log_path` says it for each."""
    if run_dir.is_local:
        return f"{run_dir}/logs"
    return f"{run_dir.own_name}-* in Ray's log folder of each node (object stores cannot append)"


@contextmanager
def _failure_noted(run_dir: RunDirectory) -> Iterator[None]:
    """An error of the block goes into the manifest on its way."""
    try:
        yield
    except RaytrlError as error:
        with suppress(OSError):  # on a full disk; the error is what the user needs
            run_dir.update_manifest(state="failed", error=str(error))
        raise


@contextmanager
def full_disk_told(run_dir: RunDirectory) -> Iterator[None]:
    """What the driver cannot write for lack of room is the user's to mend, not a fault of the program."""
    try:
        yield
    except OSError as error:
        if not is_disk_full(error):
            raise
        raise RunError(
            f"{run_dir}: cannot be written to; found: {error.strerror or error}: {error.filename or run_dir}; expected: room "
            f"on that disk; then the same command continues from the last checkpoint"
        ) from error


def _write_start(kind: Kind[Any, O_co], run_dir: RunDirectory, command: str) -> None:
    """Writes config.yaml and the manifest of a run that starts, or starts again."""
    loaded = kind.loaded
    run_dir.write("config.yaml", loaded.as_yaml())
    earlier = run_dir.manifest()
    run_dir.update_manifest(
        state="running",
        kind=loaded.run.kind,
        command=command,
        seed=loaded.run.seed,
        versions=versions(),
        inputs=kind.made_from(),
        origins={key: origin for key, _, origin in loaded.values() if origin != "default"},
        started=earlier.get("started", now()),
        starts=earlier.get("starts", 0) + 1,
    )
