"""Where a run stands: fresh, to be continued, or finished; and whether it may go on as it is asked to."""

from dataclasses import dataclass
from typing import Any, Literal

import yaml

from raytrl.config.foreign.deepspeed import zero_stage
from raytrl.config.runs.base import Run, TrainingRun
from raytrl.errors import ConfigError
from raytrl.launch.runs.checkpoints import Committed, last_committed
from raytrl.plan.inputs import Inputs, changes, is_code_of_rewards
from raytrl.rundir import RunDirectory

# What may change between two starts of a run: where it runs, not what it computes.
_OPERATIONAL = (
    "output_dir",  # a moved run directory is the same run
    "learner.workers",
    "learner.resources",
    "learner.placement",
    "learner.labels",
    "learner.max_failures",
    "learner.start_timeout_s",
    "learner.stall_timeout_s",
    "cluster.",
    "checkpoint.",
    "report_to",
    "rollout.actors",
    "rollout.resources",
    "rollout.placement",
    "rollout.labels",
    "rollout.weight_transfer",
    "rollout.versions",
    "rollout.start_timeout_s",
    "rollout.timeout_s",
    "rollout.samples",
    "reward.actors",
    "reward.resources",
    "reward.placement",
    "reward.labels",
    "benchmark.actors",
    "benchmark.resources",
    "benchmark.placement",
    "benchmark.labels",
    "benchmark.start_timeout_s",
    "benchmark.timeout_s",
    "pairs.actors",
    "pairs.resources",
    "pairs.placement",
    "pairs.labels",
    "pairs.start_timeout_s",
    "pairs.timeout_s",
    "max_concurrent",
    "max_failed",
)


@dataclass(frozen=True)
class Standing:
    """What was found in the run directory; `notices` are for the user to read before the run goes on."""

    state: Literal["fresh", "continue", "done"]
    checkpoint: Committed | None = None  # that Ray Train goes on from
    notices: tuple[str, ...] = ()
    resume: str = ""  # continue: from where, in words


def inspect_run(run: Run, run_dir: RunDirectory, *, may_begin_anew: bool = False) -> Standing:
    """Decides how the run starts. No checkpoint is touched: a start that was killed a moment ago may be writing.

    Args:
        may_begin_anew: also where the checkpoints that there were are gone.

    Raises:
        ConfigError: the directory holds a run of other settings, or its checkpoint cannot be loaded as asked.
    """
    manifest = run_dir.manifest()
    if not manifest:
        return Standing("fresh")
    run_dir.delete(".scratch")  # it may be what fills the disk
    if manifest["state"] == "done":
        return Standing("done", notices=tuple(refuse_changes(run_dir, "config.yaml", run)))
    try:
        checkpoint, lost = last_committed(run_dir)
    except ConfigError as error:
        if not may_begin_anew:
            raise
        return Standing("fresh", notices=(f"{error}; starts from the beginning",))
    if checkpoint is None:
        return Standing("fresh", notices=("the earlier start left no complete checkpoint: starts from the beginning",))
    notices = refuse_changes(run_dir, "config.yaml", run) + lost
    assert isinstance(run, TrainingRun)  # or it would have no checkpoints
    before = yaml.safe_load(run_dir.read("config.yaml") or "{}")
    notices += _worker_change(run, checkpoint, run_dir, _most_workers(before))
    return Standing("continue", checkpoint, tuple(notices), f"from step {checkpoint.step}")


def refuse_changes(run_dir: RunDirectory, name: str, run: Run) -> list[str]:
    """Compares a run with the resolved one that a run directory holds; returns notices of what changed.

    Raises:
        ConfigError: something that the results depend on is not what it was.
    """
    changed = _changes(yaml.safe_load(run_dir.read(name) or "{}"), run.model_dump(mode="json"))
    frozen = [line for key, line in changed.items() if not key.startswith(_OPERATIONAL)]
    if frozen:
        raise ConfigError(
            f"{run_dir}: this run was started with other settings: {'; '.join(frozen)}; choose another name, or --fresh "
            f"to throw the old run away"
        )
    # Those that nobody wrote are chosen for the machine at each start, which says so itself.
    unwritten = tuple(f"{each.section_name}.resources" for each in run.processes() if not each.resources_written)
    return [line for key, line in changed.items() if not key.startswith(unwritten)]


def changed_inputs(run_dir: RunDirectory, made_from: Inputs, state: str) -> list[str]:
    """Notices of data, models and code that are not what the run in the directory was started with.

    Args:
        made_from: what they are now.
        state: in which the run stands.

    Raises:
        ConfigError: it would go on with other rows or another model: the result would be neither run's.
    """
    found = changes(run_dir.manifest().get("inputs", {}), made_from)
    if state == "done" and found:
        return [
            f"{run_dir}: answers for what was there when it was made; changed since: {'; '.join(found.values())}; "
            f"--fresh does it anew"
        ]
    frozen = [line for key, line in found.items() if not is_code_of_rewards(key)]
    if frozen:
        raise ConfigError(
            f"{run_dir}: what this run was started with has changed since: {'; '.join(frozen)}; expected: what was there, "
            f"to go on; put it back, choose another name, or --fresh to throw the old run away"
        )
    return [
        f"changed since the run was started, and it goes on with what is there now: {line}" for line in found.values()
    ]


def _changes(old: dict[str, Any], new: dict[str, Any], prefix: str = "") -> dict[str, str]:
    """dotted key → 'key was A, now B' of every difference."""
    changes: dict[str, str] = {}
    for key in sorted({*old, *new}):
        before, now = old.get(key), new.get(key)
        if isinstance(before, dict) and isinstance(now, dict):
            changes |= _changes(before, now, f"{prefix}{key}.")
        elif before != now:
            changes[f"{prefix}{key}"] = f"{prefix}{key} was {before!r}, now {now!r}"
    return changes


def _most_workers(config: dict[str, Any]) -> int | None:
    """`learner.max_workers` of a stored config."""
    workers: int | list[int] | None = config.get("learner", {}).get("workers")
    return workers[1] if isinstance(workers, list) else workers


def _worker_change(
    run: TrainingRun, checkpoint: Committed, run_dir: RunDirectory, most_before: int | None
) -> list[str]:
    """What another number of workers changes; `most_before`: of the start that wrote the checkpoint."""
    learner, written = run.learner, f"the checkpoint was written by {checkpoint.world_size} workers"
    fits = learner.min_workers <= checkpoint.world_size <= learner.max_workers
    if not fits and (stage := zero_stage(learner.deepspeed)) is not None:
        raise ConfigError(
            f"learner.workers: the checkpoint of step {checkpoint.step} in {run_dir} was written by "
            f"{checkpoint.world_size} workers under ZeRO-{stage}, and DeepSpeed loads it only on as many; "
            f"found: {learner.workers}; expected: {checkpoint.world_size}, or --fresh"
        )
    if (rows := run.rows_a_worker) is not None and most_before is not None and most_before != learner.max_workers:
        return [
            f"{written}: with {learner.workers} a step takes {rows * learner.max_workers} rows instead of "
            f"{rows * most_before}, an epoch has accordingly more or fewer steps, and the result is not the one "
            f"of {most_before} workers"
        ]
    if fits:
        return []
    return [
        f"{written}: with {learner.workers} the batch stays the same, but sums are taken in another order, so the result "
        f"is equal to rounding, not to the bit"
    ]
