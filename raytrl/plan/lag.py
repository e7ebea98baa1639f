"""What sampling ahead would bring, told from the phases of the run that is in the run directory."""

import statistics
from collections.abc import Mapping, Sequence
from typing import Any

from raytrl.config.runs.ppo import PpoRun
from raytrl.records.metrics import DRAIN, PHASES, STEP_S, time_of
from raytrl.rundir import RunDirectory

_LEARNING = tuple(phase for phase in PHASES if phase not in ("generate", "sync"))


def lag_note(run: PpoRun) -> str | None:
    """For people; None where the run directory tells nothing of it."""
    return of_phases(RunDirectory(run.output_dir, run.name).metrics(), run.ppo.max_lag)


def of_phases(metrics: Sequence[Mapping[str, Any]], max_lag: int) -> str | None:
    """
    Args:
        metrics: rows of metrics.jsonl; the first step, in which everything is warmed up, does not count.
        max_lag: the one that is planned.
    """
    rows = [row for row in metrics[1:] if time_of("generate") in row][-50:]
    if not rows:
        return None
    median = {
        phase: statistics.median(row.get(time_of(phase), 0.0) for row in rows) for phase in (*PHASES, DRAIN, "idle")
    }
    step, waited = statistics.median(row[STEP_S] for row in rows), median["generate"]
    if any("rollout/lag_max" in row for row in rows):
        return (
            f"the last {len(rows)} steps in this run directory waited {waited:.2g} s of {step:.2g} s for responses: no larger "
            f"max_lag, and no further rollout actor, can win more"
        )
    learning = sum(median[phase] for phase in _LEARNING) + median["idle"]
    ahead = max(waited, learning) + median["sync"]
    found = (
        f"the last {len(rows)} steps in this run directory took {step:.2g} s: {waited:.2g} s of sampling, {learning:.2g} s of "
        f"scores and learning, {median['sync']:.2g} s of new weights"
    )
    if max_lag:
        return (
            f"{found}; with max_lag 1 a step would take about {ahead:.2g} s, where both have cores or GPUs of their own"
        )
    gain = f"{found}; with ppo.max_lag=1 it would be about {ahead:.2g} s, {step / ahead:.2g} times as fast"
    return f"{gain}, where both have cores or GPUs of their own" + (
        "; sampling is the longer part: with long and short responses ppo.max_lag=2 or 3 takes another part of it"
        if waited > learning
        else ""
    )
