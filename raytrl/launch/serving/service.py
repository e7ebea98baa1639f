"""Ray Serve for one application: started, watched, drained; on a cluster of others nothing but the own one is touched."""

import logging
import re
import socket
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import ray
from ray import serve
from ray.serve.config import HTTPOptions, ProxyLocation
from ray.serve.schema import ApplicationStatus

from raytrl.config.runs.serve import ServeRun
from raytrl.config.sections.serve import is_this_machine
from raytrl.errors import ResourceError, RunError
from raytrl.launch.serving.deployment import DEPLOYMENT, OWNER, application_of
from raytrl.rundir import RunDirectory
from raytrl.within import NotInTimeError, within

_LOOK_S = 0.5
_LAST_BYTES_S = 1.0  # for answers on their way through Serve's proxy
_RAISED = re.compile(r"[\w.]*(Error|Exception): ")
_CAUSE_LINES = 3
_MORE_S = 10.0  # for Serve's own part of what has a limit
_NAMESPACE = "serve"  # of Ray Serve's own actors
_GONE = (
    ray.exceptions.RayError,
    serve.exceptions.RayServeException,
    RunError,
    NotInTimeError,
    TimeoutError,
    ConnectionError,
)


@dataclass(frozen=True)
class State:
    """What Ray Serve says of the application."""

    status: ApplicationStatus
    text: str
    running: int  # replicas that answer


