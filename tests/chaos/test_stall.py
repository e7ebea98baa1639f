"""What hangs is ended within its limit; what only says little is not."""

import os
import signal
import time
from pathlib import Path

import pytest

from tests.runs import last_step, output_of, raytrl, run_file, start, text_rows, wait_for, worker_pids, write_rows

pytestmark = pytest.mark.slow
LIMIT_S = 10.0


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    write_rows(tmp_path / "train.jsonl", text_rows(80))
    return tmp_path


def test_a_run_that_logs_nothing_for_longer_than_the_limit_is_at_work(folder: Path) -> None:
    training = {"max_steps": 1200, "logging_steps": 5000}
    file = run_file(
        folder,
        "quiet",
        training={"per_device_train_batch_size": 4, "max_length": 32, **training},
        learner={"workers": 1, "stall_timeout_s": LIMIT_S / 4},
        checkpoint={"every": 5000},
    )
    before = time.monotonic()
    raytrl("sft", file)
    assert time.monotonic() - before > LIMIT_S  # else it would show nothing: take more steps


def test_a_worker_that_hangs_ends_the_run(folder: Path) -> None:
    file = run_file(folder, "hung", learner={"workers": 2, "stall_timeout_s": LIMIT_S}, training={"max_steps": 5000})
    process = start("sft", file, RAY_TRAIN_HEALTH_CHECK_TIMEOUT_S="600")  # which would see a process that is stopped
    wait_for("step 3", lambda: last_step(folder / "runs/hung") >= 3, process)
    for pid in worker_pids(process)[1:]:
        os.kill(pid, signal.SIGSTOP)
    stopped = time.monotonic()
    output = output_of(process)
    assert process.returncode == 1, output
    assert f"has waited {LIMIT_S:g} s (learner.stall_timeout_s)" in output
    assert time.monotonic() - stopped > LIMIT_S
