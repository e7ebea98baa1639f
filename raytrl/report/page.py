"""What every report page is made of: one self-contained HTML file, pictures in it as SVG."""

import html
import io
from collections.abc import Iterable, Sequence
from typing import Any

_STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; max-width: 1100px; margin: 2em auto; padding: 0 1em; color: #222; }
table { border-collapse: collapse; font-size: 13px; } td, th { padding: 3px 10px; text-align: left; vertical-align: top; }
tr { border-bottom: 1px solid #eee; } tr.best { background: #e3f1e5; font-weight: 600; }
td.number, th.number { text-align: right; }
figure { margin: 2em 0; } summary { cursor: pointer; margin: 1em 0; font-weight: 600; }
svg { max-width: 100%; height: auto; } .quiet { color: #888; }
.who { color: #888; display: inline-block; min-width: 5.5em; }
"""


def page(title: str, parts: Iterable[str]) -> str:
    """The whole file; `parts` are pieces of HTML."""
    return (
        f"<!doctype html><html lang='en'><meta charset='utf-8'><title>{html.escape(title)}</title>"
        f"<style>{_STYLE}</style><h1>{html.escape(title)}</h1>{''.join(parts)}</html>\n"
    )


def table(
    head: Sequence[str], rows: Iterable[Sequence[Any]], *, words: int | None = None, best: int | None = None
) -> str:
    """A table; `best` is the row to stand out; all columns but the first `words` are numbers, and stand to the right."""

    def cells(tag: str, row: Sequence[Any]) -> str:
        marks = ["" if words is None or number < words else " class=number" for number in range(len(row))]
        return "".join(
            f"<{tag}{mark}>{html.escape(shown(cell))}</{tag}>" for mark, cell in zip(marks, row, strict=True)
        )

    lines = [f"<tr>{cells('th', head)}</tr>"] if any(head) else []
    lines += [f"<tr{' class=best' if i == best else ''}>{cells('td', row)}</tr>" for i, row in enumerate(rows)]
    return f"<table>{''.join(lines)}</table>"


def shown(value: Any) -> str:
    """Four digits of a float, everything else as it is."""
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def panels(
    count: int, width: float = 11.0, columns: int = 3, heights: Sequence[float] | None = None
) -> tuple[Any, list[Any]]:
    """A matplotlib figure of small pictures in rows of `columns`, and its axes; `heights`: of the rows, in inches."""
    from matplotlib.figure import Figure  # without pyplot: no windows, no global state

    columns = min(columns, count)
    heights = heights or [2.6 if columns > 1 else 4.5] * -(-count // columns)
    figure = Figure(figsize=(width, sum(heights)), layout="constrained")
    grid = figure.add_gridspec(len(heights), columns, height_ratios=heights)
    axes = [figure.add_subplot(grid[i // columns, i % columns]) for i in range(count)]
    for each in axes:
        each.spines[["top", "right"]].set_visible(False)
        each.grid(alpha=0.25)
    return figure, axes


def as_text(text: str) -> str:
    """What a user wrote, for a picture: `$` begins no formula."""
    return text.replace("$", r"\$")


def as_svg(figure: Any) -> str:
    """The figure as an `<svg>` element; the same figure gives the same text."""
    import matplotlib

    text = io.StringIO()
    with matplotlib.rc_context({"svg.hashsalt": "raytrl", "svg.fonttype": "none"}):
        figure.savefig(text, format="svg", metadata={"Date": None})
    svg = text.getvalue()
    return svg[svg.index("<svg") :]
