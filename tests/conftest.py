"""Settings of every test process and of the processes it starts; in place before torch is imported."""

import os
import re
import time
from collections.abc import Iterator

import psutil
import pytest

os.environ["OMP_NUM_THREADS"] = "1"  # busy processes with several threads each slow one another down tenfold
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["RAYTRL_TESTS"] = str(os.getpid())  # by which what they start is known, whoever becomes its parent

_OF_RAY = re.compile(r"^ray::|/ray/core/|/ray/dashboard/|/ray/_private/")
_LAST_S = 60


@pytest.fixture(scope="session", autouse=True)
def no_process_outlives_its_cluster() -> Iterator[None]:
    yield
    limit = time.monotonic() + _LAST_S
    while left := _left_over():
        assert time.monotonic() < limit, f"still there: {left}"
        time.sleep(0.2)


def _left_over() -> list[str]:
    """Processes of Ray that these tests have started."""
    found = []
    for process in psutil.process_iter():
        try:
            line = " ".join(process.cmdline())
            if _OF_RAY.search(line) and process.environ().get("RAYTRL_TESTS") == os.environ["RAYTRL_TESTS"]:
                found.append(f"{process.pid} (parent {process.ppid()}) {line[:150]}")
        except psutil.Error:  # ended while we looked, or is somebody else's
            continue
    return found
