"""A run on the terminal: the plan, a bar with loss and time left (or a line a step where there is no terminal)."""

import time
from collections.abc import Mapping
from typing import Any, assert_never

from rich.console import Console
from rich.markup import escape
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    SpinnerColumn,
    TaskID,
    TextColumn,
    TimeRemainingColumn,
)
from rich.table import Table

from raytrl.records.metrics import (
    ALL_PHASES,
    CLIPPED,
    DROPPED,
    ENTROPY,
    EQUAL,
    ESS,
    EVAL_ACCURACY,
    EVAL_LOSS,
    EVAL_SCORE,
    KL,
    LENGTH,
    LOSS,
    SCORE,
    STEP_S,
    time_of,
)
from raytrl.records.outcome import Trained
from raytrl.records.progress import Progress as Event
from raytrl.report.plan import start_panel

# Of the closing table.
CLOSING = (
    *(LOSS, EVAL_LOSS, EVAL_ACCURACY, "eval_mean_token_accuracy", "eval_margin"),
    *(SCORE, KL, LENGTH, EVAL_SCORE),
)


class Display:
    """Shows what the driver passes to it; use as a context manager around the run."""

    def __init__(self, console: Console, title: str) -> None:
        self._console, self._title = console, title
        self._bar = Progress(
            SpinnerColumn(),
            TextColumn("{task.description}"),
            BarColumn(bar_width=30),
            MofNCompleteColumn(),
            TextColumn("{task.fields[loss]}"),
            TimeRemainingColumn(compact=True),
            console=console,
            transient=True,
        )
        self._task: TaskID | None = None
        self._first_step = 0
        self._line_due = 0.0

    def __enter__(self) -> "Display":
        if self._console.is_terminal:
            self._bar.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self._console.is_terminal:
            self._bar.stop()

    def show(self, event: Event) -> None:
        """Renders one piece of progress."""
        match event.kind:
            case "plan":
                self._on_plan(event)
            case "notice":
                self._on_notice(event)
            case "phase":
                self._describe(escape(event.text), total=event.total_steps or None, completed=event.step)
            case "start":
                self._on_start(event)
            case "step":
                self._on_step(event)
            case "eval":
                self._on_eval(event)
            case "failure":
                self._on_failure(event)
            case "checkpoint" | "beat" | "earlier":
                pass
            case _:
                assert_never(event.kind)

    def _on_plan(self, event: Event) -> None:
        self._console.print(start_panel(event.words, self._title))

    def _on_notice(self, event: Event) -> None:
        self._console.print(f"[yellow]note:[/] {escape(event.text)}", highlight=False)

    def _describe(self, text: str, **values: Any) -> None:
        if not self._console.is_terminal:
            return
        if self._task is None:
            self._task = self._bar.add_task(text, total=None, loss="")
        self._bar.update(self._task, description=text, **values)

    def _on_start(self, event: Event) -> None:
        if event.step:
            self._console.print(f"continues from step {event.step} of {event.total_steps}", highlight=False)
        self._first_step = event.step
        if self._task is not None:  # time left is worked out from this attempt's steps alone
            self._bar.remove_task(self._task)
            self._task = None
        self._describe("training", total=event.total_steps, completed=event.step)

    def _on_step(self, event: Event) -> None:
        is_ppo = SCORE in event.metrics
        text = _ppo_text(event.metrics) if is_ppo else f"loss {event.metrics[LOSS]:.4f}"
        self._describe("training", completed=event.step, loss=text)
        # A log file wants a sign of life, not every step; PPO's take so long, and tell so much, that each has a line.
        due = is_ppo or time.monotonic() >= self._line_due or event.step == event.total_steps
        if not self._console.is_terminal and due:
            self._line_due = time.monotonic() + 5
            spent = _ppo_seconds(event.metrics) if is_ppo else f"{event.metrics.get(STEP_S, 0.0):.2f} s"
            self._console.print(
                f"step {event.step}/{event.total_steps}  {text}  {spent}", highlight=False, soft_wrap=True
            )

    def _on_eval(self, event: Event) -> None:
        shown = {k.removeprefix("eval_"): v for k, v in event.metrics.items() if k in (EVAL_LOSS, EVAL_ACCURACY)}
        text = "  ".join(f"{name} {value:.4f}" for name, value in shown.items())
        self._console.print(f"step {event.step}  evaluation: {text}", highlight=False)

    def _on_failure(self, event: Event) -> None:
        self._console.print(f"[yellow]failed:[/] {escape(event.text)}", highlight=False)


def _ppo_text(metrics: Mapping[str, float]) -> str:
    parts = [
        f"score {metrics[SCORE]:.3f}",
        *([f"KL {metrics[KL]:.3f}"] if KL in metrics else []),
        *([f"equal groups {metrics[EQUAL]:.0%}"] if EQUAL in metrics else []),
        f"entropy {metrics[ENTROPY]:.2f}",
        f"length {metrics[LENGTH]:.1f}",
        f"clipped {metrics[CLIPPED]:.0%}",
    ]
    if ESS in metrics:
        parts.append(f"effective size {metrics[ESS]:.0%}")
    if EVAL_SCORE in metrics:
        parts.append(f"evaluation {metrics[EVAL_SCORE]:.3f}")
    if dropped := metrics.get(DROPPED):
        parts.append(f"dropped {dropped:g}")
    return "  ".join(parts)


def _ppo_seconds(metrics: Mapping[str, float]) -> str:
    phases = [(name, metrics[time_of(name)]) for name in ALL_PHASES if metrics.get(time_of(name), 0.0) >= 0.005]
    split = " ".join(f"{name} {seconds:.2f}" for name, seconds in phases)
    return f"{metrics[STEP_S]:.2f} s ({split})"


def summary(outcome: Trained, page: str) -> Table:
    """The closing table of a finished run, whose report is at `page`."""
    table = Table(show_header=False, box=None, padding=(0, 2, 0, 0))
    for key, value in outcome.metrics.items():
        if key in CLOSING:
            table.add_row(key, f"{value:.4f}")
    table.add_row("model", escape(outcome.model))
    table.add_row("metrics", escape(f"{outcome.place}/metrics.jsonl"))
    table.add_row("report", escape(page))
    return table
