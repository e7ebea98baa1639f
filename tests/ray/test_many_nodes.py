"""Runs over several Ray nodes: where each role is, what its log says, what Ray's metrics show, and what is refused."""

import json
import re
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from tests.nodes import Nodes, ip_of, ray_nodes
from tests.ppo_files import make_files, ppo_file
from tests.runs import LIMIT_S, metrics, output_of, raytrl, run_file, start, text_rows, wait_for, write_rows

ROLES = ("learner", "rollout", "reward")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("nodes")
    make_files(path)
    write_rows(path / "train.jsonl", text_rows(64))
    return path


@pytest.fixture(scope="module")
def nodes() -> Iterator[Nodes]:
    """One node a role, named by its label."""
    with ray_nodes([2, 2, 2], [{"role": role} for role in ROLES]) as found:
        yield found


def node_of(log: Path) -> str:
    found = re.search(r"starts on node (\S+), process", log.read_text())
    assert found is not None
    return found[1]


def test_ppo_roles_go_where_their_labels_say(folder: Path, nodes: Nodes) -> None:
    """And: each role has a log file with its role, rank and version in each line; gauges are in Ray's metrics."""
    file = ppo_file(folder, "labelled")
    labels = [f"{role}.labels={{role: {role}}}" for role in ROLES]
    process = start("ppo", file, *labels, f"cluster.address={nodes.address}", "ppo.steps=200", "checkpoint.every=100")
    run = folder / "runs/labelled"
    wait_for("ten steps", lambda: len(metrics(run)) >= 10, process)
    wanted = ["step", "phase_seconds", "score", "kl", "tokens_per_second", "requests_waiting", "restarts"]
    deadline = time.monotonic() + 60
    while not all(f"ray_raytrl_{name}{{" in (shown := nodes.metrics()) for name in wanted):
        assert time.monotonic() < deadline, re.findall(r"ray_raytrl_\w+", shown)
        time.sleep(1)
    process.terminate()
    output = output_of(process)
    assert process.returncode == 130, output
    assert re.search(r'ray_raytrl_phase_seconds{[^}]*phase="generate"[^}]*run="labelled"', shown) or re.search(
        r'ray_raytrl_phase_seconds{[^}]*run="labelled"[^}]*phase="generate"', shown
    )
    logs = {path.name: path for path in (run / "logs").iterdir()}
    assert logs.keys() == {"learner-0.log", "learner-1.log", "rollout-0.log", "rollout-1.log", "reward-0.log"}
    for name, path in logs.items():
        role, rank = path.stem.rsplit("-", 1)
        assert node_of(path) == ip_of(1 + ROLES.index(role)), name
        for line in path.read_text().splitlines():  # of a traceback, too, whose lines are indented
            assert re.match(rf"\d{{4}}-\S+ \S+ [A-Z]+ {role} {rank} v(-|\d+) .*\S", line), line
    assert re.search(r" v3 generating for rows \d+ to \d+ of step 3: \d+\.\d+ s", logs["rollout-0.log"].read_text())
    assert re.search(r" v\d+ step 5/200 .*objective/kl", logs["learner-0.log"].read_text())
    assert " v5 step 5/200 in " in logs["learner-1.log"].read_text()
    assert "scoring 4 responses of step 3" in logs["reward-0.log"].read_text()


@pytest.mark.slow
def test_sft_workers_spread_and_pack(folder: Path, nodes: Nodes) -> None:
    """And paths are relative to where the command was typed, though the nodes' processes start elsewhere."""
    found = {}
    for placement in ("spread", "pack"):
        file = run_file(folder, placement, learner={"workers": 2, "placement": placement}, output_dir="runs")
        raytrl(
            "sft",
            file,
            f"cluster.address={nodes.address}",
            "training.max_steps=2",
            "data.train=train.jsonl",
            cwd=folder,
        )
        assert (folder / f"runs/{placement}/model/model.safetensors").is_file()
        found[placement] = {node_of(folder / f"runs/{placement}/logs/learner-{rank}.log") for rank in range(2)}
    assert len(found["spread"]) == 2
    assert len(found["pack"]) == 1


