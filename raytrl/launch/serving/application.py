"""A finished model as KubeRay, `serve run` and `serve deploy` take it: import_path raytrl.launch.serving.application:application.

Where it listens is Serve's own setting there, and others reach it, so that it takes an api_key; how many replicas, too, may be
said there.
"""

from typing import Any

from ray.serve import Application

from raytrl.config.load import load_values
from raytrl.config.runs.serve import ServeRun
from raytrl.errors import ConfigError
from raytrl.launch.serving.deployment import application_of
from raytrl.plan.checks.serve import check_serve

# http_options, route_prefix, and nobody waits for the start.
_SERVES_OWN = {"host", "port", "route", "start_timeout_s"}


def application(args: dict[str, Any]) -> Application:
    """The application of `args`: `run`, and keys of the section `serve` beside it.

    Raises:
        ConfigError: nothing can be served by these.
    """
    if "run" not in args:
        raise ConfigError("args: run: missing; expected: the directory of a finished run, or the folder of a model")
    if idle := sorted(_SERVES_OWN & args.keys()):
        raise ConfigError(
            f"args: {idle[0]}: is said by Serve's own config here; found: {args[idle[0]]!r}; leave it out"
        )
    section = {key: value for key, value in args.items() if key != "run"} | {"host": "0.0.0.0"}  # noqa: S104 (so that a key is needed)
    run = load_values({"kind": "serve", "run": args["run"], "serve": section}, "args").run
    assert isinstance(run, ServeRun)
    check_serve(run)
    return application_of(run, owner="args of import_path", logs=False)
