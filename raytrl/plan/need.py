"""What all processes of a run take together."""

from pathlib import Path

from raytrl.config.runs.base import Run
from raytrl.config.runs.evaluation import EvalRun
from raytrl.config.runs.ppo import PpoRun
from raytrl.config.runs.supervised import SupervisedRun
from raytrl.errors import ConfigError
from raytrl.plan.cluster import Group, Need


def need_of(run: Run, *, reward_shared: bool = False) -> Need:
    """What all processes of a run take.

    Args:
        reward_shared: its reward actors are those of a sweep, and counted there.

    Raises:
        ConfigError: the run is planned by what it runs.
    """
    if isinstance(run, SupervisedRun):
        return Need((Group.of("learner.workers", run.learner.min_workers, run.learner),))
    if isinstance(run, PpoRun | EvalRun):
        groups = [Group.of("rollout.actors", run.rollout.actors, run.rollout)]
        if not reward_shared:
            groups.append(Group.of("reward.actors", run.reward.actors, run.reward))
        if isinstance(run, EvalRun):
            return Need(tuple(groups))
        groups.append(Group.of("learner.workers", run.learner.max_workers, run.learner))
        # Two versions of the weights, in float32 at most, are there while actors change from one to the next.
        return Need(tuple(groups), Need.object_store_bytes + 4 * _travelling_bytes(run))
    base = getattr(run, "base", "")
    raise ConfigError(
        f"kind: a {run.kind} run is planned by what it runs; found: {run.kind!r}; expected: raytrl plan {base}"
    )


def _travelling_bytes(run: PpoRun) -> int:
    """Size on disk of what goes to the rollout actors at every step; little with LoRA, unknown for a hub id."""
    if run.lora is not None:
        return 0
    return sum(file.stat().st_size for file in Path(str(run.model.path)).glob("*.safetensors"))
