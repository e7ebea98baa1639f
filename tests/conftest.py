"""Settings of every test process and of the processes it starts; in place before torch is imported."""

import contextlib
import os
import re
import time
import warnings
from collections.abc import Iterator

import psutil
import pytest

os.environ["OMP_NUM_THREADS"] = "1"  # busy processes with several threads each slow one another down tenfold
os.environ["HF_HUB_OFFLINE"] = "1"
# What whoever starts the tests has for himself.
_HIS_OWN = (
    "FORCE_COLOR",
    "TTY_COMPATIBLE",
    "TTY_INTERACTIVE",
    "RAY_ADDRESS",
    "http_proxy",
    "HTTP_PROXY",
    "all_proxy",
    "ALL_PROXY",
)
for _name in _HIS_OWN:
    os.environ.pop(_name, None)
os.environ["RAYTRL_TESTS"] = str(os.getpid())  # by which what they start is known, whoever becomes its parent

_OF_RAY = re.compile(r"^ray::|/ray/core/|/ray/dashboard/|/ray/_private/")
# What holds models, and a GPU where there is one. Of Ray's own, a TrainController has been seen to outlive a head that was
# stopped under it: it waits for its own end in Ray's code. That is told, and ended.
_OURS = re.compile(r"^ray::(RayTrainWorker|RolloutActor|RewardActor|MeasuringActor|Board)")
_LAST_S = 60


@pytest.fixture(scope="session", autouse=True)
def no_process_outlives_its_cluster() -> Iterator[None]:
    yield
    limit = time.monotonic() + _LAST_S
    while (left := _left_over()) and time.monotonic() < limit:
        time.sleep(0.2)
    for process, line in left:
        warnings.warn(f"outlived its cluster: {line}", RuntimeWarning, stacklevel=1)
        with contextlib.suppress(psutil.NoSuchProcess):
            process.kill()
    assert not [line for _, line in left if _OURS.search(line)]


def _left_over() -> list[tuple[psutil.Process, str]]:
    """Processes of Ray that these tests have started, with their names."""
    found = []
    for process in psutil.process_iter():
        try:
            line = " ".join(process.cmdline())
            if _OF_RAY.search(line) and process.environ().get("RAYTRL_TESTS") == os.environ["RAYTRL_TESTS"]:
                found.append((process, line[:150]))
        except psutil.Error:  # ended while we looked, or is somebody else's
            continue
    return found
