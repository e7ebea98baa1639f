"""Benchmarks as tables: on the terminal, and as cells for the report page."""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from rich.markup import escape
from rich.table import Table

Head = Sequence[str]
Cells = Sequence[Sequence[str]]


def measured_tables(results: Mapping[str, Any]) -> Iterator[Table]:
    """What each model reached, and one against the other."""
    for title, head, cells in measured_cells(results):
        yield as_table(title, head, cells)


def measured_cells(results: Mapping[str, Any]) -> Iterator[tuple[str, Head, Cells]]:
    """(title, head, rows) of each table of benchmarks or pairs; none of other results."""
    if "benchmarks" in results:
        yield from _benchmark_cells(results)
    if "pairs" in results:
        yield from _pair_cells(results)


def as_table(title: str, head: Head, cells: Cells) -> Table:
    """For the terminal; numbers stand to the right."""
    table = Table(
        box=None, pad_edge=False, padding=(0, 2, 0, 0), header_style="bold", title=title, title_justify="left"
    )
    for number, name in enumerate(head):
        table.add_column(escape(name), justify="left" if number < 2 else "right", overflow="fold")
    for row in cells:
        table.add_row(*map(escape, row))
    return table


def _benchmark_cells(results: Mapping[str, Any]) -> Iterator[tuple[str, Head, Cells]]:
    rows, keys = results["benchmarks"], [key for key in ("model", "compare") if key in results]
    by_place: dict[tuple[str, str, str], dict[str, Mapping[str, Any]]] = {}
    for row in rows:
        by_place.setdefault((row["task"], row["metric"], row["filter"]), {})[row["model"]] = row
    cells = []
    for (task, metric, filtered), found in by_place.items():
        first = next(iter(found.values()))
        values = [_value(found.get(key)) for key in keys]
        cells.append([task, _metric(metric, filtered), *values, _documents(first), f"{first['fewshot'] or 0}"])
    how = "; ".join(f"{key}: {_how(results[key])}" for key in keys)
    yield how, ["task", "metric", *(f"{key}: {results[key]['path']}" for key in keys), "documents", "few-shot"], cells
    if compared := results.get("comparison"):
        head = ["task", "metric", "model − compare", "better, worse", "documents", "p", "by"]
        yield "model against compare, document by document", head, [_compared(row) for row in compared]


def _pair_cells(results: Mapping[str, Any]) -> Iterator[tuple[str, Head, Cells]]:
    left_out = any(row["too_long"] or row["unscored"] for row in results["pairs"])
    apart = ["too long", "without score"] if left_out else []
    for key in [key for key in ("model", "compare") if key in results]:
        cells = []
        for row in [row for row in results["pairs"] if row["model"] == key]:
            counts = f"{row['right']:,}, {row['ties']:,}, {row['wrong']:,}"
            margin = "-" if row["margin"] is None else f"{row['margin']:+.3f}"
            lost = [f"{row['too_long']:,}", f"{row['unscored']:,}"] if left_out else []
            pairs = f"{row['n']:,}" + ("" if row["limit"] is None else " (limit)")
            cells.append([_category(row), _with_error(row["accuracy"], row["stderr"]), counts, margin, pairs, *lost])
            if row.get("macro") is not None:
                empty = [""] * (3 + len(lost))
                cells.append(["mean of the categories", _with_error(row["macro"], row["macro_stderr"]), *empty])
        head = ["category", "accuracy, a tie half", "right, ties, wrong", "mean margin", "pairs", *apart]
        yield f"{key}: {results[key]['path']}", head, cells
    if compared := results.get("comparison"):
        rows = [
            [
                _category(row),
                _signed(row["difference"], row["stderr"]),
                f"{row['higher']:,}, {row['lower']:,}",
                f"{row['n']:,}",
                "-" if row["p"] is None else shown_p(row["p"]),
                row["test"] or "-",
            ]
            for row in compared
        ]
        head = ["category", "model − compare", "better, worse", "pairs of both", "p", "by"]
        yield "model against compare, pair by pair", head, rows


def _category(row: Mapping[str, Any]) -> str:
    return "all pairs" if row["category"] is None else str(row["category"])


def _with_error(value: float | None, error: float | None) -> str:
    if value is None:
        return "-"
    return f"{value:.4f}" + ("" if error is None else f" ± {error:.4f}")


def _signed(value: float | None, error: float | None) -> str:
    return "-" if value is None else f"{value:+.4f}" + ("" if error is None else f" ± {error:.4f}")


def _metric(metric: str, filtered: str) -> str:
    return metric if filtered == "none" else f"{metric}, {filtered}"


def _value(row: Mapping[str, Any] | None) -> str:
    if row is None:
        return "-"
    return "not a number" if row["value"] is None else _with_error(row["value"], row["stderr"])


def _documents(row: Mapping[str, Any]) -> str:
    """How many, and of how many where there was a limit."""
    if row["limit"] is None:
        return f"{row['n']:,}"
    return f"{row['n']:,} of {row['of']:,} (limit)" if row["of"] else f"{row['n']:,} (limit {row['limit']:,})"


def _how(model: Mapping[str, Any]) -> str:
    chat = "chat template" if model["chat"] else "no chat template"
    cut = f", {model['cut']} requests cut" if model["cut"] else ""
    return f"{model['engine']}, {model['dtype']}, {chat}{cut}"


def _compared(row: Mapping[str, Any]) -> list[str]:
    difference = _signed(row["difference"], row["stderr"])
    counts = "-" if row["better"] is None else f"{row['better']}, {row['worse']}"
    documents = f"{row['n']:,}" + (" (limit)" if row["limit"] is not None else "")
    p = "-" if row["p"] is None else shown_p(row["p"])
    return [row["task"], _metric(row["metric"], row["filter"]), difference, counts, documents, p, row["test"] or "-"]


def shown_p(p: float) -> str:
    """Three decimals; what is smaller than can be shown so is not shown as 0."""
    return f"{p:.3f}" if p >= 0.001 else f"{p:.1e}"
