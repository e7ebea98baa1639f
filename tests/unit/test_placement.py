"""Where processes would go, node by node, and what is said when they cannot."""

from typing import Any

import pytest

from raytrl.errors import ConfigError, ResourceError
from raytrl.plan.capacity import Room
from raytrl.plan.cluster import Cluster, Group, Need, Node, described_nodes
from raytrl.plan.placement import check_placement, place


def needed(parts: list[tuple[str, int, dict[str, float]]], strategy: Any = "pack", **labels: str) -> Need:
    return Need(tuple(Group(*part, strategy, labels) for part in parts))


def nodes(*sizes: dict[str, float]) -> list[Node]:
    return [Node(f"n{i}", size) for i, size in enumerate(sizes)]


def refusal(need: Need, there: list[Node]) -> str:
    with pytest.raises(ResourceError) as caught:
        check_placement(need, there, "the cluster")
    return str(caught.value)


def test_too_much_in_all_is_refused_with_both_numbers_and_what_would_fit() -> None:
    need = needed([("learner.workers", 4, {"CPU": 0.5, "GPU": 1})])
    assert refusal(need, nodes({"CPU": 8, "GPU": 1})) == (
        "learner.workers: 4 x CPU 0.5, GPU 1 need 4 GPU; found: 1 GPU on the cluster; would fit: learner.workers=1"
    )
    text = refusal(need, nodes({"CPU": 1}))
    assert "need 2 CPU, 4 GPU; found: 1 CPU, 0 GPU on the cluster; no node has room for one process of learner" in text


def test_what_just_fits_is_accepted() -> None:
    need = needed([("a", 10, {"CPU": 0.1}), ("b", 1, {"CPU": 1})])
    assert check_placement(need, nodes({"CPU": 2.0}), "here").places == {"a": {"n0": 10}, "b": {"n0": 1}}


def test_enough_in_all_but_not_on_any_node() -> None:
    """Three nodes of 8 GPUs hold 24, but only 3 workers that want 5 each."""
    need = needed([("learner.workers", 4, {"GPU": 5})])
    text = refusal(need, nodes(*[{"GPU": 8.0}] * 3))
    assert "enough in all, but not node by node: there is room for 3 of learner.workers" in text
    assert "found on the cluster: 3 x GPU 8; would fit: learner.workers=3" in text


def test_one_process_larger_than_any_node() -> None:
    text = refusal(needed([("rollout.actors", 1, {"GPU": 16})]), nodes({"GPU": 8}, {"GPU": 8}))
    assert "no node has room for one process of rollout.actors, GPU 16; the most that a node has: GPU 8" in text


def test_roles_that_fit_alone_but_not_together() -> None:
    need = needed([("rollout.actors", 2, {"CPU": 3}), ("learner.workers", 2, {"CPU": 3})])
    text = refusal(need, nodes({"CPU": 5}, {"CPU": 5}, {"CPU": 5}))
    assert "each role has room alone, but not all together" in text
    assert "would fit: learner.workers=1 or rollout.actors=1" in text


def test_processes_without_gpu_leave_the_gpus_alone() -> None:
    need = needed([("reward.actors", 4, {"CPU": 1}), ("learner.workers", 2, {"CPU": 4, "GPU": 1})])
    there = nodes({"CPU": 8, "GPU": 2}, {"CPU": 8})
    assert check_placement(need, there, "here").places == {
        "reward.actors": {"n1": 4},
        "learner.workers": {"n0": 2},
    }


def test_an_arrangement_that_only_another_order_finds_counts() -> None:
    """Two processes of 2 CPUs first would take the node that the one of 4 needs."""
    groups = needed([("a", 2, {"CPU": 2}), ("b", 1, {"CPU": 4})]).groups
    placement = place(groups, nodes({"CPU": 4}, {"CPU": 2}, {"CPU": 2}))
    assert placement is not None
    assert placement.places["b"] == {"n0": 1}


def test_the_nearest_count_is_found_for_large_numbers() -> None:
    need = needed([("rollout.actors", 100_000, {"GPU": 1})])
    assert "would fit: rollout.actors=512" in refusal(need, nodes(*[{"GPU": 8.0}] * 64))


