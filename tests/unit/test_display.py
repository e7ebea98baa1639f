"""Progress on a terminal and in a log file."""

from io import StringIO

import pytest
from rich.console import Console

from raytrl.records.outcome import Trained
from raytrl.records.progress import Progress
from raytrl.report.progress import Display, summary

EVENTS = [
    Progress("plan", words=(("learner.workers", "2 x CPU 1"), ("output", "runs/[a]"))),
    Progress("notice", text="learner.workers was [a, b], now 3"),
    Progress("phase", text="starting [Ray]"),
    Progress("start", 0, 3),
    Progress("step", 1, 3, metrics={"loss": 2.5, "time/step_s": 0.25}),
    Progress("step", 2, 3, metrics={"loss": 2.0}),
    Progress("checkpoint", 2, 3),
    Progress("failure", text="worker 1 on node x: OSError: [/tmp/x] is full"),
    Progress("start", 2, 3),
    Progress("step", 3, 3, metrics={"loss": 1.5, "time/step_s": 0.5}),
    Progress("eval", 3, 3, metrics={"eval_loss": 1.25, "eval_runtime": 9.0}),
]


def shown(is_terminal: bool) -> str:
    file = StringIO()
    console = Console(file=file, force_terminal=is_terminal, width=100, color_system=None)
    with Display(console, "sft [a]") as display:
        for event in EVENTS:
            display.show(event)
    return file.getvalue()


def test_a_log_file_gets_lines_and_no_control_codes() -> None:
    output = shown(is_terminal=False)
    assert "\x1b" not in output
    assert "\r" not in output
    lines = [line for line in output.splitlines() if line.startswith("step")]
    assert lines == [
        "step 1/3  loss 2.5000  0.25 s",
        "step 3/3  loss 1.5000  0.50 s",  # step 2 came within 5 s of step 1
        "step 3  evaluation: loss 1.2500",
    ]
    assert "continues from step 2 of 3" in output


@pytest.mark.parametrize("is_terminal", [True, False])
def test_brackets_in_messages_are_shown_and_never_read_as_markup(is_terminal: bool) -> None:
    output = shown(is_terminal)
    for text in ("sft [a]", "runs/[a]", "was [a, b], now 3", "OSError: [/tmp/x] is full"):
        assert text in output


def test_a_terminal_gets_a_bar() -> None:
    output = shown(is_terminal=True)
    assert "\x1b[" in output
    assert "3/3" in output
    assert "step 1/3" not in output


def test_the_summary_shows_losses_and_places() -> None:
    file = StringIO()
    outcome = Trained("runs/[a]", False, "runs/[a]/model", {"loss": 1.5, "eval_loss": 1.25, "epoch": 3.0})
    Console(file=file, width=100).print(summary(outcome, "runs/[a]/report.html"))
    rows = dict(line.split() for line in file.getvalue().splitlines())
    assert rows == {
        "loss": "1.5000",
        "eval_loss": "1.2500",
        "model": "runs/[a]/model",
        "metrics": "runs/[a]/metrics.jsonl",
        "report": "runs/[a]/report.html",
    }
