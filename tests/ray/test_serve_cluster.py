"""`raytrl serve` on a cluster whose Ray Serve has applications of others, and what Ray's metrics show of it."""

import contextlib
import json
import os
import re
import subprocess
import sys
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.nodes import Nodes, ray_nodes
from tests.ppo_files import make_policy
from tests.runs import ENVIRONMENT, free_port, kill_everything, raytrl, wait_for
from tests.served import served
from tests.unit.reward.conftest import save_classifier

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]

# Somebody else's application: a policy, by `application` as KubeRay calls it.
_OTHER = """
import sys, ray
from ray import serve
from raytrl.launch.serving.application import application
ray.init(address=sys.argv[1], namespace="x")
serve.start(http_options={"host": "127.0.0.1", "port": int(sys.argv[2])})
args = {"run": sys.argv[3], "name": "other", "api_key": f"OTHER_KEY={sys.argv[4]}", "engine": "vllm"}
serve.run(application(args), name="other", route_prefix="/other")
"""


@pytest.fixture(scope="module")
def cluster() -> Iterator[Nodes]:
    with ray_nodes([4]) as nodes:
        yield nodes


def _status(url: str, key: str | None = None) -> int:
    try:
        headers = {} if key is None else {"Authorization": f"Bearer {key}"}
        with urllib.request.urlopen(urllib.request.Request(url, headers=headers), timeout=30) as answer:
            return int(answer.status)
    except urllib.error.HTTPError as error:
        return error.code


def test_nothing_but_the_own_application_is_touched(cluster: Nodes, tmp_path: Path) -> None:
    policy, port = make_policy(tmp_path, head_size=32), free_port()
    reward, key = save_classifier(tmp_path / "reward"), tmp_path / "key"
    key.write_text("a-key-of-theirs")
    environment = {**os.environ, **ENVIRONMENT, "RAY_AUTH_MODE": "disabled", "PYTHONPATH": ":".join(sys.path)}
    words = [sys.executable, "-c", _OTHER, cluster.address, str(port), policy, str(key)]
    done = subprocess.run(words, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    other = f"http://127.0.0.1:{port}/other/v1/models"
    assert _status(other) == 401
    assert _status(other, "a-key-of-theirs") == 200

    mine = [
        str(reward),
        f"cluster.address={cluster.address}",
        f"output_dir={tmp_path}/runs",
        "serve.resources={CPU: 1}",
    ]
    at = f"serve.port={port}"
    for wrong, told in (
        (["serve.port=1", "serve.route=/mine"], f"expected: serve.port={port}"),
        ([at, "serve.route=/other"], "the application 'other' has it"),
        ([at, "serve.route=/mine", "serve.name=other"], "another application of this cluster has that name"),
    ):
        assert told in raytrl("serve", *mine, *wrong, status=2)
        assert _status(other, "a-key-of-theirs") == 200
    with served(tmp_path, *mine, "serve.route=/mine", port=port) as server:
        body = {"prompts": ["a"], "completions": ["b"]}
        assert server.ask("/mine/score", body)[0] == 200
        assert server.ask("/score", body)[0] == 404
        kill_everything(server.process)  # the application lives on the cluster, and goes on
        assert server.ask("/mine/score", body)[0] == 200
    told = raytrl("serve", *mine, at, "serve.route=/mine", "name=another", status=2)
    assert f"of {tmp_path}/runs/serve-reward" in told  # somebody else's, though of the same model
    with served(tmp_path, *mine, "serve.route=/mine", port=port) as server:  # and is taken over
        assert server.ask("/mine/score", body)[0] == 200
        shown = _all_shown(cluster, server.process)
        server.stop()
        assert server.ask("/mine/score", body)[0] == 404
    assert _status(other, "a-key-of-theirs") == 200
    assert not shown, f"the dashboard asks for what Ray does not export: {shown}"


def _all_shown(cluster: Nodes, process: "subprocess.Popen[str]") -> set[str]:
    """What the dashboard's panels of serving ask for, and Ray's metrics do not have."""
    panels = json.loads(Path("cluster/monitoring/grafana.json").read_text())["panels"]
    wanted = {
        name for panel in panels for t in panel["targets"] for name in re.findall(r"ray_(?:serve|vllm)_\w+", t["expr"])
    }
    assert wanted
    missing = set(wanted)

    def found() -> bool:
        text = cluster.metrics()
        missing.intersection_update(
            {name for name in missing if not re.search(rf"^{name}(_bucket)?{{", text, re.MULTILINE)}
        )
        return not missing

    with contextlib.suppress(AssertionError):
        wait_for("metrics", found, process, 60)
    return missing
