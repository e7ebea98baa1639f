"""A sweep's record of its trials: trials.json, what their run directories say, and which one is the best."""

import json
import math
import threading
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, replace
from typing import Any

from raytrl.config.runs.sweep import TuneRun
from raytrl.records.metrics import EVAL_LOSS, EVAL_SCORE, KL, LOSS, SCORE
from raytrl.records.sweep import Trial
from raytrl.rundir import RunDirectory

_ALSO = (KL, SCORE, EVAL_SCORE, LOSS, EVAL_LOSS)  # worth a look beside the metric


class TrialBook:
    """All trials of a sweep in order, on disk after every change: what a sweep that was cut off goes on from."""

    def __init__(self, run: TuneRun, run_dir: RunDirectory) -> None:
        self._run, self._run_dir = run, run_dir
        self._lock = threading.RLock()  # Ray Tune's thread writes, the driver's looks
        rows = json.loads(run_dir.read("trials.json") or "[]")
        self._trials = {row["name"]: Trial(**row) for row in rows}

    def __len__(self) -> int:
        return len(self._trials)

    def __getitem__(self, name: str) -> Trial:
        return self._trials[name]

    @property
    def all(self) -> list[Trial]:
        return list(self._trials.values())

    def add(self, trials: Iterable[Trial]) -> None:
        with self._lock:
            self._trials |= {trial.name: trial for trial in trials}
            self._save()

    def change(self, name: str, **values: Any) -> Trial:
        """Replaces fields of a trial."""
        with self._lock:
            self._trials[name] = replace(self._trials[name], **values)
            self._save()
            return self._trials[name]

    def directory(self, name: str) -> RunDirectory:
        return RunDirectory(trials_folder(self._run), name)

    def rows(self, name: str) -> list[dict[str, Any]]:
        """What a trial has logged so far; a line that is being written is left out."""
        return self.directory(name).metrics()

    def look(self, name: str) -> Trial:
        """Step and metrics of a trial as its run directory has them now; not saved."""
        rows = self.rows(name)
        with self._lock:
            trial = self._trials[name]
            if rows:
                metrics = last_values(rows, self._shown, self._run.average_last)
                known = {key: value for key, value in metrics.items() if math.isfinite(value)}
                self._trials[name] = trial = replace(trial, step=rows[-1]["step"], metrics=known)
            return trial

    def end(self, name: str, state: str, cause: str, seconds: float) -> Trial:
        """Writes down how a trial ended; one that is over the limit at its last value is not simply done.

        Nor is one whose metric, or a limited one, is not a finite number: no comparison with it says anything.
        """
        trial = self.look(name)
        if state == "done" and (odd := self._not_finite(name)):
            state, cause = "failed", f"{odd} at the end: not a finite number"
        if state == "done" and (over := over_limit(trial.metrics, self._run.limit)):
            state, cause = "over limit", f"{over} at the end"
        if state == "done" and self._run.metric not in trial.metrics:
            state, cause = "failed", f"metrics.jsonl has no {self._run.metric!r}"
        return self.change(name, state=state, cause=cause, seconds=seconds)

    def _not_finite(self, name: str) -> str:
        values = last_values(self.rows(name), [self._run.metric, *self._run.limit], self._run.average_last)
        return ", ".join(f"{key} {value}" for key, value in values.items() if not math.isfinite(value))

    def take_up_again(self) -> None:
        """Before a sweep goes on: trials that ended while nobody looked are done, the others wait for their turn."""
        for trial in self.all:
            if trial.is_ended and trial.state != "failed":
                continue
            finished = self.directory(trial.name).manifest().get("state") == "done"
            if finished and trial.state == "running":
                self.end(trial.name, "done", "", trial.seconds)
            else:
                self.change(trial.name, state="waiting", cause="")

    @property
    def _shown(self) -> list[str]:
        return [self._run.metric, *self._run.limit, *_ALSO]

    def _save(self) -> None:
        rows = [asdict(trial) for trial in self._trials.values()]
        self._run_dir.write("trials.json", json.dumps(rows, indent=1, ensure_ascii=False) + "\n")


def trials_folder(run: TuneRun) -> str:
    """The `output_dir` of a sweep's trials."""
    return folder_below(run, "trials")


def folder_below(run: TuneRun, name: str) -> str:
    """Path or URI of a folder in a sweep's directory."""
    base, query, options = run.output_dir.partition("?")
    return f"{base.rstrip('/')}/{run.name}/{name}{query}{options}"


def last_values(rows: Sequence[Mapping[str, Any]], keys: Iterable[str], count: int = 1) -> dict[str, float]:
    """Of each metric that was ever logged the mean of its last `count` values, or of as many as there are."""
    found = {key: [row[key] for row in rows if key in row][-count:] for key in dict.fromkeys(keys)}
    return {key: sum(values) / len(values) for key, values in found.items() if values}


def over_limit(metrics: Mapping[str, float], limit: Mapping[str, float]) -> str:
    """`objective/kl 12.1 > 10` for each value over its limit, NaN included; empty where none is."""
    over = [f"{key} {metrics[key]:.4g} > {most:g}" for key, most in limit.items() if not metrics.get(key, most) <= most]
    return ", ".join(over)


class LimitWatch:
    """Counts how often in a row each limited metric was over its limit."""

    def __init__(self, limit: Mapping[str, float], patience: int) -> None:
        self._limit, self._patience = limit, patience
        self._in_a_row = dict.fromkeys(limit, 0)
        self._seen = dict.fromkeys(limit, -1)

    def take(self, step: int, metrics: Mapping[str, float]) -> str:
        """Why the trial should be stopped now that it has logged these metrics; empty: it should not.

        Steps that are redone after a restart count once.
        """
        for key, most in self._limit.items():
            if key in metrics and step > self._seen[key]:
                self._seen[key] = step
                self._in_a_row[key] = 0 if metrics[key] <= most else self._in_a_row[key] + 1  # NaN is over
                if self._in_a_row[key] >= self._patience:
                    return f"{key} {metrics[key]:.4g} > {most:g}, {self._patience} values in a row"
        return ""


def best_trial(trials: Iterable[Trial], metric: str, mode: str) -> Trial | None:
    """The trial that ran to its end with the best last value of the metric, a finite one; the first of equal ones."""
    done = [t for t in trials if t.state == "done" and math.isfinite(t.metrics.get(metric, math.nan))]
    sign = 1 if mode == "max" else -1
    return max(done, key=lambda trial: sign * trial.metrics[metric], default=None)
