"""What `raytrl eval` shows: one table of all models, and a few responses side by side."""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from rich.markup import escape
from rich.table import Table

from raytrl.report.benchmark import measured_tables, shown_p
from raytrl.report.conversation import as_markup, text_of


def evaluation_tables(results: Mapping[str, Any], samples: Sequence[Mapping[str, Any]]) -> Iterator[Table]:
    """Of an evaluation of whatever form, to be shown one below the other.

    Args:
        results: what results.json holds.
        samples: rows of samples.jsonl.
    """
    if "scores" not in (samples[0] if samples else {}):
        yield from measured_tables(results)
    else:
        yield samples_table(samples)
        yield results_table(results)


def results_table(results: Mapping[str, Any]) -> Table:
    """Means with their spread, a column a model."""
    keys = [key for key in ("model", "compare") if key in results]
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0), header_style="bold")
    table.add_column("")
    for key in keys:
        table.add_column(f"{key}: {escape(results[key]['path'])}", justify="right", overflow="fold")
    models = [results[key] for key in keys]
    names = list(models[0]["by_source"])
    if len(names) > 1:
        table.add_row("score, weighted sum", *(_spread(model["score"]) for model in models))
    for name in names:
        table.add_row(f"score, {escape(name)}", *(_spread(model["by_source"][name]) for model in models))
    table.add_row("tokens a response", *(_spread(model["response_tokens"]) for model in models))
    table.add_row("ended by themselves", *(f"{model['end_token_share']:.1%}" for model in models))
    if any(model["kl_mean"] is not None for model in models):
        table.add_row("KL to the reference, nats", *(_number(model["kl_mean"]) for model in models))
    table.add_row("responses", *(str(model["responses"]) for model in models))
    if any(model["dropped"] for model in models):
        table.add_row("dropped, without score", *(str(model["dropped"]) for model in models))
    if "comparison" in results:
        found = results["comparison"]
        rate = "-" if found["win_rate"] is None else f"{found['win_rate']:.1%}"
        table.add_row("win rate over compare", rate, "")
        table.add_row("  wins, ties, losses", f"{found['wins']}, {found['ties']}, {found['losses']}", "")
        if found.get("p") is not None:  # an evaluation of an earlier version has none
            table.add_row("  p, exact sign test", shown_p(found["p"]), "")
    return table


def samples_table(
    samples: Sequence[Mapping[str, Any]], count: int = 3, titles: Mapping[str, str] | None = None
) -> Table:
    """The first prompts with each model's response and scores.

    Args:
        samples: rows of samples.jsonl.
        titles: model key → heading, in the order of the columns; default: the keys.
    """
    keys = titles or {key: key for key in dict.fromkeys(row["model"] for row in samples)}
    by_place = {(row["model"], row["row"]): row for row in samples}
    table = Table(show_lines=True, header_style="bold", expand=False)
    table.add_column("prompt", overflow="fold")
    for title in keys.values():
        table.add_column(title, overflow="fold")
    for row in sorted({row["row"] for row in samples})[:count]:
        first = by_place[next(iter(keys)), row]
        table.add_row(_prompt(first["prompt"]), *(_response(by_place[key, row]) for key in keys))
    return table


def _prompt(prompt: str | Sequence[Mapping[str, Any]]) -> str:
    return escape(prompt if isinstance(prompt, str) else text_of(prompt[-1]))


def _response(row: Mapping[str, Any]) -> str:
    scores = ", ".join(f"{name} {_number(value)}" for name, value in row["scores"].items())
    said = as_markup(row["messages"]) if "messages" in row else escape(row["response"].strip())
    return f"{said}\n[dim]{escape(row.get('failure') or scores)}[/]"


def _spread(spread: Mapping[str, float] | None) -> str:
    return "-" if spread is None else f"{spread['mean']:z.3f} ± {spread['std']:z.3f}"


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:z.2f}"
