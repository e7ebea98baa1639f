"""cluster/slurm/raytrl.sbatch as Slurm runs it, but for Slurm: its commands are stand-ins that start what they are told."""

import os
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from tests.runs import ENVIRONMENT, is_committed, metrics, output_of, run_file, text_rows, wait_for, write_rows

pytestmark = pytest.mark.slow

SRUN = """#!/usr/bin/env bash
while [[ $1 == --* ]]; do shift; done
exec "$@"
"""
SCONTROL = """#!/usr/bin/env bash
if [[ $1 == show ]]; then printf 'localhost\\nlocalhost\\n'; else echo "$@" >> "$REQUEUED"; fi
"""


@pytest.fixture
def slurm(tmp_path: Path) -> Iterator[dict[str, str]]:
    """The environment of a batch script of two nodes."""
    write_rows(tmp_path / "train.jsonl", text_rows(64))
    for name, text in (("srun", SRUN), ("scontrol", SCONTROL)):
        (tmp_path / name).write_text(text)
        (tmp_path / name).chmod(0o755)
    python = Path(sys.executable).parent
    temp = tempfile.mkdtemp(prefix="r-", dir="/tmp")
    yield {
        **os.environ,
        **ENVIRONMENT,
        "PATH": f"{tmp_path}:{python}:{os.environ['PATH']}",
        "RAY_TMPDIR": temp,
        "RAY_AUTH_MODE": "disabled",
        "SLURM_JOB_NODELIST": "localhost",
        "SLURM_JOB_NUM_NODES": "2",
        "SLURM_JOB_ID": str(os.getpid()),
        "REQUEUED": str(tmp_path / "requeued"),
    }
    shutil.rmtree(temp, ignore_errors=True)


def sbatch(environment: dict[str, str], *words: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        ["bash", "cluster/slurm/raytrl.sbatch", *words],
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def test_status_stop_and_requeue(tmp_path: Path, slurm: dict[str, str]) -> None:
    """A wrong request: its status. Told that time is up: stopped and queued again. Started again: continues, ends with 0."""
    process = sbatch(slurm, "sft", str(tmp_path / "none.yaml"))
    output = output_of(process)
    assert process.returncode == 2, output
    assert "none.yaml" in output

    steps = ("training.max_steps=400", "checkpoint.every=5")
    file, run = run_file(tmp_path, "job", learner={"workers": 2, "resources": {"CPU": 0.5}}), tmp_path / "runs/job"
    process = sbatch(slurm, "sft", file, *steps)
    wait_for("a checkpoint", lambda: is_committed(run), process)
    family = psutil.Process(process.pid).children(recursive=True)
    process.send_signal(signal.SIGTERM)
    output = output_of(process)
    assert process.returncode == 130, output
    assert (tmp_path / "requeued").read_text() == f"requeue {slurm['SLURM_JOB_ID']}\n"
    _, alive = psutil.wait_procs(family, timeout=30)
    assert not alive

    process = sbatch(slurm, "sft", file, *steps)
    output = output_of(process)
    assert process.returncode == 0, output
    assert "continues from step" in output
    assert [row["step"] for row in metrics(run)] == list(range(1, 401))