class Service:
    """One application of Ray Serve, from its start to its end."""

    def __init__(self, run: ServeRun, *, owns_ray: bool) -> None:
        """`owns_ray`: the Ray is this run's own, and Serve on it, too."""
        self._run, self._owns_ray = run, owns_ray
        self._name = run.served_name
        self._owner = RunDirectory(run.output_dir, run.name).uri
        self._is_deployed = False

    def start(self, tell: Callable[[str], None]) -> None:
        """Returns when every replica has answered once.

        Raises:
            ResourceError: somebody else has the address, the name or the route.
            RunError: a replica could not start, or not in time.
        """
        section = self._run.serve
        if not self._owns_ray:
            self._check_others()
        logging.getLogger("ray.serve").setLevel(logging.ERROR)  # what matters is told here
        options = HTTPOptions(
            host=section.host, port=section.port, request_timeout_s=section.request_timeout_s + _MORE_S
        )
        where = ProxyLocation.HeadOnly if self._owns_ray else ProxyLocation.EveryNode
        serve.start(proxy_location=where, http_options=options, logging_config={"enable_access_log": False})
        application = application_of(self._run, owner=self._owner, logs=True)
        target = serve.RunTarget(application, name=self._name, route_prefix=section.route)
        self._is_deployed = True
        serve.run_many([target], wait_for_ingress_deployment_creation=False, wait_for_applications_running=False)
        deadline = time.monotonic() + section.start_timeout_s
        while (state := self.state()).status != ApplicationStatus.RUNNING:
            if state.status in (ApplicationStatus.DEPLOY_FAILED, ApplicationStatus.UNHEALTHY):
                raise RunError(f"serve: a replica could not start: {_cause(state.text)}")
            if time.monotonic() > deadline:
                raise RunError(
                    f"serve.start_timeout_s: the replicas were not ready within {section.start_timeout_s:g} s; found: "
                    f"{state.running} of {section.replicas}; {_cause(state.text)}"
                )
            tell(f"loading: {state.running} of {section.replicas} replicas are ready")
            time.sleep(_LOOK_S)

    def state(self) -> State:
        """Raises RunError where Ray or Serve is gone."""
        try:
            found = serve.status().applications.get(self._name)
        except (ray.exceptions.RayError, serve.exceptions.RayServeException, ConnectionError) as error:
            raise RunError(f"serve: Ray Serve is gone: {str(error).strip().splitlines()[0]}") from None
        if found is None:
            return State(ApplicationStatus.NOT_STARTED, "", 0)
        deployment = found.deployments.get(DEPLOYMENT)
        running = 0 if deployment is None else deployment.replica_states.get("RUNNING", 0)
        texts = [found.message, deployment.message if deployment is not None else ""]
        return State(found.status, "\n".join(text for text in texts if text), running)

    def stop(self) -> int:
        """Ends the application: nothing new is taken, what is in flight is finished within `serve.drain_s`; returns how many
        requests were not. Where it never began it does nothing."""
        if not self._is_deployed:
            return 0
        left, limit_s = 0, self._run.serve.drain_s
        try:
            with suppress(*_GONE):
                if self.state().running:  # else nobody is there to be asked
                    drained = serve.get_app_handle(self._name).broadcast("drain", limit_s)
                    left = sum(drained.results(timeout_s=limit_s + _MORE_S))
                    time.sleep(_LAST_BYTES_S)
        finally:
            with suppress(*_GONE):
                if not self._owns_ray:
                    serve.delete(self._name, _blocking=not left)
                else:  # a Ray of our own ends with all of Serve: to delete the application would only make it answer 404
                    within(_MORE_S, self._hang_up)
        return left

    def _hang_up(self) -> None:
        """Ends Serve's proxies before their replicas end, whose callers they would answer 500."""
        for proxy in ((_details() or {}).get("proxies") or {}).values():
            with suppress(ValueError):  # it has ended by itself
                ray.kill(ray.get_actor(proxy["actor_name"], namespace=_NAMESPACE))
        ends = time.monotonic() + _LAST_BYTES_S
        with suppress(OSError):  # nobody listens any more
            while time.monotonic() < ends:
                socket.create_connection((self._run.serve.host, self._run.serve.port), timeout=_LAST_BYTES_S).close()
                time.sleep(_LAST_BYTES_S / 100)

    def _check_others(self) -> None:
        """On a cluster Serve may run already, with an address of its own and applications of others."""
        section = self._run.serve
        details = _details()
        if details is None:
            return
        there = details.get("http_options") or {}
        found = (there.get("host"), there.get("port"))
        if found[1] is not None and found[1] != section.port:
            raise ResourceError(
                f"serve.port: Ray Serve runs on this cluster already, and has one address; found: {section.port}; expected: "
                f"serve.port={found[1]}"
            )
        if found[0] and section.api_key is None and not is_this_machine(str(found[0])):
            raise ResourceError(
                f"serve.api_key: Ray Serve listens at {found[0]} on this cluster, where others reach it; found: none; "
                f"expected: api_key: NAME"
            )
        for name, other in (details.get("applications") or {}).items():
            mark = (
                ((other.get("deployments") or {}).get(DEPLOYMENT) or {}).get("deployment_config", {}).get("user_config")
            )
            if name == self._name and mark != {OWNER: self._owner}:
                raise ResourceError(
                    f"serve.name: another application of this cluster has that name; found: {name!r}"
                    f"{f' of {mark[OWNER]}' if mark else ''}; expected: another, such as serve.name={name}-2"
                )
            if name != self._name and other.get("route_prefix") == section.route:
                raise ResourceError(
                    f"serve.route: the application {name!r} has it; found: {section.route!r}; expected: another, such as "
                    f"serve.route=/{self._name}"
                )


def _details() -> dict[str, Any] | None:
    """What Serve says of itself; None where none runs."""
    from ray.serve.context import _get_global_client  # no public name for all of it in 2.60

    client = _get_global_client(raise_if_no_controller_running=False)
    return None if client is None else client.get_serve_details()


def _cause(text: str) -> str:
    """What was raised at last, with the lines that its text goes on in."""
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    raised = [i for i, line in enumerate(lines) if _RAISED.match(line)]
    told = lines[raised[-1] :][:_CAUSE_LINES] if raised else lines[-1:]
    return " ".join(told) or "Ray Serve gives no reason"
