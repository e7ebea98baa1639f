"""Whoever takes a run's progress knows every kind of it: none is dropped unseen, a misspelt one fails."""

import re
from collections.abc import Callable
from io import StringIO
from pathlib import Path
from types import SimpleNamespace
from typing import Any, get_args

import pytest
from rich.console import Console

from raytrl.launch.runs.watch import Watch
from raytrl.launch.session.gauges import StepGauges
from raytrl.launch.sweep.trial import TrialReports
from raytrl.records.progress import Progress, ProgressKind
from raytrl.report.progress import Display
from raytrl.report.sweep import SweepDisplay
from raytrl.rundir import RunDirectory

Take = Callable[[Progress], None]
SWEEP: Any = SimpleNamespace(metric="loss", limit={}, limit_patience=3)


def display(folder: Path) -> Take:
    return Display(Console(file=StringIO()), "a").show


def sweep_display(folder: Path) -> Take:
    return SweepDisplay(Console(file=StringIO()), "a", ["loss"]).show


def trial_reports(folder: Path) -> Take:
    return TrialReports(SWEEP, RunDirectory(str(folder), "a")).show


def step_gauges(folder: Path) -> Take:
    gauges = StepGauges("a", None)
    gauges._gauges = SimpleNamespace(set=lambda *_, **__: None)  # type: ignore[assignment]  # Ray does not run
    return gauges.take


def watch(folder: Path) -> Take:
    run: Any = None
    watch = Watch(run, RunDirectory(str(folder), "a"), None, {}, lambda event: None)
    watch._handle(Progress("start", 0, 4))  # before the first start, a failure ends the run
    return watch._handle


TAKERS = [display, sweep_display, trial_reports, step_gauges, watch]


@pytest.mark.parametrize("taker", TAKERS, ids=lambda taker: taker.__name__)
def test_every_kind_is_taken_and_no_other(taker: Callable[[Path], Take], tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    take = taker(tmp_path)
    for kind in get_args(ProgressKind):
        take(Progress(kind, 4, 4, text="text", metrics={"loss": 1.0, "time/step_s": 1.0}))
    misspelt: Any = "stepp"
    with pytest.raises(AssertionError, match="stepp"):
        take(Progress(misspelt, 4, 4))


def test_every_kind_that_is_listed_is_sent_by_somebody() -> None:
    text = "".join(path.read_text() for path in Path("raytrl").rglob("*.py"))
    sent = set(re.findall(r'(?:Progress\(|_send\(|kind=)\s*"(\w+)"', text))
    assert set(get_args(ProgressKind)) <= sent
