"""Ray for one run: a local Ray that lives as long as the run, or the cluster that the run joins."""

import logging
import os
import signal
import socket
import threading
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
    object_store_bytes: int = 512 * 1024**2  # of a local Ray
    bundles: tuple[Mapping[str, float], ...] = ()  # one a process


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


def check_address(run: Run) -> None:
    """Refuses an address that nobody listens at; Ray itself would try for half a minute and more.

    Raises:
        ResourceError: naming the address.
    """
    address = run.cluster.address or ""
    if ":" not in address:  # null, auto, local
        return
    host, _, port = address.removeprefix("ray://").partition(":")
    try:
        socket.create_connection((host, int(port)), timeout=3).close()
    except (OSError, ValueError) as error:
        raise ResourceError(
            f"cluster.address: no Ray answers; found: {address!r}: {error}; expected: a running head"
        ) from None


def needed(parts: Sequence[tuple[str, int, Mapping[str, float]]], object_store_bytes: int | None = None) -> Need:
    """The sum over (key, processes, resources of each)."""
    total: dict[str, float] = {}
    for _, count, resources in parts:
        for name, amount in resources.items():
            total[name] = total.get(name, 0.0) + count * amount
    who = " + ".join(f"{key}: {count} x {amounts(resources)}" for key, count, resources in parts)
    bundles = tuple(resources for _, count, resources in parts for _ in range(count))
    return Need(total, who, object_store_bytes or Need.object_store_bytes, bundles)


def amounts(resources: Mapping[str, float]) -> str:
    """`CPU 1, GPU 1`."""
    return ", ".join(f"{name} {amount:g}" for name, amount in resources.items())


def _memory_bytes() -> int:
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


@contextmanager
def kept_ray() -> Iterator[None]:
    """A local Ray that all runs of this process share: to start one takes longer than a small run.

    Nothing is started where the runs join a cluster anyway.
    """
    import ray

    if "RAY_ADDRESS" in os.environ:
        yield
        return
    with _own_sigterm_handler():
        _start_local(Need({}, "all runs"))
    try:
        yield
    finally:
        ray.shutdown()


@contextmanager
def _own_sigterm_handler() -> Iterator[None]:
    """Keeps this process' handler: Ray's own, which init installs, aborts the process."""
    stop = signal.getsignal(signal.SIGTERM)
    yield
    if threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGTERM, stop)


def _start_local(need: Need) -> None:
    import ray

    ray.init(
        address="local",
        num_cpus=int(max(machine_resources()["CPU"], need.total.get("CPU", 0))),
        include_dashboard=False,
        object_store_memory=min(need.object_store_bytes, _memory_bytes() // 3),
        logging_level=logging.ERROR,
        log_to_driver=False,
    )


def _join(address: str) -> None:
    import ray

    try:
        ray.init(address=address, logging_level=logging.ERROR, log_to_driver=False)
    except ConnectionError as error:
        raise ResourceError(f"cluster.address: no Ray answers at {address!r}: {str(error).splitlines()[0]}") from None


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
    with _own_sigterm_handler():
        if not joins_cluster(run):
            _start_local(need)
        else:
            address = run.cluster.address or "auto"
            _join(address)
            check_fits(need, ray.cluster_resources(), f"the cluster at {address!r}")
    try:
        yield
    finally:
        ray.shutdown()
