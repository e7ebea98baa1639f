"""Servers by what they serve."""

from typing import Protocol

from raytrl.config.runs.serve import ServeRun
from raytrl.roles.serving.answers import App


class Server(Protocol):
    """A model, and the ASGI application that answers for it."""

    async def application(self) -> App:
        """Made once, in the event loop that it will run in; what a first request would wait for is done."""
        ...

    def is_alive(self) -> bool:
        """Whether it can still answer; False: it is to be started anew."""
        ...

    def close(self) -> None:
        """Let go of processes and memory. It may be called twice."""
        ...


def make_server(run: ServeRun) -> Server:
    """Loads the model, or is about to; raises ConfigError where it cannot be served."""
    if run.scores:
        from raytrl.roles.serving.score import ScoreServer

        return ScoreServer(run)
    if run.serve.engine == "vllm":
        from raytrl.roles.serving.vllm_server import VllmServer

        return VllmServer(run)
    from raytrl.roles.serving.transformers_server import TransformersServer

    return TransformersServer(run)
