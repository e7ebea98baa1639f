"""Ray for one run: a local Ray that lives as long as the run, or the cluster that the run joins."""

import json
import logging
import os
import signal
import socket
import threading
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from contextlib import contextmanager

from raytrl.config.runs.base import Run
from raytrl.errors import ResourceError, RunError
from raytrl.launch.session.nodes import cluster_nodes, is_autoscaled, machine_node, machine_resources, memory_bytes
from raytrl.launch.session.secrets import load_secrets
from raytrl.plan.cluster import Cluster, Need, described_nodes
from raytrl.plan.where import THIS_MACHINE, check_one_node, joins_cluster, ray_address, refuse_lost_output

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
    """Sets what Ray and the libraries read from the environment, and a job's secrets. Call before Ray is imported."""
    for name, value in (_DEFAULTS | QUIET_LIBRARIES).items():
        os.environ.setdefault(name, value)
    if ray_address() is None:  # Ray takes a blank one for an address, and so would its workers
        os.environ.pop("RAY_ADDRESS", None)
    load_secrets()


def check_output_dir(run: Run) -> None:
    """Refuses a run directory in the copy of the working directory that a Ray job was given.

    Raises:
        ConfigError: it would be deleted with that copy.
    """
    job = json.loads(os.environ.get("RAY_JOB_CONFIG_JSON_ENV_VAR", "{}"))  # set by Ray in a job's own process
    if (job.get("runtime_env") or {}).get("working_dir"):
        refuse_lost_output(run.output_dir)


def work_in(folder: str) -> None:
    """Paths in a run file are relative to the driver's working directory; processes on a cluster start elsewhere.

    Where a node has no such folder nothing happens: absolute paths, hub ids and URIs need none, others are reported as
    missing by whoever reads them.
    """
    if os.path.isdir(folder):
        os.chdir(folder)


def check_address(run: Run) -> None:
    """Refuses an address that nobody listens at; Ray itself would try for half a minute and more.

    Raises:
        ResourceError: naming the address.
    """
    key, address = "cluster.address", run.cluster.address or "auto"
    if address == "auto" and ray_address() is not None:
        key, address = "RAY_ADDRESS", ray_address() or ""
    if ":" not in address:  # null, auto, local
        return
    host, _, port = address.removeprefix("ray://").rpartition(":")
    try:
        socket.create_connection((host.strip("[]"), int(port)), timeout=3).close()
    except (OSError, ValueError) as error:
        raise ResourceError(f"{key}: no Ray answers; found: {address!r}: {error}; expected: a running head") from None


_JOIN_LIMIT_S, _JOIN_PAUSE_S = 60.0, 1.0


@contextmanager
def kept_ray() -> Iterator[None]:
    """A local Ray that all runs of this process share: to start one takes longer than a small run.

    Nothing is started where the runs join a cluster anyway.
    """
    import ray

    if ray_address() is not None:
        yield
        return
    with _own_sigterm_handler():
        _start_local(Need(()))
    try:
        yield
    finally:
        ray.shutdown()


@contextmanager
def _own_sigterm_handler() -> Iterator[None]:
    """Keeps this process' handler: those that init installs, whatever thread it runs in, abort the process."""
    stop = signal.getsignal(signal.SIGTERM)
    try:
        yield
    finally:
        if threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGTERM, stop)


# What Ray makes below its folder: a session named for a time and a process id (7 digits at the most), and sockets in it.
_LONGEST_SOCKET = "ray/session_2026-01-01_00-00-00_000000_0000000/sockets/plasma_store"
_SOCKET_LIMIT = 107  # bytes of a Unix socket's path on Linux


def check_temp_dir() -> None:
    """Refuses a folder for temporary files where a local Ray could not open its sockets.

    Raises:
        ResourceError: naming the variable.
    """
    name = next((name for name in ("RAY_TMPDIR", "TMPDIR") if name in os.environ), None)  # as Ray looks for it
    folder = os.environ[name] if name else "/tmp"  # noqa: S108
    found, expected = (
        f"found: {folder!r}",
        "expected: a short path of a folder that may be written, such as RAY_TMPDIR=/tmp",
    )
    size = len(os.fsencode(os.path.join(folder, _LONGEST_SOCKET)))
    if size > _SOCKET_LIMIT:
        raise ResourceError(
            f"{name}: too long for Ray's sockets, whose paths may have {_SOCKET_LIMIT} bytes; {found}, which makes {size}; "
            f"{expected}"
        )
    while not os.path.exists(folder) and folder != (parent := os.path.dirname(folder)):  # Ray makes what is not there
        folder = parent
    if not os.path.isdir(folder or ".") or not os.access(folder or ".", os.W_OK | os.X_OK):
        raise ResourceError(f"{name or 'RAY_TMPDIR'}: Ray cannot write there; {found}; {expected}")


