"""What is checked before anything starts: resources, the CPU, trackers, the model's place."""

import os
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import ray

from raytrl.config.load import load_run
from raytrl.config.runs.supervised import SupervisedRun
from raytrl.errors import ConfigError, ResourceError, RunError
from raytrl.launch.session.nodes import machine_resources
from raytrl.launch.session.session import (
    Session,
    _join,
    _start_local,
    check_address,
    check_temp_dir,
    prepare_environment,
)
from raytrl.plan import capacity
from raytrl.plan.capacity import Room
from raytrl.plan.checks.common import Facts
from raytrl.plan.checks.supervised import prepare_supervised
from raytrl.plan.cluster import Cluster, Need, Node
from raytrl.plan.need import need_of
from raytrl.plan.shapes import read_shapes
from raytrl.plan.where import THIS_MACHINE, check_one_node, joins_cluster, refuse_client
from raytrl.plan.words import processes_of, words_of
from raytrl.rundir import RunDirectory
from tests.ppo_files import ppo_file
from tests.runs import pair_rows, run_file, text_rows, write_rows


def run_of(tmp_path: Path, **sections: Any) -> SupervisedRun:
    write_rows(tmp_path / "train.jsonl", text_rows(60) if sections.get("kind") != "reward" else pair_rows(60))
    run = load_run(run_file(tmp_path, "a", **sections), []).run
    assert isinstance(run, SupervisedRun)
    return run


def check(run: SupervisedRun) -> Facts:
    return prepare_supervised(run, RunDirectory(run.output_dir, run.name))


def test_ray_is_begun_before_what_takes_longest_and_not_for_rows_of_another_form(tmp_path: Path) -> None:
    order = list[str]()
    run = run_of(tmp_path)
    into = RunDirectory(run.output_dir, run.name)
    prepare_supervised(run, into, tell=lambda *_: order.append("rows"), before_last=lambda: order.append("begin"))
    assert order[0] == "begin" and order.count("begin") == 1
    write_rows(tmp_path / "train.jsonl", [{"text": 5}])
    with pytest.raises(ConfigError, match="row 1"):
        prepare_supervised(run, into, before_last=lambda: order.append("begin again"))
    assert "begin again" not in order


