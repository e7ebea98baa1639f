"""A node that is lost, a node that is added: what a run over several nodes ends with."""

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.nodes import Nodes, ip_of, number_of, ray_nodes
from tests.ppo_files import make_files, ppo_file
from tests.runs import (
    is_committed,
    last_step,
    metrics,
    output_of,
    raytrl,
    run_file,
    start,
    text_rows,
    wait_for,
    weights_hash,
    write_rows,
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("node-kills")
    make_files(path)
    write_rows(path / "train.jsonl", text_rows(64))
    return path


@pytest.fixture
def two_nodes() -> Iterator[Nodes]:
    with ray_nodes([1, 1]) as nodes:
        yield nodes


# Ray takes 14 s to call a silent node dead, and Train tries the old nodes first.
PATIENT = {"start_timeout_s": 20, "max_failures": 20}


@pytest.mark.slow
def test_sft_goes_on_without_a_node_and_ends_with_the_same_weights(folder: Path, two_nodes: Nodes) -> None:
    """Two workers on two nodes; one is cut off, and another joins in its place."""
    training = {"max_steps": 40, "per_device_train_batch_size": 4, "learning_rate": 1e-2, "max_length": 32}
    raytrl("sft", run_file(folder, "one-node", training=training))
    file = run_file(folder, "lost", training=training, learner={"workers": 2, "placement": "spread", **PATIENT})
    process = start("sft", file, f"cluster.address={two_nodes.address}")
    run = folder / "runs/lost"
    wait_for("a checkpoint", lambda: is_committed(run) and last_step(run) >= 5, process)
    two_nodes.kill(2)
    two_nodes.add(1)
    output = output_of(process)
    assert process.returncode == 0, output
    assert "continues from step" in output
    assert [row["step"] for row in metrics(run)] == list(range(1, 41))
    assert weights_hash(run / "model") == weights_hash(folder / "runs/one-node/model")
    assert len({*nodes_in(run / "logs/learner-0.log"), *nodes_in(run / "logs/learner-1.log")}) == 3


def nodes_in(log: Path) -> list[str]:
    """The node of each life of a process, the first one first."""
    return re.findall(r"starts on node (\S+),", log.read_text())


@pytest.mark.slow
@pytest.mark.parametrize("victim", ["learner-1", "rollout-0", "reward-0"])
def test_ppo_goes_on_without_a_node_and_ends_with_the_same_weights(folder: Path, victim: str) -> None:
    """Learners, rollout actors and reward actor spread over three nodes with room for what one of them held.

    The node of one of them is cut off, and with it whatever else runs there.
    """
    ppo = {"steps": 60, "batch_size": 16, "epochs": 2, "minibatches": 2, "learning_rate": 3e-3}
    values: dict[str, Any] = {"ppo": ppo, "checkpoint": {"every": 5}}
    whole = folder / "runs/ppo-one-node"
    if not (whole / "model").exists():
        raytrl("ppo", ppo_file(folder, "ppo-one-node", **values))
    values["learner"] = {"workers": 2, "resources": {"CPU": 0.25}, "placement": "spread", **PATIENT}
    values["rollout"] = {"actors": 2, "resources": {"CPU": 0.5}, "sampling": {"max_new_tokens": 8}} | {
        "chunk_prompts": 4,
        "placement": "spread",
    }
    file = ppo_file(folder, f"ppo-lost-{victim}", **values)
    run = folder / f"runs/ppo-lost-{victim}"
    with ray_nodes([2, 2, 2]) as nodes:
        process = start("ppo", file, f"cluster.address={nodes.address}")
        wait_for("a checkpoint", lambda: is_committed(run) and last_step(run) >= 12, process)
        places = {log.stem: nodes_in(log)[0] for log in (run / "logs").iterdir()}
        lost = [role for role, place in places.items() if place == places[victim]]
        nodes.kill(number_of(places[victim]))
        output = output_of(process)
    assert process.returncode == 0, output
    for role in lost:  # each of them went to another node
        assert set(nodes_in(run / f"logs/{role}.log")[1:]) - {places[victim]}, role
    assert ("continues from step" in output) == any(role.startswith("learner") for role in lost), (lost, output)
    print(f"killed {places[victim]} with {', '.join(sorted(lost))}; all: {places}")
    assert [row["step"] for row in metrics(run)] == list(range(1, 61))
    for model in ("model", "value_model"):
        assert weights_hash(run / model) == weights_hash(whole / model)
    assert (run / "samples.jsonl").read_text() == (whole / "samples.jsonl").read_text()


@pytest.mark.slow
def test_an_elastic_run_takes_up_an_added_node_and_goes_on_without_it(folder: Path) -> None:
    """The rows of each step are the same all the while: the losses are those of a fixed run, to rounding."""
    training = {"max_steps": 1500, "per_device_train_batch_size": 4, "learning_rate": 1e-4, "max_length": 32}
    values: dict[str, Any] = {"training": training, "checkpoint": {"every": 50}}
    file = run_file(folder, "elastic", learner={"workers": [1, 2], **PATIENT}, **values)
    run = folder / "runs/elastic"
    notices = re.compile(r"note: (\d) workers? instead of (\d) from step (\d+) on")

    def workers_from(log: str) -> int:
        path = run / "logs" / log
        return len(re.findall(r" starts on node ", path.read_text())) if path.exists() else 0

    with ray_nodes([1]) as nodes:
        process = start("sft", file, f"cluster.address={nodes.address}")
        wait_for("a checkpoint", lambda: is_committed(run), process)
        added = nodes.add(1)
        wait_for("the second worker", lambda: workers_from("learner-1.log") == 1, process)
        grown = last_step(run)
        wait_for("steps of both", lambda: last_step(run) > grown + 120, process)
        nodes.kill(added)
        output = output_of(process)
    assert process.returncode == 0, output
    assert [found[:2] for found in notices.findall(output)] == [("2", "1"), ("1", "2")], output
    fixed_training = training | {"gradient_accumulation_steps": 2}  # the rows of two workers
    raytrl("sft", run_file(folder, "not-elastic", **values | {"training": fixed_training, "learner": {"workers": 1}}))
    rows, fixed = metrics(run), metrics(folder / "runs/not-elastic")
    assert [row["step"] for row in rows] == list(range(1, 1501))
    gaps = [abs(row["loss"] - other["loss"]) for row, other in zip(rows, fixed, strict=True)]
    assert max(gaps) < 2e-3, (max(gaps), gaps.index(max(gaps)))


@pytest.mark.slow
@pytest.mark.parametrize("holds_reward", [True, False])
def test_a_sweep_goes_on_without_a_node(folder: Path, holds_reward: bool) -> None:
    """Two of three trials run on two nodes, beside one reward actor; one node is cut off, another joins in its place."""
    name = f"sweep-lost-{'reward' if holds_reward else 'trial'}"
    values: dict[str, Any] = {
        "ppo": {"steps": 60, "batch_size": 16, "epochs": 2, "minibatches": 2},
        "learner": {"workers": 1, "resources": {"CPU": 0.5}, **PATIENT},
        "rollout": {"actors": 1, "resources": {"CPU": 0.25}},
        "reward": {"resources": {"CPU": 0.25}},
        "checkpoint": {"every": 5},
    }
    sweep: dict[str, Any] = {
        "kind": "tune",
        "name": name,
        "output_dir": str(folder / "runs"),
        "base": ppo_file(folder, f"{name}-base", **values),
        "search": {"ppo.learning_rate": {"grid": [1e-3, 3e-3, 1e-2]}},
        "metric": "objective/scores_raw",
        "mode": "max",
    }
    file, run = folder / f"{name}.yaml", folder / "runs" / name
    file.write_text(yaml.safe_dump(sweep))

    def node_of(log: str) -> str:
        """The last that a process says it started on."""
        path = run / log
        return (re.findall(r"starts on node (\S+),", path.read_text()) if path.exists() else [])[-1:][0]

    def running() -> list[str]:
        each = sorted((run / "trials").glob("*")) if (run / "trials").exists() else []
        return [trial.name for trial in each if is_committed(trial) and 5 <= last_step(trial) < 50]

    with ray_nodes([1, 1]) as nodes:
        process = start("tune", str(file), f"cluster.address={nodes.address}")
        wait_for("two trials with a checkpoint", lambda: len(running()) == 2, process, 300)
        home = node_of("logs/reward-0.log")
        victim = next(number for number in (1, 2) if (ip_of(number) == home) == holds_reward)
        hit = [trial for trial in running() if node_of(f"trials/{trial}/logs/rollout-0.log") == ip_of(victim)]
        nodes.kill(victim)
        nodes.add(1)
        output = output_of(process)
        print(output)
    assert process.returncode == 0, output
    trials = json.loads((run / "trials.json").read_text())
    assert [trial["state"] for trial in trials] == ["done"] * 3
    for trial in trials:
        assert [row["step"] for row in metrics(run / "trials" / trial["name"])] == list(range(1, 61))
    assert hit
    assert all(node_of(f"trials/{trial}/logs/rollout-0.log") != ip_of(victim) for trial in hit)
    # An undisturbed run of a trial that was hit, by its own file.
    raytrl("ppo", str(run / "trials" / hit[0] / "config.yaml"), f"output_dir={folder}/runs", "cluster.address=null")
    assert weights_hash(folder / "runs" / hit[0] / "model") == weights_hash(run / "trials" / hit[0] / "model")
