"""A plan on the terminal: roles, what a step is, memory by what it is for."""

from collections.abc import Sequence

from rich.console import Group
from rich.markup import escape
from rich.panel import Panel
from rich.table import Table

from raytrl.records.plan import Plan, PlannedRole

_MANY = 4


def plan_view(plan: Plan) -> Group:
    """The tables and sentences of a plan."""
    return Group(f"[bold]where[/]  {escape(plan.where)}", "", _roles(plan), "", _memory(plan), "", _words(plan))


def _roles(plan: Plan) -> Table:
    table = Table(box=None, pad_edge=False, header_style="bold")
    for name in ("role", "processes", "each", "nodes"):
        table.add_column(name, overflow="fold")
    for role in plan.roles:
        table.add_row(role.key, str(role.count), role.each, escape(_places(role)))
    return table


def _places(role: PlannedRole) -> str:
    places = [f"{name}: {count}" for name, count in role.nodes.items()]
    if len(places) <= _MANY:
        return ", ".join(places)
    return f"{', '.join(places[:_MANY])}, and {len(places) - _MANY} more nodes"


def _memory(plan: Plan) -> Table:
    table = Table(box=None, pad_edge=False, header_style="bold")
    for name in ("memory, GiB", "each", "there", "of it"):
        table.add_column(name, overflow="fold", justify="right" if name in ("each", "there") else "left")
    for role in plan.roles:
        if not role.memory_gib:
            table.add_row(role.key, "not known", "", "")
            continue
        parts = [f"{name} {size:.2f}" for name, size in role.memory_gib.items() if size >= 0.005]
        there = "?" if role.room_gib is None else f"{role.room_gib:.1f}"
        beside = f"; + {role.host_gib:.1f} GiB RAM" if role.host_gib else ""  # a GPU's process, and what is offloaded
        words = ", ".join(parts) + beside
        table.add_row(f"{role.key} ({role.device})", f"{sum(role.memory_gib.values()):.2f}", there, words)
    first = next((what for what, _, _ in plan.shared if what.startswith("RAM of ")), None)
    for what, taken, size in plan.shared[: 2 * _MANY]:
        whose = "all processes, the driver and Ray" if what == first else "all processes"
        table.add_row(escape(what), f"{taken:.2f}", "?" if size is None else f"{size:.1f}", whose)
    if len(plan.shared) > 2 * _MANY:
        table.add_row("and so on for the other nodes", "", "", "")
    return table


def pairs_table(words: Sequence[tuple[str, str]]) -> Table:
    """Subjects, and beside them their sentences."""
    table = Table(show_header=False, box=None, padding=(0, 2, 0, 0), pad_edge=False)
    table.add_column(no_wrap=True)
    table.add_column(overflow="fold")
    for subject, sentence in words:
        table.add_row(escape(subject), escape(sentence))
    return table


def start_panel(words: Sequence[tuple[str, str]], title: str) -> Panel:
    """What is about to start."""
    return Panel(pairs_table(words), title=escape(title), title_align="left", expand=False)


def _words(plan: Plan) -> Table:
    table = pairs_table(plan.words)
    for note in plan.notes:
        table.add_row("[yellow]note[/]", escape(note))
    return table
