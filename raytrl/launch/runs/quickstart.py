"""`raytrl quickstart`: the whole way from nothing to an aligned model, by four ordinary runs.

The package holds their run files (`raytrl/quickstart/`). Each is put beside the data that it trains on and is read from
there, so it can be read, edited, and run by itself, wherever raytrl was installed.
"""

import os
import re
import shlex
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path
from typing import Any

from raytrl.config.load import LoadedRun, load_run
from raytrl.config.yaml12 import yaml_text
from raytrl.errors import ConfigError
from raytrl.film_reviews import make_film_reviews, write_film_reviews
from raytrl.launch.runs.run import Show, kind_of, run_to_end
from raytrl.launch.session.session import kept_ray, prepare_environment
from raytrl.records.outcome import Outcome
from raytrl.rundir import RunDirectory

STAGES = ("sft", "reward", "ppo", "eval")
_PATHS = re.compile(r"runs/quickstart\b([\w/.]*)")  # what the package's run files name, in the default folder


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
        output_dir: a local folder for run files, data and runs.
        overrides: `stage.dotted.key=value`.
        fresh: do all stages anew, by the run files as they are.
        showing: stage title → what shows its progress.

    Raises:
        ConfigError: nothing was started (or not the next stage).
        RunError: a stage was started and failed.
    """
    if "://" in output_dir:
        raise ConfigError(
            f"--output-dir: found: {output_dir!r}; expected: a local folder, quickstart runs on this machine"
        )
    output_dir = os.path.expanduser(output_dir.rstrip("/") or "/")
    write_run_files(output_dir)
    runs = stage_runs(output_dir, overrides)  # all are checked before the first starts
    write_film_reviews(make_film_reviews(), Path(output_dir, "data"))
    states = [RunDirectory(loaded.run.output_dir, loaded.run.name).manifest().get("state") for _, loaded in runs]
    prepare_environment()
    with _ray_unless(all(state == "done" for state in states) and not fresh):
        return [_run_stage(loaded, command, fresh, showing) for command, loaded in runs]


def write_run_files(output_dir: str) -> None:
    """Puts each stage's run file into the folder, its paths moved there; one that is there is the user's, and stays."""
    folder = RunDirectory(output_dir, "")
    for kind in STAGES:
        name = f"{kind}.yaml"
        if not folder.exists(name):
            text = files("raytrl").joinpath("quickstart", name).read_text(encoding="utf-8")
            folder.write(name, _PATHS.sub(lambda path: yaml_text(output_dir + path[1]), text))


def stage_runs(output_dir: str, overrides: Sequence[str]) -> list[tuple[str, LoadedRun]]:
    """Each stage's command and its checked run file, from the folder that `write_run_files` wrote them into.

    Raises:
        ConfigError: an override that names no stage, or does not fit; or a run file is not there, or leads elsewhere.
    """
    for override in overrides:
        if override.partition(".")[0] not in STAGES:
            raise ConfigError(
                f"{override!r}: not an override of a stage; expected: stage.dotted.key=value with stage one of "
                f"{', '.join(STAGES)}, such as ppo.ppo.steps=8"
            )
    found = []
    for kind in STAGES:
        file = os.path.join(output_dir, f"{kind}.yaml")
        own = [override.removeprefix(f"{kind}.") for override in overrides if override.startswith(f"{kind}.")]
        loaded = load_run(file, own, kind)
        _check_place(loaded, output_dir)
        found.append((shlex.join(["raytrl", kind, file, *own]), loaded))
    return found


def _check_place(loaded: LoadedRun, output_dir: str) -> None:
    """The tables at the end, and the next stage, look for a stage's results in a folder of its kind's name."""
    run = loaded.run
    if os.path.abspath(os.path.join(run.output_dir, run.name)) != os.path.abspath(os.path.join(output_dir, run.kind)):
        raise ConfigError(
            f"{loaded.file}: output_dir and name lead elsewhere; found: {run.output_dir}/{run.name}; expected: "
            f"{output_dir}/{run.kind}, where quickstart looks for it; or delete the file, and it is written anew"
        )


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
    rows = RunDirectory(loaded.run.output_dir, loaded.run.name).metrics()
    seconds = None if outcome.already_done else time.monotonic() - started
    return Stage(kind, command, outcome, rows, seconds)
