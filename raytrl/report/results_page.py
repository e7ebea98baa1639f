"""What was measured, on the report page: a picture, and tables below it."""

import html
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from raytrl.report.page import as_svg, as_text, panels, table
from raytrl.report.results import category_of, metric_of, models_of, sections

Rows = Sequence[Mapping[str, Any]]

_INTERVAL = 1.96  # standard errors: 95 % of a normal distribution
_BINS = 24
_ALIKE = 1e-30  # scores that differ by less
_SIDE_BY_SIDE = 12  # rows of a picture; of those with more there is one below the other


def results_parts(results: Mapping[str, Any], samples: Rows) -> Iterator[str]:
    """Pieces of HTML.

    Args:
        results: what results.json holds; of runs that measure nothing, {}.
        samples: rows of samples.jsonl.
    """
    found = list(sections(results))
    if not found:
        return
    if "benchmarks" in results:
        picture = _intervals(results["benchmarks"], lambda row: metric_of(row["metric"], row["filter"]), "value")
    elif "pairs" in results:
        picture = _intervals(results["pairs"], lambda _: "accuracy", "accuracy")
    else:
        picture = _histograms(samples, models_of(results))
    if picture is not None:
        yield f"<figure>{picture}</figure>"
    for section in found:
        note = f"<p class=quiet>{html.escape(section.note)}</p>" if section.note else ""
        yield f"<h2>{html.escape(section.title)}</h2>{note}{table(section.head, section.cells, words=section.words)}"


def _intervals(rows: Rows, metric_of_row: Callable[[Mapping[str, Any]], str], key: str) -> str | None:
    """A picture a metric: each task's or category's value, model by model, with the interval that its own error gives."""
    by_metric: dict[str, list[Mapping[str, Any]]] = {}
    for row in rows:
        if row[key] is not None:
            by_metric.setdefault(metric_of_row(row), []).append(row)
    if not by_metric:
        return None
    names = {metric: list(dict.fromkeys(map(_place, found))) for metric, found in by_metric.items()}
    models = list(dict.fromkeys(row["model"] for row in rows))
    many = max(map(len, names.values())) > _SIDE_BY_SIDE
    heights = [0.9 + 0.12 * len(each) * (1 + len(models)) for each in names.values()]
    columns = 1 if many else min(3, len(names))
    tallest = heights if many else [max(heights)] * -(-len(names) // columns)
    figure, axes = panels(len(names), columns=columns, heights=tallest)
    for each, (metric, found) in zip(axes, by_metric.items(), strict=True):
        places = {name: place for place, name in enumerate(reversed(names[metric]))}
        for nth, model in enumerate(models):
            shift = 0.0 if len(models) == 1 else 0.18 - 0.36 * nth
            for has_error in (True, False):
                mine = [row for row in found if row["model"] == model and (row["stderr"] is not None) == has_error]
                each.errorbar(
                    [row[key] for row in mine],
                    [places[_place(row)] + shift for row in mine],
                    xerr=[_INTERVAL * row["stderr"] for row in mine] if has_error else None,
                    fmt="o",
                    color=f"C{nth}",
                    mfc=None if has_error else "white",  # how sure it is, is not known
                    ms=4,
                    lw=1.4,
                    label=model if has_error else None,
                )
        each.set_yticks(list(places.values()), list(map(as_text, places)))
        each.set_ylim(-0.6, len(places) - 0.4)
        each.set_title(as_text(f"{metric}, 95 % of each model by itself"), fontsize=10)
        each.tick_params(labelsize=8)
    _name(figure, axes[0], models)
    return as_svg(figure)


def _place(row: Mapping[str, Any]) -> str:
    return str(row["task"]) if "task" in row else category_of(row)


def _histograms(samples: Rows, models: Sequence[str]) -> str | None:
    """A picture a source: how each model's responses were scored."""
    names = list(dict.fromkeys(name for row in samples for name in row["scores"]))
    found: dict[str, list[list[float]]] = {}
    for name in names:
        scores = [
            [row["scores"][name] for row in samples if row["model"] == model and row["scores"].get(name) is not None]
            for model in models
        ]
        if any(scores):
            found[name] = scores
    if not found:
        return None
    figure, axes = panels(len(found))
    for each, (name, scores) in zip(axes, found.items(), strict=True):
        both = [value for one in scores for value in one]
        low, high = min(both), max(both)
        if high - low <= 1e-6 * max(map(abs, both)) or high - low < _ALIKE:  # but for their last bits
            low, high = low - max(1.0, abs(low)), high + max(1.0, abs(high))
        for model, one in zip(models, scores, strict=True):
            each.hist(one, bins=_BINS, range=(low, high), alpha=0.5, label=model)
        each.set_title(as_text(f"responses by their score, {name}"), fontsize=10)
        each.tick_params(labelsize=8)
    _name(figure, axes[0], models)
    return as_svg(figure)


def _name(figure: Any, axes: Any, models: Sequence[str]) -> None:
    """Says once, above all pictures, which colour is whose."""
    if len(models) > 1:
        figure.legend(*axes.get_legend_handles_labels(), fontsize=8, frameon=False, ncols=2, loc="outside upper center")
