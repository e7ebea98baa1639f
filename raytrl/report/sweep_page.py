"""report.html of a sweep: pictures of all trials and their table, one self-contained page."""

import html
from collections.abc import Mapping, Sequence
from typing import Any

from raytrl.config.runs.sweep import TuneRun
from raytrl.config.trials import short_name
from raytrl.records.metrics import KL
from raytrl.records.sweep import Trial
from raytrl.report.page import as_svg, page, panels, table
from raytrl.rundir import RunDirectory

_COLOURS = {"done": "#2a6f97", "over limit": "#e09f3e", "stopped": "#9a9a9a", "failed": "#b23a48"}


def write_sweep_page(run: TuneRun, trials: Sequence[Trial], best: str, run_dir: RunDirectory) -> None:
    """Writes report.html into the sweep's directory."""
    folder = f"{run.name}/trials"
    curves = {}
    for trial in trials:
        rows = RunDirectory(run.output_dir, f"{folder}/{trial.name}").metrics()
        curves[trial.name] = [(row["step"], row[run.metric]) for row in rows if run.metric in row]
    run_dir.write("report.html", sweep_page(run, trials, best, curves))


def sweep_page(
    run: TuneRun, trials: Sequence[Trial], best: str, curves: Mapping[str, Sequence[tuple[int, float]]]
) -> str:
    """The page.

    Args:
        best: name of the winner.
        curves: trial → (step, metric), as often as it was logged.
    """
    pictures = [
        ("Learning curves", _curves(run, trials, best, curves)),
        (
            f"{run.metric} against KL: {'up' if run.mode == 'max' else 'down'} and left is better",
            _frontier(run, trials, best),
        ),
        (f"{run.metric} by the searched values", _by_values(run, trials, best)),
    ]
    words = (
        f"<p>Best: <b>{html.escape(best)}</b> by {run.mode} {html.escape(run.metric)} of {len(trials)} trials of "
        f"{html.escape(run.base)}.</p>"
    )
    figures = [f"<figure><h2>{html.escape(name)}</h2>{svg}</figure>" for name, svg in pictures if svg]
    return page(f"Sweep {run.name}", [words, *figures, "<h2>Trials</h2>", _table(trials, best)])


def _table(trials: Sequence[Trial], best: str) -> str:
    keys = list(trials[0].values)
    names = list(dict.fromkeys(name for trial in trials for name in trial.metrics))
    head = ["trial", *(short_name(key, keys) for key in keys), "state", "step", *names, "seconds", "why"]
    rows = [
        [
            trial.name,
            *(trial.values[key] for key in keys),
            trial.state,
            trial.step,
            *(trial.metrics.get(name, "") for name in names),
            round(trial.seconds, 1),
            trial.cause,
        ]
        for trial in trials
    ]
    return table(head, rows, words=1, best=[trial.name for trial in trials].index(best))


def _figure(height: float) -> tuple[Any, Any]:
    figure, (axes,) = panels(1)
    figure.set_size_inches(9, height)
    return figure, axes


def _curves(run: TuneRun, trials: Sequence[Trial], best: str, curves: Mapping[str, Sequence[tuple[int, float]]]) -> str:
    drawn = [trial for trial in trials if curves.get(trial.name)]
    if not drawn:
        return ""
    figure, axes = _figure(4.5)
    for trial in sorted(drawn, key=lambda trial: trial.name == best):
        steps, values = zip(*curves[trial.name], strict=True)
        is_best = trial.name == best
        axes.plot(
            steps,
            values,
            color="#2d8a4e" if is_best else _COLOURS.get(trial.state, "#9a9a9a"),
            lw=2.4 if is_best else 1,
            alpha=1 if is_best else 0.6,
            marker="o" if len(steps) < 12 else None,
            label=f"{trial.name} (best)" if is_best else None,
        )
    named: list[tuple[int, float]] = []  # ends that have a number; another on top of it could not be read
    (left, right), (bottom, top) = axes.get_xlim(), axes.get_ylim()
    for trial in sorted(drawn, key=lambda trial: trial.name != best):
        step, value = curves[trial.name][-1]
        if all(abs(step - x) > 0.03 * (right - left) or abs(value - y) > 0.04 * (top - bottom) for x, y in named):
            number = trial.name.partition("-")[0]
            axes.annotate(number, (step, value), xytext=(4, -3), textcoords="offset points", fontsize=8)
            named.append((step, value))
    axes.set(xlabel="step", ylabel=run.metric)
    axes.legend(fontsize=8, frameon=False)
    return as_svg(figure)


