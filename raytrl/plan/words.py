"""A run in words: one text, for the panel of a run that starts and for `raytrl plan`."""

import statistics
from collections.abc import Mapping

from raytrl.config.runs.base import ModelUse, Run
from raytrl.plan.checks.common import Facts
from raytrl.plan.cluster import amounts
from raytrl.plan.config_shapes import ModelShape
from raytrl.plan.memory import microbatch_of
from raytrl.records.metrics import STEP_S
from raytrl.rundir import RunDirectory

Words = list[tuple[str, str]]


def words_of(run: Run, shapes: Mapping[str, ModelShape], facts: Facts) -> Words:
    """(subject, sentence) pairs.

    Args:
        shapes: of the models that are known, by key of the run file.
        facts: what is known of the datasets.
    """
    rows, columns = facts.rows, facts.columns
    words = [_model(use, shapes.get(use.key)) for use in run.models()]
    subjects = {
        "data.train": "data",
        "data.eval": "held out" if "data.train" in rows else "data",
        "pairs.data": "pairs",
    }
    words += [(subjects[key], facts.words.get(key) or f"{count:,} rows") for key, count in rows.items()]
    uses = {"data.train": "trains on", "data.eval": "evaluates on", "pairs.data": "compares"}
    words += [(uses[key], text) for key, text in columns.items() if key != "data.eval" or text not in _others(columns)]
    words += run.in_words(rows, microbatch_of(run, shapes))
    words += [*facts.tools, *facts.found]
    return words + _former(run, run.steps(rows))


def _others(columns: Mapping[str, str]) -> list[str]:
    return [text for key, text in columns.items() if key != "data.eval"]


def processes_of(run: Run, where: str) -> Words:
    """What it takes, and where."""
    words = []
    for each in run.processes():
        count = f"{each.count}" if each.count == each.most else f"{each.count} to {each.most}"
        words.append((each.key, f"{count} x {amounts(each.section.resources)}"))
    return [*words, ("where", where)]


def _model(use: ModelUse, shape: ModelShape | None) -> tuple[str, str]:
    subject = "model" if use.key == "model.path" else use.key
    if shape is None:
        return subject, use.path or "a new one"
    size = f"{shape.architecture}, {_millions(shape.parameters)} parameters, {shape.layers} layers"
    return subject, f"a new {size}" if use.path is None else f"{use.path}: {size}"


def _millions(count: int) -> str:
    return f"{count / 1e9:.2f} billion" if count >= 1e9 else f"{count / 1e6:.1f} million"


def _former(run: Run, steps: int | None) -> Words:
    """Seconds a step, from what the run directory holds of an earlier start."""
    rows = RunDirectory(run.output_dir, run.name).metrics()
    seconds = [float(row[STEP_S]) for row in rows if STEP_S in row]
    if not seconds:
        return []
    typical = statistics.median(seconds[-50:])
    whole = f"; {steps:,} steps: {_duration(typical * steps)}" if steps else ""
    return [("time", f"{typical:.2f} s a step, the median of the last {len(seconds[-50:])} of an earlier start{whole}")]


def _duration(seconds: float) -> str:
    if seconds < 120:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 7200 else f"{seconds / 3600:.1f} h"
