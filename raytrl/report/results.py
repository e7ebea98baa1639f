"""What was measured, as tables: on the terminal, and as cells for the report page."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from rich.markup import escape
from rich.table import Table


@dataclass(frozen=True)
class Section:
    """A table and what stands around it."""

    title: str
    head: Sequence[str]
    cells: Sequence[Sequence[str]]
    words: int  # columns of words, which come first and stand to the left; numbers stand to the right
    note: str = ""

    def for_terminal(self) -> Table:
        title = escape(f"{self.title}; {self.note}" if self.note else self.title)
        table = Table(
            box=None, pad_edge=False, padding=(0, 2, 0, 0), header_style="bold", title=title, title_justify="left"
        )
        for number, name in enumerate(self.head):
            table.add_column(escape(name), justify="left" if number < self.words else "right", overflow="fold")
        for row in self.cells:
            table.add_row(*map(escape, row))
        return table


def sections(results: Mapping[str, Any]) -> Iterator[Section]:
    """Of results.json, whatever was measured: what each model reached, and one against the other."""
    if "benchmarks" in results:
        yield from _of_benchmarks(results)
    elif "pairs" in results:
        yield from _of_pairs(results)
    elif "model" in results:
        yield _of_scores(results)


def models_of(results: Mapping[str, Any]) -> list[str]:
    """Which of the two there are."""
    return [key for key in ("model", "compare") if key in results]


def _of_scores(results: Mapping[str, Any]) -> Section:
    """Means with their spread, a column a model."""
    keys = models_of(results)
    models = [results[key] for key in keys]
    names = list(dict.fromkeys(name for model in models for name in model["by_source"]))
    rows = []
    if len(names) > 1:
        rows.append(["score, weighted sum", *(_spread(model["score"]) for model in models)])
    rows += [[f"score, {name}", *(_spread(model["by_source"].get(name)) for model in models)] for name in names]
    rows.append(["tokens a response", *(_spread(model["response_tokens"]) for model in models)])
    rows.append(["ended by themselves", *(_share(model["end_token_share"]) for model in models)])
    if any(model["kl_mean"] is not None for model in models):
        rows.append(["KL to the reference, nats", *(number(model["kl_mean"]) for model in models)])
    rows.append(["responses", *(str(model["responses"]) for model in models)])
    if any(model["dropped"] for model in models):
        rows.append(["dropped, without score", *(str(model["dropped"]) for model in models)])
    if "comparison" in results:
        found = results["comparison"]
        rows.append(["win rate over compare", _share(found["win_rate"]), ""])
        counts = f"{found['wins']}, {found['ties']}, {found['losses']}"
        rows.append(["  wins, ties, losses", counts + _left_out(found), ""])
        if found.get("p") is not None:  # an evaluation of an earlier version has none, and no error
            rows.append(["  p, exact sign test", _p(found["p"]), ""])
        if found.get("margin_stderr") is not None:
            margin = f"{found['margin']['mean']:+.3f} ± {found['margin_stderr']:.3f}"
            rows.append(["score − compare's, ± its standard error", margin, ""])
    head = ["mean ± standard deviation", *(f"{key}: {results[key]['path']}" for key in keys)]
    return Section("Scores", head, rows, words=1)


def _of_benchmarks(results: Mapping[str, Any]) -> Iterator[Section]:
    rows, keys = results["benchmarks"], models_of(results)
    by_place: dict[tuple[str, str, str], dict[str, Mapping[str, Any]]] = {}
    for row in rows:
        by_place.setdefault((row["task"], row["metric"], row["filter"]), {})[row["model"]] = row
    cells = []
    for (task, metric, filtered), found in by_place.items():
        first = next(iter(found.values()))
        values = [_value(found.get(key)) for key in keys]
        cells.append([task, metric_of(metric, filtered), *values, _documents(first), f"{first['fewshot'] or 0}"])
    how = "; ".join(f"{key}: {_how(results[key])}" for key in keys)
    head = ["task", "metric", *(f"{key}: {results[key]['path']}" for key in keys), "documents", "few-shot"]
    yield Section("Benchmarks", head, cells, words=2, note=how)
    if compared := results.get("comparison"):
        head = ["task", "metric", "model − compare", "better, worse", "documents", "p", "by"]
        yield Section(
            "Model against compare, document by document", head, [_compared(row) for row in compared], words=2
        )


def _of_pairs(results: Mapping[str, Any]) -> Iterator[Section]:
    left_out = any(row["too_long"] or row["unscored"] for row in results["pairs"])
    apart = ["too long", "without score"] if left_out else []
    for key in models_of(results):
        cells = []
        for row in [row for row in results["pairs"] if row["model"] == key]:
            counts = f"{row['right']:,}, {row['ties']:,}, {row['wrong']:,}"
            margin = "-" if row["margin"] is None else f"{row['margin']:+.3f}"
            lost = [f"{row['too_long']:,}", f"{row['unscored']:,}"] if left_out else []
            pairs = _counted(row)
            cells.append([category_of(row), _with_error(row["accuracy"], row["stderr"]), counts, margin, pairs, *lost])
            if row.get("macro") is not None:
                mean = _with_error(row["macro"], row["macro_stderr"])
                cells.append(["mean of the categories", mean, "", "", pairs, *[""] * len(lost)])
        head = ["category", "accuracy, a tie half", "right, ties, wrong", "mean margin", "pairs", *apart]
        yield Section(f"{key}: {results[key]['path']}", head, cells, words=1, note=results[key].get("dtype", ""))
    if compared := results.get("comparison"):
        rows = [
            [
                category_of(row),
                _with_error(row["difference"], row["stderr"], "+"),
                f"{row['higher']:,}, {row['lower']:,}",
                _counted(row) + _left_out(row),
                _p(row["p"]),
                row["test"] or "-",
            ]
            for row in compared
        ]
        head = ["category", "model − compare", "better, worse", "pairs of both", "p", "by"]
        yield Section("Model against compare, pair by pair", head, rows, words=1)


def _counted(row: Mapping[str, Any]) -> str:
    """How many, and that there was a limit."""
    return f"{row['n']:,}" + ("" if row.get("limit") is None else " (limit)")


def _left_out(row: Mapping[str, Any]) -> str:
    """Of a comparison: how many one of the two has no number for."""
    return f" ({row['left_out']:,} left out)" if row["left_out"] else ""


def category_of(row: Mapping[str, Any]) -> str:
    """Its name, or that it is all of them."""
    return "all pairs" if row["category"] is None else str(row["category"])


def _with_error(value: float | None, error: float | None, sign: Literal["", "+"] = "") -> str:
    return "-" if value is None else f"{value:{sign}.4f}" + ("" if error is None else f" ± {error:.4f}")


def metric_of(metric: str, filtered: str) -> str:
    """Its name; lm-eval's filter only where there is one."""
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
    difference = _with_error(row["difference"], row["stderr"], "+")
    counts = "-" if row["better"] is None else f"{row['better']}, {row['worse']}"
    documents = _counted(row) + _left_out(row)
    metric, test = metric_of(row["metric"], row["filter"]), row["test"] or "-"
    return [row["task"], metric, difference, counts, documents, _p(row["p"]), test]


def _p(p: float | None) -> str:
    """Three decimals; what is smaller than can be shown so is not shown as 0."""
    return "-" if p is None else f"{p:.3f}" if p >= 0.001 else f"{p:.1e}"


def number(value: float | None) -> str:
    """Two decimals."""
    return "-" if value is None else f"{value:z.2f}"


def _spread(spread: Mapping[str, float] | None) -> str:
    return "-" if spread is None else f"{spread['mean']:z.3f} ± {spread['std']:z.3f}"


def _share(share: float | None) -> str:
    return "-" if share is None else f"{share:.1%}"
