"""What all processes of a run take together."""

from pathlib import Path

from raytrl.config.runs.base import Run
from raytrl.config.runs.ppo import PpoRun
from raytrl.errors import ConfigError
from raytrl.plan.cluster import Group, Need


def need_of(run: Run, *, reward_shared: bool = False) -> Need:
    """What all processes of a run take.

    Args:
        reward_shared: its reward actors are those of a sweep, and counted there.

    Raises:
        ConfigError: the run is planned by what it runs.
    """
    processes = [each for each in run.processes() if not (reward_shared and each.role == "reward")]
    if not processes:
        base = getattr(run, "base", "")
        raise ConfigError(
            f"kind: a {run.kind} run is planned by what it runs; found: {run.kind!r}; expected: raytrl plan {base}"
        )
    groups = tuple(map(Group.of, processes))
    # Two versions of the weights, in float32 at most, are there while actors change from one to the next; and one more for
    # each further batch that is on its way, for actors that are lost meanwhile.
    versions = 2 + (run.lanes - 1 if isinstance(run, PpoRun) else 0)
    return Need(groups, Need.object_store_bytes + 2 * versions * _bytes_on_disk(run.travelling_model))


def _bytes_on_disk(model: str | None) -> int:
    """Of a model's weights; unknown for a hub id."""
    return 0 if model is None else sum(file.stat().st_size for file in Path(model).glob("*.safetensors"))
