"""Whole runs by the command a user types: real Ray, real TRL, two workers, and what they leave behind."""

import json
import re
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import pytest

from raytrl.records.metrics import METRICS
from tests.runs import (
    free_port,
    is_committed,
    kill_everything,
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
    path = tmp_path_factory.mktemp("runs")
    write_rows(path / "train.jsonl", text_rows(64))
    write_rows(path / "test.jsonl", text_rows(16, seed=1))
    return path


_BEGUN = """
import sys, time, psutil, ray
from raytrl.config.load import load_run
from raytrl.launch.session.session import Session
from raytrl.plan.cluster import Need

run = load_run(sys.argv[1], []).run
try:
    with Session(run) as session:
        session.begin(Need(()))
        raise ValueError("a check that fails")
except ValueError:
    assert not ray.is_initialized() and not psutil.Process().children(recursive=True)
with Session(run) as session:
    session.begin(Need(()))
    with session.running(Need(())):
        raylet = [each for each in psutil.Process().children() if each.name() == "raylet"]
        assert ray.get(ray.remote(lambda: "works").remote()) == "works"
        assert raylet[0].is_running()  # Linux ends children with the thread that started them
    assert not ray.is_initialized()
"""


def test_a_ray_that_was_begun_ends_with_a_check_that_fails_and_else_serves_the_run(folder: Path) -> None:
    file = run_file(folder, "begun")
    subprocess.run([sys.executable, "-c", _BEGUN, file], check=True, timeout=120)


def test_a_run_from_nothing_and_again(folder: Path) -> None:
    """One run file: trained, evaluated, recorded; not trained twice; refused with other settings; anew with --fresh."""
    file = run_file(folder, "whole", data={"eval": str(folder / "test.jsonl")}, report_to=["tensorboard"])
    output = raytrl("sft", file)
    run = folder / "runs/whole"
    assert re.search(r"learner\.workers +2 x CPU 1 ", output)
    assert "full fine-tuning, data parallel" in output
    assert "Traceback" not in output
    assert "Warning" not in output
    rows = metrics(run)
    logged = {key for row in rows for key in row}
    own = {"step", "loss", "grad_norm", "learning_rate", "eval_loss", "eval_mean_token_accuracy", "memory/peak_gib"}
    assert own <= logged & set(METRICS)  # under the names that pages, gauges and sweeps look for; TRL logs more
    assert [row["step"] for row in rows] == list(range(1, 9))
    assert rows[-1]["loss"] < rows[0]["loss"]
    assert rows[-1]["eval_loss"] > 0
    assert all(row["time/step_s"] > 0 for row in rows)
    manifest = json.loads((run / "manifest.json").read_text())
    assert manifest["state"] == "done"
    assert manifest["versions"]["trl"]
    assert "whole.yaml:" in manifest["origins"]["training.max_steps"]
    assert len(list((run / "checkpoints").glob("checkpoint_2*"))) == 2
    assert list((run / "tensorboard").glob("events*"))
    assert not (run / ".scratch").exists()

    before = weights_hash(run / "model")
    assert "finished already" in raytrl("sft", file)
    refused = raytrl("sft", file, "training.learning_rate=1e-3", status=2)
    assert "training.learning_rate was 0.01, now 0.001" in refused
    assert weights_hash(run / "model") == before
    raytrl("sft", file, "training.learning_rate=1e-3", "--fresh")
    assert weights_hash(run / "model") != before


def test_a_failure_in_a_worker_is_one_message(folder: Path) -> None:
    output = raytrl("sft", run_file(folder, "broken", training={"optim": "no_such_optimizer"}), status=1)
    errors = [line for line in output.splitlines() if line.startswith("error:")]
    assert len(errors) == 1, output
    assert "worker" in errors[0]
    assert "on node" in errors[0]
    assert "no_such_optimizer" in errors[0]
    assert "Traceback" not in output
    assert "Traceback" in (folder / "runs/broken/failures.log").read_text()


def test_fewer_workers_go_on_and_say_what_changes(folder: Path) -> None:
    file = run_file(folder, "shrunk", training={"max_steps": 100})
    process = start("sft", file)
    run = folder / "runs/shrunk"
    copy = run / "checkpoints/record-before.json"
    on_record: Any = lambda: json.loads(copy.read_text())["checkpoint_results"] if copy.exists() else []  # noqa: E731
    wait_for("two checkpoints", lambda: len(on_record()) == 2, process)
    kill_everything(process)
    # And a checkpoint that is gone: Ray Train would not begin with such a record.
    record = json.loads((run / "checkpoints/checkpoint_manager_snapshot.json").read_text())
    before, latest = record["checkpoint_results"]
    shutil.rmtree(run / "checkpoints" / latest["checkpoint_dir_name"])
    output = raytrl("sft", file, "learner.workers=1")
    assert f"its folder is gone: goes on from step {before['metrics']['step']}" in " ".join(output.split())
    assert "with 1 a step takes 4 rows instead of 8" in output
    assert [row["step"] for row in metrics(run)] == list(range(1, 101))


@pytest.mark.slow
def test_a_start_that_another_has_followed_ends_without_a_checkpoint(folder: Path) -> None:
    """As one whose driver was killed, and that does not know it yet."""
    process = start("sft", run_file(folder, "followed", training={"max_steps": 2000}, learner={"max_failures": 0}))
    run = folder / "runs/followed"
    wait_for("a checkpoint", lambda: is_committed(run), process)
    manifest = json.loads((run / "manifest.json").read_text())
    (run / "manifest.json").write_text(json.dumps({**manifest, "starts": 2}))
    output = output_of(process)
    assert process.returncode == 1
    assert "the run was started again meanwhile; this start of it stores nothing more" in " ".join(output.split())


@pytest.mark.slow
def test_zero_checkpoints_keep_their_worker_count(folder: Path) -> None:
    learner = {"workers": 2, "deepspeed": {"zero_optimization": {"stage": 3}, "train_batch_size": "auto"}}
    file = run_file(folder, "zero3", learner=learner)
    process = start("sft", file)
    wait_for("a checkpoint", lambda: is_committed(folder / "runs/zero3"), process)
    kill_everything(process)
    output = raytrl("sft", file, "learner.workers=1", status=2)
    assert "was written by 2 workers under ZeRO-3" in output
    output = raytrl("sft", file)
    assert "continues from step" in output
    assert (folder / "runs/zero3/model/model.safetensors").stat().st_size > 50_000


def test_interrupted_by_sigterm(folder: Path) -> None:
    """A stopped job ends its Ray and keeps its checkpoints."""
    process = start("sft", run_file(folder, "stopped", training={"max_steps": 500}))
    wait_for("step 2", lambda: last_step(folder / "runs/stopped") >= 2, process)
    family = _descendants(process.pid)
    process.send_signal(signal.SIGTERM)
    output = output_of(process)
    assert process.returncode == 130, output
    assert "continues from the last checkpoint" in output
    assert not [pid for pid in family if _alive(pid)]


def _descendants(pid: int) -> list[int]:
    import psutil

    return [child.pid for child in psutil.Process(pid).children(recursive=True)]


def _alive(pid: int) -> bool:
    import psutil

    try:
        psutil.Process(pid).wait(timeout=20)
    except psutil.NoSuchProcess:
        return False
    except psutil.TimeoutExpired:
        return True
    return False


@pytest.fixture
def s3() -> Any:
    """A local S3 server with a bucket; yields the part of a URI behind the path."""
    port = free_port()

    def answers() -> bool:
        with socket.socket() as caller:
            return caller.connect_ex(("127.0.0.1", port)) == 0

    # A process of its own: vLLM, in other tests of this one, touches every object of every loaded module.
    server = subprocess.Popen([sys.executable, "-m", "moto.server", "-p", str(port)], text=True)
    wait_for("the S3 server", answers, server)
    yield f"?endpoint_override=127.0.0.1:{port}&scheme=http&region=us-east-1&allow_bucket_creation=true"
    server.kill()
    server.wait()


def test_a_run_stored_on_s3(folder: Path, s3: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Logs are the exception: they are in Ray's own folder on each node."""
    from pyarrow import fs

    ray_folder = tempfile.mkdtemp(prefix="r-", dir="/tmp")
    monkeypatch.setenv("RAY_TMPDIR", ray_folder)
    keys = {"AWS_ACCESS_KEY_ID": "test", "AWS_SECRET_ACCESS_KEY": "test"}
    file = run_file(
        folder, "remote", output_dir=f"s3://runs/here{s3}", training={"max_steps": 24}, report_to=["tensorboard"]
    )
    for name, value in keys.items():
        monkeypatch.setenv(name, value)
    bucket, path = fs.FileSystem.from_uri(f"s3://runs/here/remote{s3}")
    bucket.create_dir("runs")

    def names(below: str = "") -> set[str]:
        selector = fs.FileSelector(f"{path}/{below}", allow_not_found=True)
        return {info.base_name for info in bucket.get_file_info(selector)}

    process = start("sft", file)
    wait_for("a checkpoint", lambda: "checkpoint_manager_snapshot.json" in names("checkpoints"), process)
    kill_everything(process)
    output = raytrl("sft", file)
    assert "continues from step" in output
    assert {"config.yaml", "manifest.json", "metrics.jsonl", "model", "checkpoints"} <= names()
    assert {"model.safetensors", "tokenizer.json", "README.md"} <= names("model")
    assert "  tokenizer.json\n" in raytrl("push", f"s3://runs/here/remote{s3}", "someone/remote", "--dry-run")
    with bucket.open_input_stream(f"{path}/metrics.jsonl") as stream:
        steps = [json.loads(line)["step"] for line in stream.readall().decode().splitlines()]
    assert steps[-1] == 24
    curves = [info.size for info in bucket.get_file_info(fs.FileSelector(f"{path}/tensorboard"))]
    assert len(curves) >= 2 and min(curves) > 100  # of both starts
    assert re.search(r"logs +raytrl-remote-[0-9a-f]{8}-\* in Ray's log folder of each node", output)
    logs = Path(ray_folder).rglob("raytrl-remote-*-learner-1.log")  # one a start
    assert "learner 1 v8 hands in the checkpoint of step 8" in "".join(log.read_text() for log in logs)
    shutil.rmtree(ray_folder)