def _start_local(need: Need) -> None:
    import ray

    check_temp_dir()
    try:
        ray.init(
            address="local",
            num_cpus=int(max(machine_resources()["CPU"], need.total.get("CPU", 0))),
            include_dashboard=False,
            object_store_memory=min(need.object_store_bytes, memory_bytes() // 3),
            logging_level=logging.ERROR,
            log_to_driver=False,
        )
    except Exception as error:  # Ray has no class of its own for it
        if type(error) is not Exception:
            raise
        raise RunError(
            f"Ray did not start on this machine: {str(error).strip().splitlines()[0]}; its logs are below "
            f"{os.environ.get('RAY_TMPDIR', '/tmp')}/ray; a busy machine is the usual cause: try the same command again"  # noqa: S108
        ) from error


def _join(address: str) -> None:
    import ray

    limit = time.monotonic() + _JOIN_LIMIT_S
    try:
        while True:
            try:
                ray.init(address=address, logging_level=logging.ERROR, log_to_driver=False)
                return
            except ConnectionAbortedError:
                # A head starts a server for each `ray://` client, and a busy one is slow at it.
                if time.monotonic() > limit:
                    raise
                ray.shutdown()
                time.sleep(_JOIN_PAUSE_S)
    except ConnectionError as error:
        raise ResourceError(f"cluster.address: no Ray answers at {address!r}: {str(error).splitlines()[0]}") from None
    except ray.exceptions.AuthenticationError:
        raise ResourceError(
            f"cluster.address: the Ray at {address!r} asks for a token, and it is missing or wrong; expected: "
            f"RAY_AUTH_MODE=token, and RAY_AUTH_TOKEN or RAY_AUTH_TOKEN_PATH"
        ) from None


@contextmanager
def cluster_of(run: Run) -> Iterator[Cluster]:
    """The nodes that a run would have.

    Where the run joins a cluster, this process has joined it within the block, and a `Session` in there uses that.

    Raises:
        ResourceError: there is no cluster at the address.
    """
    import ray

    if not joins_cluster(run):
        check_one_node(run)
        check_temp_dir()
        yield Cluster([machine_node()], THIS_MACHINE)
        return
    if ray.is_initialized():  # one of the trials of a sweep: its process has joined already
        yield Cluster(cluster_nodes(), "the sweep's Ray")
        return
    with _joined(run):
        yield Cluster(cluster_nodes(), f"the cluster at {run.cluster.address or 'auto'!r}", is_autoscaled())


def planned_cluster(run: Run, described: Sequence[str] = ()) -> Cluster:
    """The nodes to plan for: those described, as `--cluster` does, else those that the run would have.

    Raises:
        ConfigError: a description cannot be read.
        ResourceError: there is no cluster at the address.
    """
    if described:
        return Cluster(described_nodes(described), "the described cluster")
    prepare_environment()
    with cluster_of(run) as found:  # asked once: what follows needs no cluster
        return found


@contextmanager
def _joined(run: Run) -> Iterator[None]:
    import ray

    check_address(run)
    with _own_sigterm_handler():
        _join(run.cluster.address or "auto")
    try:
        yield
    finally:
        ray.shutdown()


class Session:
    """Ray for one run: what this process has joined or started already, else the run's cluster, else a local Ray.

    That the run fits is checked before; of a local Ray nothing is left behind. As a context manager it ends a Ray that
    was begun and that nobody came to use.
    """

    def __init__(self, run: Run) -> None:
        self._run = run
        # Linux kills Ray's processes with the thread that started them: it lives until Ray has been ended.
        self._starter = ThreadPoolExecutor(1, "start-ray")
        self._begun: Future[None] | None = None

    def __enter__(self) -> "Session":
        return self

    def __exit__(self, *_: object) -> None:
        self._end()

    def begin(self, need: Need) -> None:
        """Lets a local Ray start in the background: the checks of models and data take as long as it does."""
        import ray

        if self._begun is None and not ray.is_initialized() and not joins_cluster(self._run):
            self._begun = self._starter.submit(_start_local, need)

    @property
    def is_own(self) -> bool:
        """Whether its Ray ends with the run, and serves nobody else."""
        return self._begun is not None

    def settle(self) -> None:
        """Takes SIGTERM back once Ray has started; in the main thread, from time to time."""
        if self._begun is not None and self._begun.done():
            with _own_sigterm_handler():
                pass

    @contextmanager
    def running(self, need: Need) -> Iterator[None]:
        """Ray runs within the block.

        Raises:
            ResourceError: there is no cluster at the address.
            RunError: Ray does not start.
        """
        import ray

        if self._begun is None and joins_cluster(self._run) and not ray.is_initialized():
            with _joined(self._run):
                yield
            return
        self.begin(need)
        try:
            if self._begun is not None:  # else `cluster_of`, `kept_ray` or a sweep's trial has started it, and ends it
                with _own_sigterm_handler():
                    self._wait(need)
            yield
        finally:
            self._end()

    def _wait(self, need: Need) -> None:
        import ray

        assert self._begun is not None
        try:
            self._begun.result()
        except RunError:  # a busy machine is the usual cause, and the checks were part of that
            ray.shutdown()
            self._begun = self._starter.submit(_start_local, need)
            self._begun.result()

    def _end(self) -> None:
        import ray

        if self._begun is not None:
            wait([self._begun])
            self._begun = None
            ray.shutdown()
        self._starter.shutdown()
