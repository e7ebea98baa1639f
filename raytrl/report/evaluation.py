"""What `raytrl eval` shows: tables of what was measured, and a few responses side by side."""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from rich.markup import escape
from rich.table import Table

from raytrl.report.conversation import as_markup, text_of
from raytrl.report.results import number, sections


def evaluation_tables(results: Mapping[str, Any], samples: Sequence[Mapping[str, Any]]) -> Iterator[Table]:
    """Of an evaluation of whatever form, to be shown one below the other.

    Args:
        results: what results.json holds.
        samples: rows of samples.jsonl.
    """
    if samples and "scores" in samples[0]:
        yield samples_table(samples)
    for section in sections(results):
        yield section.for_terminal()


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
    scores = ", ".join(f"{name} {number(value)}" for name, value in row["scores"].items())
    said = as_markup(row["messages"]) if "messages" in row else escape(row["response"].strip())
    return f"{said}\n[dim]{escape(row.get('failure') or scores)}[/]"
