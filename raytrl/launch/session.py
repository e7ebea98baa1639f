"""Ray for one run: a local Ray that lives as long as the run, or the cluster that the run joins."""

import logging
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

from raytrl.config.runs import Run
from raytrl.errors import ResourceError

# Read by Ray when it is imported or started, so set before that. A user's own setting wins.
_DEFAULTS = {
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": "0.5",  # bounds how often a checkpoint can be committed
    "RAY_TRAIN_ENABLE_PRINT_PATCH": "0",  # Train's patched print shows every line twice
    "RAY_CHDIR_TO_TRIAL_DIR": "0",  # paths in a run file are relative to the working directory, in workers too
    "RAY_TRAIN_ENABLE_PREEMPTION_WATCHER": "0",
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
    "RAY_DEDUP_LOGS": "0",
}
QUIET_LIBRARIES = {
    "HF_HUB_DISABLE_TELEMETRY": "1",  # TRL pings the hub whenever a trainer is built
    "TOKENIZERS_PARALLELISM": "false",
    "TRANSFORMERS_VERBOSITY": "error",
    "DS_ACCELERATOR_LOG_LEVEL": "error",
}
_OBJECT_STORE_BYTES = 512 * 1024**2


def prepare_environment() -> None:
    """Sets what Ray and the libraries read from the environment. Call before Ray is imported."""
    for name, value in (_DEFAULTS | QUIET_LIBRARIES).items():
        os.environ.setdefault(name, value)


def joins_cluster(run: Run) -> bool:
    """Whether the run joins a Ray that exists: `cluster.address` says so, or it runs inside a Ray job."""
    return run.cluster.address is not None or "RAY_ADDRESS" in os.environ


def machine_resources() -> dict[str, float]:
    """CPUs and GPUs of this machine, as a local Ray would count them."""
    import ray._private.accelerators.nvidia_gpu as nvidia  # no public counterpart that does not start Ray

    visible = nvidia.NvidiaGPUAcceleratorManager.get_current_process_visible_accelerator_ids()
    gpus = (
        len(visible) if visible is not None else nvidia.NvidiaGPUAcceleratorManager.get_current_node_num_accelerators()
    )
    return {"CPU": float(len(os.sched_getaffinity(0))), "GPU": float(gpus)}


@dataclass(frozen=True)
class Need:
    """What all processes of a run take together, and who asks for it, for messages."""

    total: Mapping[str, float]
    who: str


def check_fits(need: Need, there: Mapping[str, float], where: str) -> None:
    """Refuses what could only wait for ever.

    Args:
        need: of the whole run.
        there: what the machine or cluster has.
        where: its name, for the message.

    Raises:
        ResourceError: with both numbers.
    """
    for name, amount in need.total.items():
        have = there.get(name, 0.0)
        if amount > have:
            raise ResourceError(f"{need.who} need {amount:g} {name}; found: {have:g} {name} on {where}")


def needed(parts: Sequence[tuple[str, int, Mapping[str, float]]]) -> Need:
    """The sum over (key, processes, resources of each)."""
    total: dict[str, float] = {}
    for _, count, resources in parts:
        for name, amount in resources.items():
            total[name] = total.get(name, 0.0) + count * amount
    return Need(total, " + ".join(f"{key}: {count} x {amounts(resources)}" for key, count, resources in parts))


def amounts(resources: Mapping[str, float]) -> str:
    """`CPU 1, GPU 1`."""
    return ", ".join(f"{name} {amount:g}" for name, amount in resources.items())


@contextmanager
def kept_ray() -> Iterator[None]:
    """A local Ray that all runs of this process share: to start one takes longer than a small run.

    Nothing is started where the runs join a cluster anyway.
    """
    import ray

    if "RAY_ADDRESS" in os.environ:
        yield
        return
    _start_local(0)
    try:
        yield
    finally:
        ray.shutdown()


def _start_local(num_cpus: float) -> None:
    import ray

    ray.init(
        address="local",
        num_cpus=int(max(machine_resources()["CPU"], num_cpus)),
        include_dashboard=False,
        object_store_memory=_OBJECT_STORE_BYTES,
        logging_level=logging.ERROR,
        log_to_driver=False,
    )


@contextmanager
def ray_session(run: Run, need: Need) -> Iterator[None]:
    """Starts or joins Ray, checks that the run fits, and leaves nothing of a local Ray behind.

    Raises:
        ResourceError: the cluster cannot hold the run, or there is no cluster at the address.
    """
    import ray

    if ray.is_initialized():  # `kept_ray`: whoever started it ends it
        check_fits(need, ray.cluster_resources(), "the Ray of this process")
        yield
        return
    if not joins_cluster(run):
        _start_local(need.total.get("CPU", 0))
    else:
        address = run.cluster.address or "auto"
        try:
            ray.init(address=address, logging_level=logging.ERROR, log_to_driver=False)
        except ConnectionError as error:
            raise ResourceError(
                f"cluster.address: no Ray answers at {address!r}: {str(error).splitlines()[0]}"
            ) from None
        check_fits(need, ray.cluster_resources(), f"the cluster at {address!r}")
    try:
        yield
    finally:
        ray.shutdown()
