"""Which checkpoints a run has: Ray Train's record of those that are complete, and what to do where it cannot be followed."""

import json
import time
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from raytrl.errors import ConfigError
from raytrl.rundir import RunDirectory

_RECORD = "checkpoints/checkpoint_manager_snapshot.json"
_COPY = "checkpoints/record-before.json"
_ENDS_S = 2.0  # for what was killed to end


@dataclass(frozen=True)
class Committed:
    """A complete checkpoint."""

    step: int
    world_size: int
    path: str

    @classmethod
    def of(cls, result: dict[str, Any], run_dir: RunDirectory) -> "Committed":
        """From its place in the record."""
        metrics, path = result["metrics"], run_dir.at(f"checkpoints/{result['checkpoint_dir_name']}")
        return cls(int(metrics["step"]), int(metrics["world_size"]), path)


class RecordCopy:
    """A copy of the record of a run that goes on.

    Ray Train writes its record in place: what loses its power meanwhile is left with half of it. An object store shows an
    object only once it is whole, so there nothing is copied.
    """

    def __init__(self, run_dir: RunDirectory) -> None:
        self._run_dir, self._seen = run_dir, 0

    def keep(self) -> None:
        """Copies it if it has changed; called again and again."""
        if not self._run_dir.is_local:
            return
        record = Path(self._run_dir.at(_RECORD))
        with suppress(OSError):  # there is none yet; or the disk is full, which the next checkpoint will say
            changed = record.stat().st_mtime_ns
            if changed != self._seen and _whole(text := record.read_text()) is not None:
                self._run_dir.write(_COPY, text)
                self._seen = changed


def start_of(run_dir: RunDirectory) -> str:
    """Which start of the run this is; a later one has taken over from whoever finds another."""
    manifest = run_dir.manifest()
    return f"{manifest.get('started')}, {manifest.get('starts')}"


def last_committed(run_dir: RunDirectory) -> tuple[Committed | None, list[str]]:
    """The checkpoint a restart would load, and notices of what is lost. Nothing is written.

    Raises:
        ConfigError: there is a record, and no checkpoint left to go on from.
    """
    try:
        record, notices = _read(run_dir)
    except ConfigError:
        time.sleep(_ENDS_S)  # a start that was killed a moment ago may be writing
        record, notices = _read(run_dir)
    latest = None if record is None else record["latest_checkpoint_result"]
    return None if latest is None else Committed.of(latest, run_dir), notices


def settle(run_dir: RunDirectory) -> list[str]:
    """Puts the record in order and deletes what it does not name, half-written checkpoints; returns notices of what is lost.

    To be called once the manifest names this start, so that an earlier one adds nothing, and before this one's workers.

    Raises:
        ConfigError: there is a record, and no checkpoint left to go on from.
    """
    record, notices = _read(run_dir)
    if record is not None and record != _whole(run_dir.read(_RECORD) or ""):
        run_dir.write(_RECORD, json.dumps(record))
    _drop_but(run_dir, set() if record is None else _names(record))
    return notices


def drop_half_written(run_dir: RunDirectory) -> None:
    """Deletes what the record of a finished run does not name."""
    record = _whole(run_dir.read(_RECORD) or "")
    if record is not None:
        _drop_but(run_dir, _names(record))


def _drop_but(run_dir: RunDirectory, kept: set[str]) -> None:
    for folder in run_dir.folders("checkpoints"):
        if folder.startswith("checkpoint_") and folder not in kept:
            run_dir.delete(f"checkpoints/{folder}")
    run_dir.delete(".scratch")


def _read(run_dir: RunDirectory) -> tuple[dict[str, Any] | None, list[str]]:
    """The record as far as it can be followed: Ray Train refuses one that names a folder which is not there."""
    text = run_dir.read(_RECORD)
    if text is None:
        return None, []
    notices = []
    record = _whole(text)
    if record is None:
        record = _whole(run_dir.read(_COPY) or "")
        if record is None:
            raise ConfigError(
                f"{run_dir}: the record of its checkpoints cannot be read; found: {len(text)} bytes in {_RECORD} that are no "
                f"JSON; expected: the file as Ray Train wrote it, or --fresh to throw the run away"
            )
        notices.append("the record of checkpoints was not written to its end: goes on by the one before it")
    known = list(zip(record["checkpoint_results"], record["checkpoint_report_indices"], strict=True))
    kept = [each for each in known if run_dir.exists(f"checkpoints/{each[0]['checkpoint_dir_name']}")]
    if len(kept) == len(known):
        return record, notices
    if not kept:
        steps = ", ".join(str(result["metrics"]["step"]) for result, _ in known)
        raise ConfigError(
            f"{run_dir}: its checkpoints are gone; found: a record of those of steps {steps}, and no folder of theirs; "
            f"expected: {run_dir}/checkpoints as it was, or --fresh to throw the run away"
        )
    newest, last = known[-1][0], kept[-1][0]
    if newest != last:
        notices.append(
            f"the checkpoint of step {newest['metrics']['step']} is on record, and its folder is gone: goes on from step "
            f"{last['metrics']['step']}"
        )
    results, indices = zip(*kept, strict=True)
    there = {
        "checkpoint_results": [*results],
        "checkpoint_report_indices": [*indices],
        "latest_checkpoint_result": last,
    }
    return record | there, notices


def _names(record: dict[str, Any]) -> set[str]:
    return {result["checkpoint_dir_name"] for result in record["checkpoint_results"]}


def _whole(text: str) -> dict[str, Any] | None:
    """A record; None: half of one."""
    try:
        found = json.loads(text)
    except ValueError:
        return None
    return found if isinstance(found, dict) else None
