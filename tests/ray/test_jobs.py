"""Runs as Ray jobs, on a Ray that was started on its own with token authentication: submitted, stopped, continued."""

import json
import os
import pty
import re
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml

from tests.ppo_files import make_files, ppo_file
from tests.runs import (
    TINY_LLAMA,
    free_port,
    is_committed,
    last_step,
    metrics,
    output_of,
    raytrl,
    start,
    text_rows,
    wait_for,
    write_rows,
)

BIN = str(Path(sys.executable).parent)
RAY = (sys.executable, "-c", "from ray.scripts.scripts import main; main()")  # the command `ray` of this environment
TOKEN = "a-token-of-the-tests-and-of-nothing-else"
SECRET = "what-no-log-may-hold"


@pytest.fixture(scope="module")
def head() -> Iterator[dict[str, str]]:
    """A head node with 2 CPUs; yields the variables by which a client finds it and may speak to it."""
    ports = [free_port() for _ in range(4)]
    folder = tempfile.mkdtemp(prefix="rt", dir="/tmp")  # sockets below it: their paths may only be short
    environment = os.environ | {
        "PATH": f"{BIN}:{os.environ['PATH']}",  # a job's command is looked up there
        "RAY_AUTH_MODE": "token",
        "RAY_AUTH_TOKEN": TOKEN,
        "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": "0.2",
        "RAY_GRACEFUL_SHUTDOWN_DRAIN_TIMEOUT_S": "1",
        "IN_CLUSTER": SECRET,
    }
    process = subprocess.Popen(
        [
            *(*RAY, "start", "--head", "--block", "--disable-usage-stats", "--num-cpus=2"),
            *(f"--port={ports[0]}", f"--dashboard-port={ports[1]}", f"--ray-client-server-port={ports[2]}"),
            *(f"--dashboard-agent-listen-port={ports[3]}", f"--temp-dir={folder}"),
            "--object-store-memory=200000000",
        ],
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    found = {
        "RAY_API_SERVER_ADDRESS": f"http://127.0.0.1:{ports[1]}",
        "RAY_AUTH_MODE": "token",
        "RAY_AUTH_TOKEN": TOKEN,
    }
    wait_for("the job server", lambda: _answers(ports[1]), process)
    yield found | {"GCS": f"127.0.0.1:{ports[0]}", "CLIENT": f"ray://127.0.0.1:{ports[2]}"}
    process.send_signal(signal.SIGTERM)
    try:
        process.wait(timeout=60)
    finally:
        process.kill()
        shutil.rmtree(folder, ignore_errors=True)


def _answers(port: int) -> bool:
    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", port)) == 0


@pytest.fixture
def client(head: dict[str, str], monkeypatch: pytest.MonkeyPatch) -> dict[str, str]:
    for name, value in head.items():
        monkeypatch.setenv(name, value)
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    return head


@pytest.fixture(scope="module")
def project(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A working directory: data and run files in it, by relative paths, and a large folder that git ignores."""
    folder = tmp_path_factory.mktemp("project")
    write_rows(folder / "train.jsonl", text_rows(64))
    (folder / ".gitignore").write_text("large/\n")
    (folder / "large").mkdir()
    with open(folder / "large/model.bin", "wb") as file:
        file.truncate(600 * 2**20)
    (folder.parent / "secret.txt").write_text(SECRET)
    return folder


def sft_file(project: Path, name: str, **training: object) -> Path:
    """Writes a run file whose results lie beside the project, as on shared storage; returns the run directory."""
    shared = project.parent / f"{project.name}-shared"
    values = {
        "kind": "sft",
        "name": name,
        "output_dir": str(shared),
        "model": {"config": TINY_LLAMA, "tokenizer": {"vocab_size": 300}},
        "data": {"train": "train.jsonl"},
        "training": {"max_steps": 4, "per_device_train_batch_size": 4, "max_length": 32} | training,
        "checkpoint": {"every": 2},
        "report_to": [],
    }
    (project / f"{name}.yaml").write_text(yaml.safe_dump(values))
    return shared / name


def job_info(word: str) -> str:
    """All that Ray tells of the jobs whose id has this word in it.

    Asked in a process of its own: Ray reads the kind of authentication once, and other tests here switch it off.
    """
    code = (
        "import sys\n"
        "from ray.job_submission import JobSubmissionClient\n"
        "client = JobSubmissionClient()\n"
        "for job in client.list_jobs():\n"
        "    if sys.argv[1] in str(job.submission_id):\n"
        "        print(job, client.get_job_logs(str(job.submission_id)), sep='\\n')\n"
    )
    return subprocess.run([sys.executable, "-c", code, word], text=True, capture_output=True, check=True).stdout


def test_a_run_is_sent_and_its_log_and_status_come_back(client: dict[str, str], project: Path) -> None:
    run = sft_file(project, "sent")
    secrets = ("--secret", "IN_CLUSTER", "--secret", f"IN_FILE={project.parent}/secret.txt")
    output = raytrl("submit", *secrets, "--env", "COLUMNS=150", "--", "sft", "sent.yaml", cwd=project)
    assert "3 files, 0.0 MiB" in output  # run file, rows and .gitignore: not the 600 MiB
    assert "step 4/4" in output
    assert json.loads((run / "manifest.json").read_text())["state"] == "done"
    assert "finished already" in raytrl("submit", "--", "sft", "sent.yaml", cwd=project)
    assert SECRET not in output + job_info("sent")
    assert "IN_FILE=" in job_info("sent")


def test_a_cluster_that_does_not_answer_or_does_not_know_us(client: dict[str, str], project: Path) -> None:
    sft_file(project, "refused")

    def refused(*words: str, **environment: str) -> str:
        return raytrl("submit", *words, "--", "sft", "refused.yaml", status=2, cwd=project, **environment)

    assert "asks for Ray's token" in refused(RAY_AUTH_TOKEN="another")
    assert "no job server answers" in refused("--address", f"http://127.0.0.1:{free_port()}")
    assert not job_info("refused")


def test_a_job_ends_with_its_own_exit_status(client: dict[str, str], project: Path) -> None:
    """2 where the run does not fit the cluster or lacks a secret: `ray job submit` knows only 1."""
    run = sft_file(project, "large")
    output = raytrl("submit", "--", "sft", "large.yaml", "learner.workers=3", status=2, cwd=project)
    assert "learner.workers: 3 x CPU 1 need 3 CPU; found: 2 CPU on the cluster at 'auto'; would fit" in output
    assert not (run / "manifest.json").exists()
    output = raytrl("submit", "--secret", "NOWHERE", "--", "sft", "large.yaml", status=2, cwd=project)
    assert "--secret NOWHERE: is not in the environment" in output


def test_plain_ray_job_submit(client: dict[str, str], project: Path) -> None:
    run = sft_file(project, "plain")
    submit = [*RAY, "job", "submit", "--working-dir", ".", "--"]

    def plain(*words: str) -> subprocess.CompletedProcess[str]:
        command = [*submit, "raytrl", "sft", "plain.yaml", *words]
        return subprocess.run(command, cwd=project, text=True, capture_output=True, timeout=240, check=False)

    done = plain()
    assert done.returncode == 0, done.stdout + done.stderr
    assert len(metrics(run)) == 4
    lost = plain("output_dir=runs")
    assert lost.returncode == 1  # all that `ray job submit` knows
    assert "output_dir: would be lost" in lost.stdout + lost.stderr


def test_a_stopped_job_is_continued_by_the_same_submission(client: dict[str, str], project: Path) -> None:
    run = sft_file(project, "stopped", max_steps=200)  # seconds more than it takes to stop it
    terminal, keyboard = pty.openpty()
    process = subprocess.Popen(
        [sys.executable, "-m", "raytrl", "submit", "--", "sft", "stopped.yaml"],
        cwd=project,
        stdin=keyboard,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env=os.environ | {"COLUMNS": "200"},
    )
    wait_for("a checkpoint", lambda: last_step(run) >= 4, process)
    process.send_signal(signal.SIGINT)
    time.sleep(0.5)
    os.write(terminal, b"y\n")
    output = output_of(process)
    assert process.returncode == 130, output
    assert "was stopped; the same submission continues from the last checkpoint" in output
    assert json.loads((run / "manifest.json").read_text())["state"] == "running"
    cut = last_step(run)
    assert cut < 200

    sent = raytrl("submit", "--no-wait", "--", "sft", "stopped.yaml", cwd=project)
    assert "follow it with the same command" in sent
    output = raytrl("submit", "--", "sft", "stopped.yaml", cwd=project)
    assert "is at this run already" in output
    assert re.search(r"resume +from step ", output)
    assert [row["step"] for row in metrics(run)] == list(range(1, 201))
    for fd in (terminal, keyboard):
        os.close(fd)


@pytest.mark.slow
def test_a_stopped_ppo_job_is_continued_by_plain_ray_job_submit(client: dict[str, str], tmp_path: Path) -> None:
    """All roles inside of a job: each finds model, prompts and reward function in the folder that was sent."""
    folder, run = tmp_path / "project", tmp_path / "shared/aligned"
    folder.mkdir()
    make_files(folder)
    sent = {"model": {"path": "policy"}, "data": {"train": "prompts.jsonl"}, "output_dir": str(run.parent)}
    sent["reward"] = {"sources": [{"name": "spelling", "function": "rule.py:spelling"}]}
    ppo_file(folder, "aligned", ppo={"steps": 24}, **sent)
    process = start("submit", "--", "ppo", "aligned.yaml", cwd=folder)
    wait_for("a checkpoint", lambda: is_committed(run) and last_step(run) >= 4, process)
    job = next(word for word in job_info("ppo-aligned").split("'") if word.startswith("ppo-aligned"))
    subprocess.run([*RAY, "job", "stop", job], text=True, capture_output=True, timeout=120, check=True)
    output = output_of(process)
    assert process.returncode == 130, output
    assert "was stopped; the same submission continues from the last checkpoint" in output
    assert last_step(run) < 24

    command = [*RAY, "job", "submit", "--working-dir", ".", "--", "raytrl", "ppo", "aligned.yaml"]
    done = subprocess.run(command, cwd=folder, text=True, capture_output=True, timeout=240, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert re.search(r"resume +from step ", done.stdout)
    assert [row["step"] for row in metrics(run)] == list(range(1, 25))
    assert (run / "model/model.safetensors").is_file()


@pytest.mark.slow
@pytest.mark.parametrize("how", ["address", "auto"])
def test_a_driver_outside_of_a_job_joins_the_cluster(client: dict[str, str], project: Path, how: str) -> None:
    run = sft_file(project, f"joined-{how}")
    if how == "address":
        output = raytrl("sft", f"joined-{how}.yaml", f"cluster.address={client['GCS']}", cwd=project)
    else:
        output = raytrl("sft", f"joined-{how}.yaml", "cluster.address=auto", cwd=project, RAY_ADDRESS=client["GCS"])
    assert "this machine" not in output
    assert len(metrics(run)) == 4


def test_a_driver_that_is_no_node_joins_the_cluster_once(client: dict[str, str], tmp_path: Path) -> None:
    """Through `ray://`, with PPO: actors of the driver's, Ray Train, and the check that the cluster sees its disk."""
    make_files(tmp_path)
    before = num_drivers()
    file = ppo_file(tmp_path, "client", ppo={"steps": 4})
    output = raytrl("ppo", file, f"cluster.address={client['CLIENT']}")
    assert f"the cluster at '{client['CLIENT']}'" in output
    assert [row["step"] for row in metrics(tmp_path / "runs/client")] == [1, 2, 3, 4]
    assert num_drivers() == before + 2  # the run, and who counted before


def num_drivers() -> int:
    """Processes that have ever joined this cluster to run something; the one that counts is one of them."""
    code = "import ray\nray.init(log_to_driver=False)\nfrom ray._private.state import jobs\nprint(len(jobs()))"
    environment = os.environ | {"RAY_ADDRESS": os.environ["GCS"]}
    done = subprocess.run([sys.executable, "-c", code], text=True, capture_output=True, check=True, env=environment)
    return int(done.stdout.split()[-1])


def test_a_plan_asks_the_cluster(client: dict[str, str], project: Path) -> None:
    sft_file(project, "planned")
    process = start("plan", "planned.yaml", f"cluster.address={client['GCS']}", cwd=project)
    output = output_of(process)
    assert process.returncode == 0, output
    assert "1 x CPU 2, " in output