def _frontier(run: TuneRun, trials: Sequence[Trial], best: str) -> str:
    """Metric against KL, and the frontier: trials that no other beats in both."""
    points = [trial for trial in trials if KL in trial.metrics and run.metric in trial.metrics]
    if not points or run.metric == KL:
        return ""
    figure, axes = _figure(5)
    for state in dict.fromkeys(trial.state for trial in points):
        these = [trial for trial in points if trial.state == state]
        axes.scatter(
            [trial.metrics[KL] for trial in these],
            [trial.metrics[run.metric] for trial in these],
            color=_COLOURS.get(state, "#9a9a9a"),
            label=state,
            zorder=3,
        )
    front = frontier([(t.metrics[KL], t.metrics[run.metric]) for t in points if t.state == "done"], run.mode)
    axes.plot(*zip(*front, strict=True), color="#2a6f97", lw=1, ls="--", label="frontier") if front else None
    for trial in points:
        where = (trial.metrics[KL], trial.metrics[run.metric])
        number = trial.name.partition("-")[0]
        axes.annotate(number, where, xytext=(5, 4), textcoords="offset points", fontsize=8)
        if trial.name == best:
            axes.scatter(*where, s=160, facecolors="none", edgecolors="#2d8a4e", linewidths=2, label="best", zorder=4)
    if KL in run.limit:
        axes.axvline(run.limit[KL], color="#b23a48", lw=1, ls=":", label="limit")
    kls = [trial.metrics[KL] for trial in points]
    if min(kls) > 0 and max(kls) / min(kls) > 20:
        axes.set_xscale("log")
    axes.set(xlabel=f"{KL}, nats a response", ylabel=run.metric)
    axes.legend(fontsize=8, frameon=False)
    return as_svg(figure)


def frontier(points: Sequence[tuple[float, float]], mode: str) -> list[tuple[float, float]]:
    """The (KL, metric) points that no other point beats in both, by rising KL."""
    found: list[tuple[float, float]] = []
    sign = 1 if mode == "max" else -1
    for kl, value in sorted(points, key=lambda point: (point[0], -sign * point[1])):
        if not found or sign * value > sign * found[-1][1]:
            found.append((kl, value))
    return found


def _by_values(run: TuneRun, trials: Sequence[Trial], best: str) -> str:
    """The metric over the first two searched numbers: a heat map where they form a grid, else coloured points."""
    keys = [k for k in run.search if all(_is_number(trial.values[k]) for trial in trials)]
    keys = [k for k in keys if len({trial.values[k] for trial in trials}) > 1][:2]
    points = [trial for trial in trials if run.metric in trial.metrics]
    if not keys or not points:
        return ""
    figure, axes = _figure(5)
    names = [short_name(key, list(run.search)) for key in keys]
    if len(keys) == 1:
        for trial in points:
            where = (trial.values[keys[0]], trial.metrics[run.metric])
            axes.scatter(*where, color="#2d8a4e" if trial.name == best else _COLOURS.get(trial.state, "#9a9a9a"))
            text = "best" if trial.name == best else "" if trial.state == "done" else trial.state
            axes.annotate(text, where, xytext=(6, -3), textcoords="offset points", fontsize=8)
        axes.set(xlabel=names[0], ylabel=run.metric, xscale=_scale(run, keys[0]))
        return as_svg(figure)
    axes.set(xlabel=names[0], ylabel=names[1])
    columns, lines = (sorted({trial.values[key] for trial in points}) for key in keys)
    if len(columns) * len(lines) <= 2 * len(points):
        _heat_map(axes, run, points, best, keys, columns, lines)
        return as_svg(figure)
    drawn = axes.scatter(
        [t.values[keys[0]] for t in points],
        [t.values[keys[1]] for t in points],
        c=[t.metrics[run.metric] for t in points],
        s=[220 if t.name == best else 90 for t in points],
        edgecolors=["#2d8a4e" if t.name == best else "none" for t in points],
        linewidths=2,
    )
    for trial in points:
        where = tuple(trial.values[key] for key in keys)
        axes.annotate(f"{trial.metrics[run.metric]:.3g}", where, xytext=(8, 5), textcoords="offset points", fontsize=8)
    axes.set(xscale=_scale(run, keys[0]), yscale=_scale(run, keys[1]))
    figure.colorbar(drawn, label=run.metric)
    return as_svg(figure)


def _heat_map(
    axes: Any,
    run: TuneRun,
    points: Sequence[Trial],
    best: str,
    keys: Sequence[str],
    columns: Sequence[float],
    lines: Sequence[float],
) -> None:
    nan = float("nan")
    table = [[nan] * len(columns) for _ in lines]
    for trial in points:
        line, column = lines.index(trial.values[keys[1]]), columns.index(trial.values[keys[0]])
        table[line][column] = trial.metrics[run.metric]
        mark = {"done": "", "over limit": "\nover limit", "stopped": "\nstopped"}.get(trial.state, f"\n{trial.state}")
        weight = "bold" if trial.name == best else "normal"
        text = f"{trial.metrics[run.metric]:.3g}{' (best)' if trial.name == best else mark}"
        box = {"facecolor": "white", "alpha": 0.7, "edgecolor": "none", "pad": 2}
        axes.text(column, line, text, ha="center", va="center", fontsize=9, weight=weight, bbox=box)
    axes.grid(False)
    drawn = axes.imshow(table, aspect="auto", origin="lower")
    axes.set_xticks(range(len(columns)), [f"{value:.3g}" for value in columns])
    axes.set_yticks(range(len(lines)), [f"{value:.3g}" for value in lines])
    axes.figure.colorbar(drawn, label=run.metric)


def _scale(run: TuneRun, key: str) -> str:
    distribution = run.search[key]
    if "log" in distribution.name:
        return "log"
    values = [v for v in distribution.arguments if _is_number(v)]
    is_wide = distribution.name in ("choice", "grid") and min(values) > 0 and max(values) / min(values) > 20
    return "log" if is_wide else "linear"


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)
