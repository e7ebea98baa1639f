"""A run file's values on the terminal: where each comes from, and what it means."""

import json
from collections.abc import Iterator

from rich.console import Group, RenderableType
from rich.markup import escape
from rich.padding import Padding
from rich.table import Table

from raytrl.config.describe import meaning
from raytrl.config.load import LoadedRun


def values_table(loaded: LoadedRun) -> Table:
    """Key, value and origin, a row each."""
    table = Table(box=None, pad_edge=False, header_style="bold")
    for name in ("key", "value", "origin"):
        table.add_column(name, overflow="fold")
    for key, value, origin in loaded.values():
        style = "dim" if origin == "default" else ""
        table.add_row(escape(key), escape(_shown(value)), escape(origin), style=style)
    return table


def described_values(loaded: LoadedRun, one_line: bool) -> Iterator[RenderableType]:
    """Each value with its meaning below it; `one_line`: behind it, so that grep sees all of a key."""
    for key, value, origin in loaded.values():
        text = escape(meaning(type(loaded.run), key))
        line = f"[bold]{escape(key)}[/] = {escape(_shown(value))}  [dim]{escape(origin)}[/]"
        yield f"{line}  {text}" if one_line else Group(line, Padding(f"[dim]{text}[/]", (0, 0, 0, 4)))


def _shown(value: object) -> str:
    return json.dumps(value, ensure_ascii=False)