def _wait_for_all_cpus() -> None:
    import ray

    deadline = time.monotonic() + LIMIT_S
    while ray.available_resources().get("CPU") != ray.cluster_resources()["CPU"]:
        assert time.monotonic() < deadline, ray.available_resources()
        time.sleep(0.1)


def test_actors_are_placed_as_asked(folder: Path, nodes: Nodes) -> None:
    import ray

    from raytrl.config.load import load_run
    from raytrl.config.runs.ppo import PpoRun
    from raytrl.errors import ResourceError
    from raytrl.launch.actors.start import started_actors

    def run_of(name: str, **rollout: Any) -> PpoRun:
        values = {"resources": {"CPU": 1}, "start_timeout_s": 15, **rollout}
        run = load_run(ppo_file(folder, name, rollout=values), []).run
        assert isinstance(run, PpoRun)
        return run

    ray.init(address=nodes.address, log_to_driver=False, logging_level="ERROR")
    try:
        found = {}
        for placement in ("pack", "strict_pack", "spread", "strict_spread"):
            _wait_for_all_cpus()  # what ran before gives its own back a little after its end
            with started_actors(run_of(f"actors-{placement}", actors=2, placement=placement), dict, dict) as (
                rollout,
                _,
            ):
                ray.get([actor.start.remote() for actor in rollout], timeout=60)
            logs = (folder / f"runs/actors-{placement}/logs").glob("rollout-*.log")
            found[placement] = len({node_of(log) for log in logs})
        assert found == {"pack": 1, "strict_pack": 1, "spread": 2, "strict_spread": 2}
        too_many = run_of(
            "too-many", actors=4, placement="strict_spread", labels={"role": "!learner"}, start_timeout_s=2
        )
        with pytest.raises(
            ResourceError, match=r"rollout.actors: could not be placed .* on 4 nodes; expected: 4 x CPU 1"
        ):
            started_actors(too_many, dict, dict).__enter__()
    finally:
        ray.shutdown()


def test_a_node_with_another_disk_is_named_before_anything_starts(folder: Path, nodes: Nodes) -> None:
    """The node has a mount namespace of its own, in which an empty disk lies over the run directory."""
    runs = folder / "runs"
    runs.mkdir(exist_ok=True)
    with other_disk_node(nodes, runs):
        output = raytrl("sft", run_file(folder, "unseen"), f"cluster.address={nodes.address}", status=2)
    assert f"node {ip_of(9)}: no such folder" in output
    assert "expected: a disk that all 5 nodes share, or a URI" in output
    assert not (runs / "unseen/logs").exists()
    assert json.loads((runs / "unseen/manifest.json").read_text())["state"] == "failed"


@contextmanager
def other_disk_node(nodes: Nodes, folder: Path) -> Iterator[None]:
    command = (
        f"mount -t tmpfs none {folder} && exec {sys.executable} -m ray.scripts.scripts start --block --num-cpus=1 "
    )
    command += f"--address={nodes.address} --node-ip-address={ip_of(9)} --object-store-memory=100000000"
    probe = subprocess.run(["unshare", "--mount", "true"], capture_output=True, check=False)
    if probe.returncode:
        pytest.skip(f"mount namespaces are not allowed here: {probe.stderr.decode().strip()}")
    before = nodes.count()
    process = subprocess.Popen(["unshare", "--mount", "bash", "-c", command], stdout=subprocess.DEVNULL)
    try:
        deadline = time.monotonic() + 60
        while nodes.count() == before:
            assert process.poll() is None
            assert time.monotonic() < deadline
            time.sleep(0.5)
        yield
    finally:
        process.terminate()
        process.wait(timeout=60)
