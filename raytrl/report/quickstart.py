"""The closing tables of `raytrl quickstart`: what every stage changed."""

import json
import shlex
from collections.abc import Mapping, Sequence
from typing import Any

from rich.table import Table

from raytrl.records.metrics import EVAL_ACCURACY, EVAL_LOSS, KL, SCORE

Rows = Sequence[Mapping[str, Any]]

# Of each training stage: what is shown, its metric, and how.
_SHOWN = {
    "sft": [("loss on held-out reviews", EVAL_LOSS, "{:z.2f}")],
    "reward": [("right on held-out pairs", EVAL_ACCURACY, "{:.0%}")],
    "ppo": [
        ("learned reward, as it trains", SCORE, "{:z.2f}"),
        ("KL to the SFT model, nats", KL, "{:z.2f}"),
    ],
}


def stages_table(rows: Mapping[str, Rows], results: Mapping[str, Any], seconds: Mapping[str, float | None]) -> Table:
    """Before and after of each stage.

    Args:
        rows: training stage → its metrics.jsonl.
        results: the evaluation's results.json; `compare` is before, `model` after.
        seconds: stage → how long it took; None where it was finished before.
    """
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0), header_style="bold")
    table.add_column("stage")
    table.add_column("")
    for name in ("before", "after", "seconds"):
        table.add_column(name, justify="right")
    for stage, shown in _SHOWN.items():
        _add(table, stage, [(text, *_ends(rows[stage], key, form)) for text, key, form in shown], seconds[stage])
    before, after, found = results["compare"], results["model"], results["comparison"]
    lines = [
        (f"{name} reward, unseen prompts", f"{before['by_source'][name]['mean']:z.2f}", f"{spread['mean']:z.2f}")
        for name, spread in after["by_source"].items()
    ]
    lines.append(("KL to the SFT model, nats", f"{before['kl_mean']:z.2f}", f"{after['kl_mean']:z.2f}"))
    lines.append(("responses better than before", "", f"{found['win_rate']:.0%}"))
    _add(table, "eval", lines, seconds["eval"])
    return table


def _add(table: Table, stage: str, lines: Sequence[tuple[str, str, str]], seconds: float | None) -> None:
    for i, line in enumerate(lines):
        spent = "done before" if seconds is None else f"{seconds:.0f}"
        table.add_row(stage if i == 0 else "", *line, spent if i == 0 else "")


def _ends(rows: Rows, key: str, form: str) -> tuple[str, str]:
    """A metric when it was first and last taken."""
    values = [row[key] for row in rows if key in row]
    return (form.format(values[0]), form.format(values[-1])) if values else ("-", "-")


def how_to_serve(output_dir: str, prompt: str) -> str:
    """The commands that serve the model and ask it."""
    body = json.dumps({"model": "ppo", "prompt": prompt, "max_tokens": 24})
    return (
        f"serve it       raytrl serve {shlex.quote(f'{output_dir}/ppo')}\n"
        f"and ask it     curl http://127.0.0.1:8000/v1/completions -H 'Content-Type: application/json' -d {shlex.quote(body)}"
    )


def paths_table(output_dir: str) -> Table:
    """Where everything lies."""
    table = Table(show_header=False, box=None, padding=(0, 2, 0, 0))
    table.add_row("model", f"{output_dir}/ppo/model")
    table.add_row("SFT model", f"{output_dir}/sft/model")
    table.add_row("reward model", f"{output_dir}/reward/model")
    table.add_row("all responses", f"{output_dir}/eval/samples.jsonl")
    table.add_row("curves", f"{output_dir}/*/report.html")
    table.add_row("data", f"{output_dir}/data")
    table.add_row("run files", f"{output_dir}/*.yaml, yours to edit (then --fresh)")
    return table
