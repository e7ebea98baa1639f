"""Resources that nobody wrote fit this machine; what somebody wrote is kept to."""

from pathlib import Path
from typing import Any

import pytest

from raytrl.config.load import LoadedRun, load_run
from raytrl.errors import ResourceError
from raytrl.plan.capacity import Room
from raytrl.plan.cluster import Cluster, Node
from raytrl.plan.fit import fitted, in_words
from raytrl.plan.need import need_of
from raytrl.plan.where import THIS_MACHINE


def ppo(tmp_path: Path, **sections: Any) -> LoadedRun:
    """As short as a PPO file can be: no word on resources."""
    import yaml

    values = {
        "kind": "ppo",
        "name": "a",
        "model": {"path": "some/model"},
        "data": {"train": "prompts.jsonl"},
        "reward": {"sources": [{"name": "brevity", "function": "rewards.py:brevity"}]},
    }
    for name, section in sections.items():
        values[name] = {**values.get(name, {}), **section}  # type: ignore[dict-item]
    file = tmp_path / "ppo.yaml"
    file.write_text(yaml.safe_dump(values))
    return load_run(str(file), [])


def machine(cpus: float) -> Cluster:
    return Cluster([Node(THIS_MACHINE, {"CPU": cpus, "GPU": 0.0})], THIS_MACHINE)


def shares(loaded: LoadedRun) -> dict[str, dict[str, float]]:
    return {each.key: each.section.resources for each in loaded.run.processes()}


def test_three_processes_share_two_cores(tmp_path: Path) -> None:
    loaded, chosen = fitted(ppo(tmp_path), machine(2))
    assert shares(loaded) == {key: {"CPU": 0.66} for key in ("rollout.actors", "reward.actors", "learner.workers")}
    assert loaded.origins["learner.resources"] == "chosen for this machine"
    assert ("learner.resources.CPU", 0.66, "chosen for this machine") in loaded.values()
    assert Room.on(machine(2), need_of(loaded.run))
    (words,) = in_words(chosen)
    assert words.startswith("rollout.resources, reward.resources, learner.resources: nobody wrote them")
    assert words.endswith("each has CPU 0.66")


def test_nothing_is_chosen_where_there_is_room(tmp_path: Path) -> None:
    loaded, chosen = fitted(ppo(tmp_path), machine(3))
    assert (shares(loaded)["learner.workers"], chosen, in_words(chosen)) == ({"CPU": 1.0}, {}, [])


def test_what_somebody_wrote_is_kept_to(tmp_path: Path) -> None:
    loaded, chosen = fitted(ppo(tmp_path, learner={"resources": {"CPU": 1}}), machine(2))
    assert shares(loaded)["learner.workers"] == {"CPU": 1}
    assert chosen == {"rollout": {"CPU": 0.5}, "reward": {"CPU": 0.5}}
    written = ppo(tmp_path, **{name: {"resources": {"CPU": 1}} for name in ("learner", "rollout", "reward")})
    loaded, chosen = fitted(written, machine(2))
    assert chosen == {}
    with pytest.raises(ResourceError, match=r"need 3 CPU; found: 2 CPU on this machine"):
        Room.on(machine(2), need_of(loaded.run))


def test_too_many_for_the_machine_are_refused_with_what_would_fit(tmp_path: Path) -> None:
    loaded, chosen = fitted(ppo(tmp_path, rollout={"actors": 30}), machine(2))
    assert chosen == {}
    with pytest.raises(ResourceError, match=r"need 32 CPU; found: 2"):
        Room.on(machine(2), need_of(loaded.run))


def test_in_a_cluster_nothing_is_chosen(tmp_path: Path) -> None:
    cluster = Cluster([Node("a", {"CPU": 2.0})], "the cluster at 'auto'")
    assert fitted(ppo(tmp_path), cluster)[1] == {}