@pytest.mark.parametrize("failures", [1, 2])
def test_a_ray_that_did_not_start_beside_the_checks_is_tried_once_more(
    failures: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tries, ended = list[int](), list[int]()

    def start(_: Need) -> None:
        tries.append(1)
        if len(tries) <= failures:
            raise RunError("Ray did not start on this machine")

    monkeypatch.setattr("raytrl.launch.session.session._start_local", start)
    monkeypatch.setattr(ray, "shutdown", lambda: ended.append(1))
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    with Session(run_of(tmp_path)) as session:
        session.begin(Need(()))
        with pytest.raises(RunError) if failures == 2 else nullcontext(), session.running(Need(())):
            assert session.is_own
    assert len(tries) == 2 and len(ended) == 2


def test_this_machine_has_the_processors_this_process_may_use() -> None:
    import os

    assert machine_resources()["CPU"] == len(os.sched_getaffinity(0))


def test_a_run_joins_a_cluster_when_told_or_inside_a_job(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    assert not joins_cluster(run_of(tmp_path))
    assert joins_cluster(run_of(tmp_path, cluster={"address": "auto"}))
    monkeypatch.setenv("RAY_ADDRESS", "10.0.0.1:6379")
    assert joins_cluster(run_of(tmp_path))


@pytest.mark.parametrize("address", ["", "  ", "local"])
def test_a_ray_address_that_names_no_cluster_is_as_good_as_unset(
    address: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RAY_ADDRESS", address)
    assert not joins_cluster(run_of(tmp_path))
    prepare_environment()
    assert "RAY_ADDRESS" not in os.environ  # Ray reads it, too


@pytest.mark.parametrize("failures", [2, 100])
def test_a_client_whose_server_is_slow_to_start_is_tried_again(failures: int, monkeypatch: pytest.MonkeyPatch) -> None:
    clock, tries = iter(range(0, 1000, 10)), []

    def init(**_: Any) -> None:
        tries.append("init")
        if tries.count("init") <= failures:
            raise ConnectionAbortedError("Initialization failure from server:\nServer startup failed for client")

    monkeypatch.setattr(ray, "init", init)
    monkeypatch.setattr(ray, "shutdown", lambda: tries.append("shutdown"))
    here = "raytrl.launch.session.session.time"
    monkeypatch.setattr(here, SimpleNamespace(monotonic=lambda: next(clock), sleep=lambda seconds: None))
    if failures == 2:
        _join("ray://head:10001")
        assert tries == ["init", "shutdown", "init", "shutdown", "init"]
    else:
        with pytest.raises(ResourceError, match="no Ray answers at 'ray://head:10001': Initialization failure"):
            _join("ray://head:10001")
        assert tries.count("init") == 7  # in a minute, here one each 10 s


@pytest.mark.parametrize("address", ["http://127.0.0.1:8265", "https://head"])
def test_a_job_server_is_no_cluster_to_join(address: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RAY_ADDRESS", address)
    with pytest.raises(ResourceError, match=rf"^RAY_ADDRESS: is the address of a job server.*found: '{address}'"):
        joins_cluster(run_of(tmp_path))


def test_nobody_at_ray_address_is_told_by_that_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RAY_ADDRESS", "127.0.0.1:1")
    with pytest.raises(ResourceError, match=r"^RAY_ADDRESS: no Ray answers; found: '127.0.0.1:1'"):
        check_address(run_of(tmp_path))


@pytest.mark.parametrize("name", ["RAY_TMPDIR", "TMPDIR"])
def test_a_folder_that_is_too_long_for_sockets_is_refused(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("RAY_TMPDIR", raising=False)
    part = len("/ray/session_2026-01-01_00-00-00_000000_0000000/sockets/plasma_store")
    monkeypatch.setenv(name, "/tmp/" + "x" * (107 - part - 5))
    check_temp_dir()
    monkeypatch.setenv(name, "/tmp/" + "x" * (107 - part - 4))
    with pytest.raises(ResourceError, match=rf"^{name}: too long for Ray's sockets.*which makes 108; expected: "):
        check_temp_dir()


def test_a_folder_where_ray_cannot_write_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RAY_TMPDIR", "/dev/null/ray")
    with pytest.raises(ResourceError, match=r"^RAY_TMPDIR: Ray cannot write there; found: '/dev/null/ray'"):
        check_temp_dir()


def test_a_sweep_is_not_run_from_outside_of_its_cluster(tmp_path: Path) -> None:
    refuse_client(run_of(tmp_path, cluster={"address": "head:6379"}))
    with pytest.raises(ResourceError, match=r"^cluster.address: Ray Tune would run .* found: 'ray://head:10001'"):
        refuse_client(run_of(tmp_path, cluster={"address": "ray://head:10001"}))


def test_a_local_ray_has_no_labels_and_no_second_node(tmp_path: Path) -> None:
    check_one_node(run_of(tmp_path, learner={"placement": "spread", "workers": 2}))
    check_one_node(run_of(tmp_path, learner={"placement": "strict_spread", "workers": 1}))
    with pytest.raises(ResourceError, match=r"learner\.labels: a local Ray is one node without labels; found: .*big"):
        check_one_node(run_of(tmp_path, learner={"labels": {"size": "big"}}))
    with pytest.raises(ResourceError, match=r"learner\.placement: strict_spread .*found: 2 processes"):
        check_one_node(run_of(tmp_path, learner={"placement": "strict_spread", "workers": 2}))


@pytest.mark.parametrize(
    ("sections", "key"),
    [
        ({"training": {"bf16": True}}, "training.bf16"),
        ({"training": {"bf16_full_eval": True}}, "training.bf16_full_eval"),
        ({"model": {"dtype": "bfloat16"}}, "model.dtype"),
        ({"learner": {"deepspeed": {"bf16": {"enabled": True}}}}, "learner.deepspeed.bf16.enabled"),
    ],
)
def test_bf16_that_this_cpu_emulates_is_told(
    sections: dict[str, Any], key: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = run_of(tmp_path, **sections)
    room = Room.on(Cluster((Node("here", {"CPU": 2.0}),), THIS_MACHINE), need_of(run))
    monkeypatch.setattr(capacity, "has_cpu_bf16", lambda: False)
    (told,) = room.emulated(run)
    assert told.startswith(f"{key}: this CPU has no bf16 arithmetic; torch emulates it")
    assert not Room(room.need, room.nodes, "a cluster", room.placement).emulated(run)  # who knows its processors
    on_gpu = run.model_copy(update={"learner": run.learner.model_copy(update={"resources": {"GPU": 1.0}})})
    assert not room.emulated(on_gpu)
    monkeypatch.setattr(capacity, "has_cpu_bf16", lambda: True)
    assert not room.emulated(run)


def test_a_float32_run_is_told_nothing_of_bf16(tmp_path: Path) -> None:
    run = run_of(tmp_path, training={"bf16": False}, learner={"deepspeed": {"bf16": {"enabled": "auto"}}})
    assert run.bf16_on_cpu() == []


def test_a_ppo_run_names_each_of_its_models_that_computes_in_bf16(tmp_path: Path) -> None:
    judge = {"name": "judge", "model": "/a/judge", "dtype": "bfloat16"}
    file = ppo_file(tmp_path, "run", model={"path": "/a/policy", "dtype": "bfloat16"}, reward={"sources": [judge]})
    run = load_run(file, [], "ppo").run
    assert run.bf16_on_cpu() == ["model.dtype", "reward.sources.judge.dtype"]


def test_a_missing_tracker_is_named_with_its_package(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"^report_to: 'swanlab' is not installed; expected: `pip install swanlab`"):
        check(run_of(tmp_path, report_to=["swanlab"]))


def test_a_model_folder_must_hold_a_model(tmp_path: Path) -> None:
    model = {"config": None, "tokenizer": None}
    with pytest.raises(ConfigError, match=r"^model\.path: .*a folder without config\.json"):
        check(run_of(tmp_path, model=model | {"path": str(tmp_path)}))
    with pytest.raises(ConfigError, match=r"^model\.path: .*/no/where"):
        check(run_of(tmp_path, model=model | {"path": "/no/where"}))


def test_rows_are_counted_and_the_tokenizer_is_trained_once(tmp_path: Path) -> None:
    write_rows(tmp_path / "test.jsonl", text_rows(7))
    run = run_of(tmp_path, data={"eval": str(tmp_path / "test.jsonl")})
    assert check(run).rows == {"data.train": 60, "data.eval": 7}
    assert check(run).columns == {"data.train": "text", "data.eval": "text"}
    file = tmp_path / "runs" / "a" / "tokenizer" / "tokenizer.json"
    written = file.stat().st_mtime_ns
    assert check(run).rows == {"data.train": 60, "data.eval": 7}
    assert file.stat().st_mtime_ns == written


def test_a_problem_in_the_evaluation_rows_names_them(tmp_path: Path) -> None:
    write_rows(tmp_path / "test.jsonl", [{"text": "a"}, {"text": None}])
    with pytest.raises(ConfigError, match=r"^data\.eval: row 2: 'text' is missing"):
        check(run_of(tmp_path, data={"eval": str(tmp_path / "test.jsonl")}))


def test_the_plan_says_what_runs_where(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    run = run_of(tmp_path, training={"gradient_accumulation_steps": 3}, lora={"r": 4})
    words = dict(words_of(run, read_shapes(run)[0], Facts({"data.train": 1234})) + processes_of(run, "this machine"))
    assert words["model"].startswith("a new llama, 0.0 million parameters, ")
    assert words["training"] == "LoRA r=4, data parallel"
    assert words["data"] == "1,234 rows"
    assert (words["learner.workers"], words["where"]) == ("2 x CPU 1", "this machine")
    assert words["step"] == "24 rows = 4 a forward pass x 3 accumulated x 2 workers"
    run = run_of(tmp_path, learner={"workers": [1, 2]})
    elastic = dict(words_of(run, {}, Facts({"data.train": 1234})) + processes_of(run, "this machine"))
    assert elastic["learner.workers"] == "1 to 2 x CPU 1"
    assert elastic["step"] == "8 rows = 4 a forward pass x 2 workers; fewer accumulate more"


def test_a_ray_that_does_not_start_is_told_in_one_message(monkeypatch: pytest.MonkeyPatch) -> None:
    def times_out(**_: Any) -> None:
        raise Exception("The current node timed out during startup.\nmore")

    monkeypatch.setattr("ray.init", times_out)
    with pytest.raises(
        RunError, match=r"Ray did not start on this machine: The current node timed out during startup\.;"
    ):
        _start_local(Need(()))
