"""`raytrl serve`: a finished model on Ray Serve until it is stopped."""

import json
import threading
import time
from collections.abc import Callable
from typing import Any

from raytrl.config.runs.serve import ServeRun
from raytrl.errors import RunError
from raytrl.launch.runs.resume import Standing
from raytrl.launch.runs.run import Kind, Start
from raytrl.launch.session.secrets import values_at
from raytrl.plan.checks.common import Facts
from raytrl.plan.checks.serve import check_port, check_serve
from raytrl.plan.where import joins_cluster
from raytrl.records.outcome import Served
from raytrl.records.progress import Progress
from raytrl.rundir import RunDirectory

_LOOK_S = 1.0


class ServeKind(Kind[ServeRun, Served]):
    """`run.Kind` of a server; it has no end of its own, and always begins anew."""

    def standing(self, run_dir: RunDirectory, fresh: bool) -> Standing:
        return Standing("fresh")

    def check(self, run_dir: RunDirectory, before_last: Callable[[], None]) -> Facts:
        run = self.run
        if not joins_cluster(run):  # else it is another machine's address, and another's environment
            check_port(run.serve.host, run.serve.port)
            values_at(run.serve.api_key, "serve.api_key")
        before_last()
        return check_serve(run)

    def work(self, start: Start) -> dict[str, Any]:
        from raytrl.launch.serving.service import Service

        run, show = self.run, start.show
        with start.ray.running(start.need):
            service = Service(run, owns_ray=start.ray.is_own)
            try:
                service.start(lambda text: show(Progress("phase", text=text)))
                show(Progress("notice", text=ready(run)))
                self._watch(service, show)
            except KeyboardInterrupt:
                show(Progress("phase", text="stopping: what is in flight is finished; again: at once"))
            finally:
                left = service.stop()
        return {"cut_off": left}

    def outcome(self, run_dir: RunDirectory, already_done: bool) -> Served:
        return Served(str(run_dir), already_done, int(run_dir.manifest().get("cut_off", 0)))

    def _watch(self, service: Any, show: Callable[[Progress], None]) -> None:
        """Tells of replicas that are gone and back; ends with an interrupt, or when none comes back.

        Raises:
            RunError: none did within `serve.start_timeout_s`, or the application is gone.
        """
        known, pause, last = self.run.serve.replicas, threading.Event(), time.monotonic()
        show(Progress("phase", text="serving; Ctrl-C stops it"))
        while not pause.wait(_LOOK_S):
            state = service.state()
            if state.status in ("NOT_STARTED", "DELETING"):
                raise RunError("serve: the application was deleted by somebody else")
            if state.running:
                last = time.monotonic()
            elif time.monotonic() - last > (limit_s := self.run.serve.start_timeout_s):
                raise RunError(
                    f"serve: no replica came back within {limit_s:g} s (serve.start_timeout_s); {state.text}"
                )
            if state.running != known:
                known = state.running
                show(Progress("notice", text=f"{known} of {self.run.serve.replicas} replicas answer"))


def ready(run: ServeRun) -> str:
    """The address, and a command that asks there."""
    serve = run.serve
    host = "127.0.0.1" if serve.host in ("0.0.0.0", "::") else serve.host  # noqa: S104 (what to ask, not where to listen)
    host = f"[{host}]" if ":" in host else host
    base = f"http://{host}:{serve.port}{serve.route.removesuffix('/')}"
    body: dict[str, Any] = {"prompts": ["…"], "completions": ["…"]}
    if not run.scores:
        body = {"model": run.served_name, "prompt": "…", "max_tokens": 32}
    path = "/score" if run.scores else "/v1/completions"
    key = "" if serve.api_key is None else " -H 'Authorization: Bearer …'"
    return (
        f"ready at {base}; such as: curl {base}{path} -H 'Content-Type: application/json'{key} -d "
        f"'{json.dumps(body, ensure_ascii=False)}'"
    )
