"""`raytrl quickstart`: the whole way from nothing to an aligned model, by the ordinary runs of configs/quickstart."""

import json
import re
import shlex
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from raytrl.config.load import LoadedRun, load_run
from raytrl.errors import ConfigError
from raytrl.film_reviews import make_film_reviews, write_film_reviews
from raytrl.launch.runs.run import Show, kind_of, run_to_end
from raytrl.launch.session.session import kept_ray, prepare_environment
from raytrl.records.outcome import Outcome
from raytrl.rundir import RunDirectory

STAGES = ("sft", "reward", "ppo", "eval")
_FILES = Path(__file__).parents[3] / "configs/quickstart"
_WRITTEN = "runs/quickstart"  # the folder that the run files name


@dataclass(frozen=True)
class Stage:
    """One finished stage."""

    kind: str
    command: str  # what would run this stage alone
    outcome: Outcome
    rows: list[dict[str, Any]]  # metrics.jsonl
    seconds: float | None  # None: it was finished before


def quickstart(
    output_dir: str, overrides: Sequence[str], fresh: bool, showing: Callable[[str], AbstractContextManager[Show]]
) -> list[Stage]:
    """Makes the data and runs the stages that are not finished yet, all on one local Ray.

    Args:
        output_dir: a local folder for data and runs.
        overrides: `stage.dotted.key=value`.
        fresh: do all stages anew.
        showing: stage title → what shows its progress.

    Raises:
        ConfigError: nothing was started (or not the next stage).
        RunError: a stage was started and failed.
    """
    if "://" in output_dir:
        raise ConfigError(
            f"--output-dir: found: {output_dir!r}; expected: a local folder, quickstart runs on this machine"
        )
    output_dir = output_dir.rstrip("/") or "/"
    runs = stage_runs(output_dir, overrides)  # all are checked before the first starts
    write_film_reviews(make_film_reviews(), Path(output_dir, "data"))
    states = [RunDirectory(loaded.run.output_dir, loaded.run.name).manifest().get("state") for _, loaded in runs]
    prepare_environment()
    with _ray_unless(all(state == "done" for state in states) and not fresh):
        return [_run_stage(loaded, command, fresh, showing) for command, loaded in runs]


def stage_runs(output_dir: str, overrides: Sequence[str]) -> list[tuple[str, LoadedRun]]:
    """Each stage's command and checked run file, moved to another output folder where one is asked for.

    Raises:
        ConfigError: an override that names no stage, or does not fit; or the run files are not there.
    """
    if not _FILES.is_dir():
        raise ConfigError(
            f"quickstart: its run files are missing; found: no folder {_FILES}; expected: a clone of the repository, "
            f"installed with `pip install -e .`"
        )
    for override in overrides:
        if override.partition(".")[0] not in STAGES:
            raise ConfigError(
                f"{override!r}: not an override of a stage; expected: stage.dotted.key=value with stage one of "
                f"{', '.join(STAGES)}, such as ppo.ppo.steps=8"
            )
    found = []
    for kind in STAGES:
        file = _FILES / f"{kind}.yaml"
        shown = str(file.relative_to(Path.cwd())) if file.is_relative_to(Path.cwd()) else str(file)
        own = [override.removeprefix(f"{kind}.") for override in overrides if override.startswith(f"{kind}.")]
        words = [*_moved(shown, kind, output_dir), *own]
        found.append((shlex.join(["raytrl", kind, shown, *words]), load_run(shown, words, kind)))
    return found


def _moved(file: str, kind: str, output_dir: str) -> list[str]:
    """Overrides that replace the folder that the run files name; none where it is the one asked for."""
    if output_dir == _WRITTEN:
        return []
    values = load_run(file, [], kind).values()
    inside = [(key, value) for key, value, _ in values if isinstance(value, str) and value.startswith(_WRITTEN)]
    return [f"{key}={_as_yaml(output_dir + value.removeprefix(_WRITTEN))}" for key, value in inside]


def _as_yaml(path: str) -> str:
    """Quoted where YAML could read it as something else."""
    return path if re.fullmatch(r"[./\w][./\w\-]*[A-Za-z]\w*", path) else json.dumps(path)


@contextmanager
def _ray_unless(all_done: bool) -> Iterator[None]:
    if all_done:
        yield
        return
    with kept_ray():
        yield


def _run_stage(
    loaded: LoadedRun, command: str, fresh: bool, showing: Callable[[str], AbstractContextManager[Show]]
) -> Stage:
    kind = loaded.run.kind
    started = time.monotonic()
    with showing(f"{STAGES.index(kind) + 1}/{len(STAGES)}  {command}") as show:
        outcome = run_to_end(kind_of(loaded), command, fresh, show)
    rows = RunDirectory(loaded.run.output_dir, loaded.run.name).rows("metrics.jsonl")
    seconds = None if outcome.already_done else time.monotonic() - started
    return Stage(kind, command, outcome, rows, seconds)
