"""Whether all nodes of a cluster see the run directory; asked before anything is started on them."""

import os
import secrets
from typing import Any

import ray
import ray.exceptions
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from raytrl.errors import ConfigError, ResourceError
from raytrl.launch.session.nodes import uses_ray_client
from raytrl.rundir import RunDirectory

_LIMIT_S = 120.0  # for a process to start on each node
_MARK = ".seen-by-driver"


def check_storage(run_dir: RunDirectory) -> None:
    """Every node must read what this process has written there. Nodes that join later are checked by Ray Train.

    Raises:
        ConfigError: a node sees another folder, or none, or may not write.
        ResourceError: a node did not answer, or has no raytrl.
    """
    nodes = {node["NodeID"]: node["NodeManagerAddress"] for node in ray.nodes() if node["Alive"]}
    if not run_dir.is_local or (len(nodes) < 2 and not uses_ray_client()):  # a URI is the same everywhere
        return
    token = secrets.token_hex(8)
    run_dir.write(_MARK, token)
    try:
        look = ray.remote(num_cpus=0, max_retries=0)(_look)
        asked = {
            look.options(scheduling_strategy=NodeAffinitySchedulingStrategy(node, soft=False)).remote(
                run_dir.at(_MARK), token
            ): address
            for node, address in nodes.items()
        }
        done, waiting = ray.wait(list(asked), num_returns=len(asked), timeout=_LIMIT_S)
        if waiting:
            silent = sorted(asked[answer] for answer in waiting)
            raise ResourceError(
                f"output_dir: nodes did not say within {_LIMIT_S:g} s whether they see the run directory; found: "
                f"{', '.join(silent)}; is their Ray busy, or their disk gone?"
            )
        found = {asked[answer]: _answer(answer, asked[answer]) for answer in done}
        wrong = [f"node {address}: {text}" for address, text in sorted(found.items()) if text]
        if wrong:
            raise ConfigError(
                f"output_dir: not all nodes see the run directory {run_dir.path}; found: {'; '.join(wrong)}; expected: a "
                f"disk that all {len(nodes)} nodes share, or a URI such as s3://bucket/path"
            )
    finally:
        run_dir.delete(_MARK)


def _answer(ticket: Any, address: str) -> str:
    try:
        return str(ray.get(ticket))
    except ray.exceptions.RayTaskError as error:  # above all: raytrl cannot be imported there
        raise ResourceError(f"node {address}: cannot run raytrl: {str(error).strip().splitlines()[-1]}") from None
    except ray.exceptions.RayError as error:
        raise ResourceError(f"node {address}: was lost while it was asked: {type(error).__name__}") from None


def _look(file: str, token: str) -> str:
    """Runs on a node: what is wrong there, or nothing."""
    folder = os.path.dirname(file)
    if not os.path.isdir(folder):
        return "no such folder"
    if not os.path.isfile(file):
        return "a folder of the same name without the driver's files"
    with open(file, encoding="utf-8") as stream:
        if stream.read() != token:
            return "a folder of the same name with other files"
    return "" if os.access(folder, os.W_OK | os.X_OK) else "the folder may not be written to"
