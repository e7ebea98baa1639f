"""A cluster of a head alone, whose other nodes come when a run asks for them: Ray's autoscaler with its stand-in cloud."""

import contextlib
import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from tests.ppo_files import make_files, ppo_file
from tests.runs import free_port, metrics, raytrl, wait_for

pytestmark = pytest.mark.slow
_CLOUD = "ray.autoscaler._private.fake_multi_node.node_provider.FakeMultiNodeProvider"  # its nodes are raylets here
_HEAD_ID = "f" * 51 + "00000"
_HEAD_TYPE = "ray.head.default"  # so that cloud calls it


@pytest.fixture(params=["v1", "v2"])
def autoscaled(request: pytest.FixtureRequest) -> Iterator[str]:
    """The address of a head without CPUs; up to three nodes of 1 CPU may come."""
    folder, port = Path(tempfile.mkdtemp(prefix="r-", dir="/tmp")), free_port()
    (folder / "cluster.json").write_text(json.dumps(cluster(f"127.0.0.1:{port}")))
    environment = os.environ | {
        "RAY_AUTH_MODE": "disabled",
        "RAY_FAKE_CLUSTER": "1",
        "AUTOSCALER_UPDATE_INTERVAL_S": "1",
        "RAY_GRACEFUL_SHUTDOWN_DRAIN_TIMEOUT_S": "1",
    }
    if request.param == "v2":
        environment |= {
            "RAY_enable_autoscaler_v2": "1",
            "RAY_CLOUD_INSTANCE_ID": _HEAD_ID,
            "RAY_OVERRIDE_NODE_ID_FOR_TESTING": _HEAD_ID,
        }
    log = folder / "log"
    with open(log, "w") as output:
        process = subprocess.Popen(
            [
                *(sys.executable, "-m", "ray.scripts.scripts", "start", "--head", "--block", "--num-cpus=0"),
                *("--node-ip-address=127.0.0.1", f"--port={port}", f"--dashboard-port={free_port()}"),
                *(f"--ray-client-server-port={free_port()}", f"--dashboard-agent-listen-port={free_port()}"),
                *(f"--temp-dir={folder}", "--object-store-memory=100000000"),
                f"--autoscaling-config={folder}/cluster.json",
            ],
            env=environment,
            stdout=output,
            stderr=subprocess.STDOUT,
            text=True,
        )
    wait_for("Ray", lambda: "Ray runtime started" in log.read_text(), process)
    yield f"127.0.0.1:{port}"
    head = psutil.Process(process.pid)
    family = [*head.children(recursive=True), head]  # the nodes that were added are the autoscaler's children
    process.terminate()
    _, alive = psutil.wait_procs(family, timeout=20)
    for left in alive:
        with contextlib.suppress(psutil.NoSuchProcess):
            left.kill()
    process.wait()
    shutil.rmtree(folder, ignore_errors=True)


def cluster(address: str) -> dict[str, object]:
    """What a cluster launcher's file says, whole: Ray fills in nothing for a cloud that it does not know."""
    lists = ["initialization_commands", "rsync_exclude", "rsync_filter", "cluster_synced_files"]
    lists += [f"{which}setup_commands" for which in ("", "head_", "worker_")]
    lists += ["head_start_ray_commands", "worker_start_ray_commands"]
    worker = {
        "resources": {"CPU": 1, "object_store_memory": 10**8},
        "node_config": {},
        "min_workers": 0,
        "max_workers": 3,
    }
    return {
        "cluster_name": "tests",
        "provider": {
            "type": "external",
            "module": _CLOUD,
            "gcs_address": address,
            "launch_multiple": True,
            "head_node_id": _HEAD_ID,
        },
        "available_node_types": {
            "worker": worker,
            _HEAD_TYPE: {"resources": {"CPU": 0}, "node_config": {}, "max_workers": 0},
        },
        "head_node_type": _HEAD_TYPE,
        "max_workers": 3,
        "upscaling_speed": 1.0,
        "idle_timeout_minutes": 5,
        "file_mounts": {},
        "file_mounts_sync_continuously": False,
        "auth": {},
        "docker": {},
        **{key: [] for key in lists},
    }


def wait_for_report(address: str) -> None:
    """A cluster is seen to grow from its autoscaler's first report on, seconds after its start."""
    code = (
        "import sys, time, ray\n"
        "from raytrl.launch.session.session import is_autoscaled\n"
        "ray.init(sys.argv[1], log_to_driver=False)\n"
        "deadline = time.monotonic() + 60\n"
        "while not is_autoscaled():\n"
        "    assert time.monotonic() < deadline\n"
        "    time.sleep(0.5)\n"
    )
    environment = os.environ | {"RAY_AUTH_MODE": "disabled"}
    done = subprocess.run(
        [sys.executable, "-c", code, address], text=True, capture_output=True, check=False, env=environment
    )
    assert done.returncode == 0, done.stderr


def test_a_run_whose_nodes_come_when_it_asks(tmp_path: Path, autoscaled: str) -> None:
    make_files(tmp_path)
    file = ppo_file(tmp_path, "grown", ppo={"steps": 4})
    note = (
        "no room yet for 2 of rollout.actors, 1 of reward.actors, 2 of learner.workers: the autoscaler of the cluster"
    )
    wait_for_report(autoscaled)
    where = (f"cluster.address={autoscaled}",)
    assert note in raytrl("plan", file, *where, RAY_AUTH_MODE="disabled")
    assert note in raytrl("ppo", file, *where, RAY_AUTH_MODE="disabled")
    assert [row["step"] for row in metrics(tmp_path / "runs/grown")] == [1, 2, 3, 4]
    assert note not in raytrl("plan", file, *where, RAY_AUTH_MODE="disabled")  # they are there now