def test_described_nodes() -> None:
    found = described_nodes(["nodes=2,gpus=8,gpu_gib=80,cpus=64,mem_gib=512", "cpus=32"])
    assert [node.name for node in found] == ["node 1", "node 2", "node 3"]
    assert found[0] == Node("node 1", {"CPU": 64, "GPU": 8}, 512, 80)
    assert found[2] == Node("node 3", {"CPU": 32, "GPU": 0}, None, None)


@pytest.mark.parametrize("text", ["gpu=8", "nodes=two", "nodes", "cpus=-1"])
def test_a_description_that_is_none(text: str) -> None:
    with pytest.raises(ConfigError, match=r"^--cluster: found: '.*'; expected: nodes, cpus, gpus, gpu_gib, mem_gib"):
        described_nodes([text])
    with pytest.raises(ConfigError, match="describes no node"):
        described_nodes(["nodes=0"])


def test_nodes_to_come_take_only_what_has_no_place_yet() -> None:
    need = needed([("rollout.actors", 2, {"CPU": 1}), ("learner.workers", 2, {"GPU": 8})])
    there = nodes({"CPU": 4.0})
    with pytest.raises(ResourceError, match="need 16 GPU; found: 0 GPU on there"):
        Room.on(Cluster(there, "there"), need)
    room = Room.on(Cluster(there, "there", grows=True), need)
    assert room.placement.places["rollout.actors"] == {"n0": 2}
    assert set(room.placement.places["learner.workers"]) == {
        "added node 1 for learner.workers",
        "added node 2 for learner.workers",
    }
    assert [node.name for node in room.nodes] == ["n0", *room.placement.places["learner.workers"]]
    packed = needed([("learner.workers", 2, {"GPU": 8})], "strict_pack")
    assert Room.on(Cluster(there, "there", grows=True), packed)


def test_strategies() -> None:
    there = nodes({"CPU": 4}, {"CPU": 4}, {"CPU": 2})
    part = [("a", 3, {"CPU": 1.0})]
    assert check_placement(needed(part), there, "here").places["a"] == {"n0": 3}
    assert check_placement(needed(part, "spread"), there, "here").places["a"] == {"n0": 1, "n1": 1, "n2": 1}
    assert check_placement(needed(part, "strict_spread"), there, "here").places["a"] == {"n0": 1, "n1": 1, "n2": 1}
    assert check_placement(needed(part, "strict_pack"), there, "here").places["a"] == {"n0": 3}
    assert "room for 3 of a: 4 x CPU 1, strict_spread" in refusal(
        needed([("a", 4, {"CPU": 1.0})], "strict_spread"), there
    )
    assert "room for 4 of a: 5 x CPU 1, strict_pack" in refusal(needed([("a", 5, {"CPU": 1.0})], "strict_pack"), there)
    five = check_placement(needed([("a", 5, {"CPU": 1.0})], "spread"), there, "here").places["a"]
    assert sorted(five.values()) == [1, 2, 2]


@pytest.mark.parametrize(
    ("selector", "expected"),
    [("gpu", {"n0"}), ("!gpu", {"n1", "n2"}), ("in(gpu, cpu)", {"n0", "n1"}), ("!in(gpu,cpu)", {"n2"})],
)
def test_labels(selector: str, expected: set[str]) -> None:
    kinds = [{"kind": "gpu"}, {"kind": "cpu"}, {}]
    there = [Node(f"n{i}", {"CPU": 1.0}, labels=labels) for i, labels in enumerate(kinds)]
    need = needed([("a", len(expected), {"CPU": 1.0})], kind=selector)
    assert set(check_placement(need, there, "here").places["a"]) == expected
    more = needed([("a", len(expected) + 1, {"CPU": 1.0})], kind=selector)
    if len(expected) < 3:
        assert f"room for {len(expected)} of a: {len(expected) + 1} x CPU 1 on nodes with kind={selector}" in refusal(
            more, there
        )
