"""A finished model as an application of Ray Serve: what each replica is, and how Serve is told of it."""

import contextlib
import logging
import os
from typing import Any

from ray import serve
from ray.serve import Application
from ray.serve.config import BackpressureConfig

from raytrl.config.runs.serve import ServeRun
from raytrl.errors import ConfigError
from raytrl.launch.session.logs import start_log
from raytrl.launch.session.secrets import load_secrets, values_at
from raytrl.launch.session.session import QUIET_LIBRARIES, work_in
from raytrl.rundir import RunDirectory

OWNER = "owner"
DEPLOYMENT = "raytrl"  # of every application of ours, by which it is known
_HEALTH_PERIOD_S = 1.0  # three failures in a row, and a replica is started anew
_HEALTH_LIMIT_S = 30.0  # a busy machine is no reason
_SPARE = 64  # requests beyond a replica's own limits that reach it, to be told so in OpenAI's form


class Replica:
    """The model, and the guard in front of it. Ray Serve builds the application after the constructor, and sends requests when
    it is there."""

    def __init__(self, run: ServeRun, cwd: str, logs: bool) -> None:
        """
        Args:
            cwd: what paths of the run file are relative to.
            logs: whether there is a run directory to log to.
        """
        for name, value in QUIET_LIBRARIES.items():
            os.environ.setdefault(name, value)
        work_in(cwd)
        load_secrets()
        if logs:
            start_log(RunDirectory(run.output_dir, run.name), "server", _rank())
        logging.getLogger("ray.serve").setLevel(logging.WARNING)  # a line a request, with its path and parameters
        from raytrl.roles.serving.metrics import ServerMetrics
        from raytrl.roles.serving.servers import make_server

        self._section = run.serve
        self._keys = values_at(run.serve.api_key, "serve.api_key")
        self._metrics = ServerMetrics()
        self._server = make_server(run)
        self._guard: Any = None

    async def __serve_build_asgi_app__(self) -> Any:
        from raytrl.roles.serving.guard import Guard

        app = await self._server.application()
        self._guard = Guard(app, self._section, self._keys, self._server.is_alive, self._metrics)
        return self._guard

    async def drain(self, limit_s: float) -> int:
        """See `Guard.drain`."""
        left: int = await self._guard.drain(limit_s)
        return left

    def reconfigure(self, owner: dict[str, str]) -> None:
        """Called by Ray Serve with what says whose application it is; there is nothing to change."""

    async def check_health(self) -> None:
        """Called by Ray Serve, every second: a file of keys may have changed."""
        if self._guard is None:
            return
        if not self._server.is_alive():
            raise RuntimeError("the engine is gone")
        if "=" in (self._section.api_key or ""):
            with contextlib.suppress(ConfigError):  # while it is written: the keys of before
                self._guard.take_keys(values_at(self._section.api_key, "serve.api_key"))

    def __del__(self) -> None:
        server = getattr(self, "_server", None)  # the constructor may have failed before
        if server is not None:
            server.close()


def _rank() -> int:
    """Which of the replicas this one is."""
    rank = serve.get_replica_context().rank
    return int(getattr(rank, "rank", rank) or 0)


def application_of(run: ServeRun, *, owner: str, logs: bool) -> Application:
    """What `serve.run` takes.

    Args:
        owner: whose it is, for others on the same cluster.
        logs: whether there is a run directory to log to.
    """
    section = run.serve
    others = {name: amount for name, amount in section.resources.items() if name not in ("CPU", "GPU")}
    options: dict[str, Any] = {
        "num_cpus": section.resources.get("CPU", 0),
        "num_gpus": section.resources.get("GPU", 0),
        "resources": others,
    }
    if section.labels:
        options["label_selector"] = dict(section.labels)
    deployment = serve.deployment(
        serve.ingress()(Replica),
        name=DEPLOYMENT,
        user_config={OWNER: owner},
        num_replicas=section.replicas,
        ray_actor_options=options,
        **({"max_replicas_per_node": 1} if section.placement == "strict_spread" else {}),
        max_ongoing_requests=section.max_ongoing + section.max_queued + _SPARE,
        max_queued_requests=section.max_queued + _SPARE,
        backpressure_config=BackpressureConfig(status_code=429, retry_after_s=1),
        health_check_period_s=_HEALTH_PERIOD_S,
        health_check_timeout_s=_HEALTH_LIMIT_S,
        graceful_shutdown_timeout_s=section.drain_s,
        graceful_shutdown_wait_loop_s=0.1,
    )
    return deployment.bind(run, os.getcwd(), logs)
