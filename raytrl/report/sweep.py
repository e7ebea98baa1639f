"""A sweep on the terminal: a live table of its trials, and the closing one."""

from collections.abc import Sequence
from typing import Any, assert_never

from rich.console import Console
from rich.live import Live
from rich.markup import escape
from rich.table import Table
from rich.text import Text

from raytrl.config.trials import short_name
from raytrl.records.outcome import Swept
from raytrl.records.progress import Progress
from raytrl.records.sweep import Trial
from raytrl.report.plan import start_panel

_STYLES = {"done": "green", "running": "cyan", "failed": "red", "over limit": "yellow", "stopped": "yellow"}


class SweepDisplay:
    """Shows what the driver of a sweep passes to it; use as a context manager around the sweep."""

    def __init__(self, console: Console, title: str, columns: Sequence[str]) -> None:
        """`columns`: the metrics to show."""
        self._console, self._title, self._columns = console, title, columns
        self._live = Live(console=console, transient=True, auto_refresh=False)
        self._told: dict[str, str] = {}

    def __enter__(self) -> "SweepDisplay":
        if self._console.is_terminal:
            self._live.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self._console.is_terminal:
            self._live.stop()

    def show(self, event: Progress) -> None:
        """Renders the plan, a notice or a failure."""
        match event.kind:
            case "plan":
                self._console.print(start_panel(event.words, self._title))
            case "notice":
                self._console.print(f"[yellow]note:[/] {escape(event.text)}", highlight=False)
            case "failure":
                self._console.print(f"[yellow]failed:[/] {escape(event.text)}", highlight=False, soft_wrap=True)
            case "phase" | "start" | "step" | "eval" | "checkpoint" | "beat" | "earlier":
                pass  # of one trial; the table shows them
            case _:
                assert_never(event.kind)

    def show_trials(self, trials: Sequence[Trial]) -> None:
        """Draws the table anew; where there is no terminal, a line for each change of a trial's state."""
        if self._console.is_terminal:
            self._live.update(trials_table(trials, self._columns), refresh=True)
            return
        for trial in trials:
            if trial.state != self._told.get(trial.name, "waiting"):
                self._told[trial.name] = trial.state
                self._console.print(escape(_line(trial, self._columns)), highlight=False, soft_wrap=True)


def _line(trial: Trial, columns: Sequence[str]) -> str:
    found = [f"{name} {trial.metrics[name]:.4g}" for name in columns if name in trial.metrics]
    words = [f"{trial.name}: {trial.state}", *([f"step {trial.step}"] if trial.step else []), *found]
    if trial.is_ended:
        words.append(f"{trial.seconds:.0f} s")
    return "  ".join(words)


def trials_table(trials: Sequence[Trial], columns: Sequence[str], best: str = "") -> Table:
    """A row a trial: values, state, metrics, seconds. The best one stands out."""
    table = Table(box=None, pad_edge=False, header_style="bold")
    keys = list(trials[0].values) if trials else []
    columns = [name for name in columns if any(name in trial.metrics for trial in trials)]
    for name in ("", *(short_name(key, keys) for key in keys), "state", "step", *columns, "time"):
        table.add_column(name, justify="left" if name in ("", "state") else "right", no_wrap=True)
    for number, trial in enumerate(trials, 1):
        mark = "*" if trial.name == best else ""
        values = [_shown(trial.values[key]) for key in keys]
        metrics = [f"{trial.metrics[name]:.4f}" if name in trial.metrics else "" for name in columns]
        state = Text(trial.state, style=_STYLES.get(trial.state, "dim"))
        time = f"{trial.seconds:.0f} s" if trial.is_ended else ""
        step = str(trial.step) if trial.step else ""
        table.add_row(f"{number}{mark}", *values, state, step, *metrics, time, style="bold" if mark else "")
    return table


def _shown(value: Any) -> str:
    return f"{value:.3g}" if isinstance(value, float) else escape(str(value))


def sweep_summary(outcome: Swept, curves: bool) -> Table:
    """Where the results of a finished sweep are; `curves`: its trials write to TensorBoard."""
    table = Table(show_header=False, box=None, padding=(0, 2, 0, 0))
    place = outcome.place
    rows = {
        "best": outcome.best,
        "model": outcome.model,
        "run file": f"{place}/best.yaml",
        "all trials": f"{place}/results.csv",
        "pictures": f"{place}/report.html",
    }
    if curves:
        rows["curves"] = f"tensorboard --logdir {place}/trials"
    for name, text in rows.items():
        table.add_row(name, escape(text))
    return table
