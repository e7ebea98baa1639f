"""The nodes there are: this machine as a local Ray would count it, and a cluster's."""

import json
import os
import re
from collections.abc import Mapping, Sequence
from typing import Any

from raytrl.errors import ResourceError
from raytrl.plan.cluster import Node
from raytrl.plan.where import THIS_MACHINE

_ASK_S = 120.0  # for a process to start on a busy cluster
_NO_KIND = re.compile("node_[0-9a-f]{56}")  # what Ray calls a node that no autoscaler keeps


def machine_resources() -> dict[str, float]:
    """CPUs and GPUs of this machine, as a local Ray would count them."""
    import ray._private.accelerators.nvidia_gpu as nvidia  # no public counterpart that does not start Ray

    visible = nvidia.NvidiaGPUAcceleratorManager.get_current_process_visible_accelerator_ids()
    gpus = (
        len(visible) if visible is not None else nvidia.NvidiaGPUAcceleratorManager.get_current_node_num_accelerators()
    )
    return {"CPU": float(len(os.sched_getaffinity(0))), "GPU": float(gpus)}


def machine_node() -> Node:
    """This machine, as a local Ray would count it."""
    return Node(THIS_MACHINE, machine_resources(), memory_bytes() / 2**30, _gpu_gib())


def _gpu_gib() -> float | None:
    """Memory of the smallest GPU of this machine; None without one."""
    import ray._private.thirdparty.pynvml as pynvml  # part of Ray: its own way to count GPUs

    try:
        pynvml.nvmlInit()
    except pynvml.NVMLError:  # no driver, no GPU
        return None
    handles = [pynvml.nvmlDeviceGetHandleByIndex(i) for i in range(pynvml.nvmlDeviceGetCount())]
    sizes = [pynvml.nvmlDeviceGetMemoryInfo(handle).total / 2**30 for handle in handles]
    pynvml.nvmlShutdown()
    return min(sizes, default=None)


def cluster_nodes() -> list[Node]:
    """The nodes that the cluster has which this process has joined."""
    import ray

    nodes: list[Node] = []
    for entry in ray.nodes():
        if not entry["Alive"]:
            continue
        resources = {name: amount for name, amount in entry["Resources"].items() if not name.startswith("node:")}
        ram = resources.pop("memory", 0.0) + resources.pop("object_store_memory", 0.0)
        labels = entry.get("Labels", {})
        nodes.append(Node(_node_name(entry, nodes), resources, ram / 2**30 or None, labels=labels))
    return nodes


def is_autoscaled() -> bool:
    """Whether an autoscaler is at work. What it may add, Ray does not tell (its own config stays with it)."""
    import ray

    if uses_ray_client():  # has no way to ask; a process of the cluster has
        try:
            return bool(ray.get(ray.remote(num_cpus=0, max_retries=0)(is_autoscaled).remote(), timeout=_ASK_S))
        except ray.exceptions.RayError as error:  # above all: raytrl cannot be imported there
            raise ResourceError(
                f"cluster.address: the cluster cannot run raytrl: {str(error).strip().splitlines()[-1]}; expected: the "
                f"same raytrl there as here"
            ) from None
    from ray._private.ray_constants import DEBUG_AUTOSCALING_STATUS  # as `ray status` reads it
    from ray.autoscaler.v2.sdk import get_cluster_status
    from ray.experimental.internal_kv import _internal_kv_get

    status = json.loads(_internal_kv_get(DEBUG_AUTOSCALING_STATUS) or b"{}")
    kinds = (status.get("autoscaler_report") or {}).get("node_type_mapping") or {}
    if any(not _NO_KIND.fullmatch(kind) for kind in kinds.values()):
        return True
    shown = get_cluster_status(ray.get_runtime_context().gcs_address)  # its second version writes no status
    return any(node.instance_id for node in [*shown.active_nodes, *shown.idle_nodes])


def uses_ray_client() -> bool:
    """Whether this process has joined through `ray://`: it is none of the cluster's own, and sees no node's disk."""
    import ray.util.client

    return bool(ray.util.client.ray.is_connected())


def _node_name(entry: Mapping[str, Any], others: Sequence[Node]) -> str:
    name = str(entry["NodeManagerAddress"])
    same = sum(other.name.split(" ")[0] == name for other in others)  # several Ray nodes on one machine
    return f"{name} ({same + 1})" if same else name


def memory_bytes() -> int:
    """RAM of this machine, or the limit of the container."""
    from ray._common.utils import get_system_memory

    return int(get_system_memory())
