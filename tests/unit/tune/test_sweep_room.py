"""How many trials run at once where memory, not CPUs, is short."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from transformers import LlamaConfig

from raytrl.config.load import LoadedRun
from raytrl.config.runs.sweep import TuneRun
from raytrl.config.trials import check_edges, load_base
from raytrl.errors import ResourceError
from raytrl.launch.sweep.room import TRIAL_GIB, AtOnce, Sweep, concurrent_trials, largest_memory
from raytrl.plan.capacity import DRIVER_GIB
from raytrl.plan.cluster import Cluster, Node
from raytrl.plan.memory import GIB

Load = Callable[..., LoadedRun]


@pytest.fixture
def policy(tmp_path: Path) -> dict[str, Any]:
    """The `base` of a sweep over a model of about 60 million numbers, of which only the config is there."""
    config = LlamaConfig(hidden_size=640, intermediate_size=1728, num_hidden_layers=8, num_attention_heads=8)
    config.save_pretrained(tmp_path / "large")
    return {
        "model": {"path": str(tmp_path / "large")},
        "rollout": {"engine": "transformers", "actors": 1, "sampling": {"max_new_tokens": 8}, "max_prompt_length": 24},
        "learner": {"workers": 1},
    }


def room(loaded: LoadedRun, *ram_gib: float, cpus: float = 41.0) -> AtOnce:
    """On nodes with 41 CPUs each, which is places for the reward actor and 20 trials."""
    nodes = [Node(f"node {i}", {"CPU": cpus}, ram) for i, ram in enumerate(ram_gib)]
    return concurrent_trials(checked(loaded), check_edges(loaded), Cluster(nodes, "a test"))


def checked(loaded: LoadedRun) -> Sweep:
    assert isinstance(loaded.run, TuneRun)
    return Sweep(loaded.run, load_base(loaded))


def sizes(loaded: LoadedRun) -> tuple[float, float, float]:
    """GiB that a node needs once, for each trial, and of the first what is mapped."""
    found = largest_memory(checked(loaded), check_edges(loaded)).found
    reward, rollout, learner = (found[key] for key in ("reward.actors", "rollout.actors", "learner.workers"))
    own = (rollout.total + learner.total - learner.mapped) / GIB + TRIAL_GIB
    return (reward.total + learner.mapped) / GIB + DRIVER_GIB, own, learner.mapped / GIB


def test_as_many_as_the_memory_holds(sweep: Load, policy: dict[str, Any]) -> None:
    loaded = sweep(policy, trials=12)
    once, own, mapped = sizes(loaded)
    assert room(loaded, once + 12 * own + 0.01).count == 12
    few = room(loaded, once + 5 * own + 0.01)
    assert few.count == 5
    assert f"12 trials at once take about {once + 12 * own:.1f} GiB of RAM of node 0; found: " in few.notes[-1]
    assert "so 5 at once, where there are places for 12" in few.notes[-1]
    assert room(loaded, once + 5 * own - 0.01).count == 4
    assert room(loaded, once + 2 * own + 0.01, mapped + 2 * own + 0.01, cpus=5).count == 4


def test_what_was_asked_for_is_refused_with_the_number_that_fits(sweep: Load, policy: dict[str, Any]) -> None:
    loaded = sweep(policy, trials=12, max_concurrent=12)
    once, own, _ = sizes(loaded)
    ram = (once + 12 * own) / 1.3
    assert room(loaded, 1.3 * ram + 0.01).count == 12
    with pytest.raises(
        ResourceError, match=r"max_concurrent: memory: 12 trials at once take about .* max_concurrent=11$"
    ):
        room(loaded, ram)
    tight = room(sweep(policy, trials=12, max_concurrent=11), ram)
    assert tight.count == 11
    assert "memory is tight: RAM of node 0" in tight.notes[-1]


def test_one_that_is_too_large_alone_is_refused(sweep: Load, policy: dict[str, Any]) -> None:
    with pytest.raises(ResourceError, match="memory: RAM of node 0: needs about"):
        room(sweep(policy), 2)


def test_the_largest_values_count_together(sweep: Load, policy: dict[str, Any]) -> None:
    def cache(chunk_prompts: list[int], max_new_tokens: list[int]) -> float:
        grids = {"rollout.chunk_prompts": chunk_prompts, "rollout.sampling.max_new_tokens": max_new_tokens}
        loaded = sweep(policy, search={key: {"grid": values} for key, values in grids.items()}, trials=None)
        return largest_memory(checked(loaded), check_edges(loaded)).found["rollout.actors"].parts["cache"]

    assert cache([4, 400], [8, 40]) == cache([400], [40]) > max(cache([400], [8]), cache([4], [40]))


def test_a_reference_in_the_files_dtype_counts_once_on_a_node(
    sweep: Load, policy: dict[str, Any], tmp_path: Path
) -> None:
    loaded = sweep(policy)
    found = largest_memory(checked(loaded), check_edges(loaded)).found
    weights = found["rollout.actors"].parts["weights"]
    assert found["learner.workers"].mapped == weights
    sharded = sweep({**policy, "learner": {"workers": 1, "deepspeed": {"zero_optimization": {"stage": 2}}}})
    assert largest_memory(checked(sharded), check_edges(sharded)).found["learner.workers"].mapped == 0
    loaded = sweep(policy)
    halves = LlamaConfig.from_pretrained(tmp_path / "large", dtype="bfloat16")
    halves.save_pretrained(tmp_path / "large")
    assert largest_memory(checked(loaded), check_edges(loaded)).found["learner.workers"].mapped == 0


def test_a_cluster_that_grows_has_room_for_what_waits(sweep: Load, policy: dict[str, Any]) -> None:
    def grown(*nodes: Node, **values: Any) -> AtOnce:
        loaded = sweep(policy, trials=12, **values)
        return concurrent_trials(checked(loaded), check_edges(loaded), Cluster(nodes, "a test", grows=True))

    head = Node("head", {"CPU": 0.0}, 8.0)
    assert grown(head).count == 1
    assert "no room yet for 1 at once: the autoscaler of a test has to add nodes" in grown(head).notes[0]
    assert grown(head, max_concurrent=6).count == 6
    large = Node("large", {"CPU": 9.0}, 1000.0)
    assert grown(head, large).count == 4
    assert not grown(head, large).notes
    with pytest.raises(ResourceError, match=r"one trial .* does not fit"):
        loaded = sweep(policy)
        concurrent_trials(checked(loaded), check_edges(loaded), Cluster([head], "a test"))
