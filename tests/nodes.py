"""A Ray cluster of several nodes on this machine: each a raylet of its own at a loop-back address of its own."""

import json
import os
import shutil
import tempfile
import urllib.request
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from tests.runs import free_port

os.environ["RAY_AUTH_MODE"] = "disabled"  # read when Ray's processes start


class Nodes:
    """Numbered from 1; the head is a node without CPUs."""

    def __init__(self) -> None:
        from ray.cluster_utils import Cluster

        self._folder = tempfile.mkdtemp(prefix="r-", dir="/tmp")  # short: Ray's socket paths may have 107 characters
        self._cluster = Cluster(
            initialize_head=True,
            head_node_args={
                "num_cpus": 0,
                "dashboard_port": free_port(),
                "temp_dir": self._folder,
                "object_store_memory": 100 * 2**20,
            },
        )
        self.address: str = self._cluster.address
        self._nodes: list[Any] = []

    def add(self, cpus: float, labels: dict[str, str] | None = None) -> int:
        """Starts a node; only from the main thread."""
        number = len(self._nodes) + 1
        node = self._cluster.add_node(
            num_cpus=cpus, labels=labels or {}, node_ip_address=ip_of(number), object_store_memory=100 * 2**20
        )
        self._nodes.append(node)
        return number

    def kill(self, number: int) -> None:
        """As a power cut: kill -9 of the node's raylet, and its processes end with it."""
        self._cluster.remove_node(self._nodes[number - 1], allow_graceful=False)

    def count(self) -> int:
        """Nodes that are alive, the head included."""
        return sum(node["Alive"] for node in self._cluster.global_state.node_table())

    def metrics(self) -> str:
        """What Prometheus would be told by all nodes."""
        with open(f"{self._folder}/prom_metrics_service_discovery.json") as file:
            targets = [target for group in json.load(file) for target in group["targets"]]
        texts = []
        for target in targets:
            try:
                texts.append(urllib.request.urlopen(f"http://{target}/metrics", timeout=5).read().decode())
            except OSError:  # a node that was killed
                continue
        return "\n".join(texts)

    def shutdown(self) -> None:
        self._cluster.shutdown()
        shutil.rmtree(self._folder, ignore_errors=True)


def ip_of(number: int) -> str:
    return f"127.0.0.{number + 1}"


def number_of(ip: str) -> int:
    return int(ip.rpartition(".")[2]) - 1


@contextmanager
def ray_nodes(cpus: Sequence[float], labels: Sequence[dict[str, str]] = ()) -> Iterator[Nodes]:
    """A head without CPUs, and a node for each entry."""
    nodes = Nodes()
    try:
        for i, count in enumerate(cpus):
            nodes.add(count, labels[i] if labels else None)
        yield nodes
    finally:
        nodes.shutdown()
