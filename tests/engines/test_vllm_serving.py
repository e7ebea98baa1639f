"""The application in front of vLLM, in this process: what the clock and a client that leaves do to its engine."""

import asyncio
import json
from collections.abc import Callable
from pathlib import Path

import httpx
import pytest
from prometheus_client import CollectorRegistry

from raytrl.config.runs.serve import ServeRun
from raytrl.roles.serving.guard import Guard
from raytrl.roles.serving.metrics import ServerMetrics
from raytrl.roles.serving.vllm_server import VllmServer
from tests.ppo_files import make_policy

# Three hundred sequences of a hundred tokens: seconds of work.
_LONG = {"model": "m", "prompt": ["the"] * 75, "n": 4, "max_tokens": 100, "ignore_eos": True}


@pytest.mark.slow
def test_the_clock_and_who_leaves_stop_the_engine(tmp_path: Path) -> None:
    serve = {"engine": "vllm", "name": "m", "request_timeout_s": 0.5, "max_tokens": 100}
    serve["engine_args"] = {"override_generation_config": {"temperature": 0.7}}
    run = ServeRun.model_validate({"run": make_policy(tmp_path, head_size=32), "serve": serve})
    metrics = ServerMetrics(CollectorRegistry())
    server = VllmServer(run)
    assert server._arguments()["override_generation_config"] == {"temperature": 0.7, "max_new_tokens": 100}

    async def work() -> None:
        app = Guard(await server.application(), run.serve, [], server.is_alive, metrics)
        async with httpx.AsyncClient(
            transport=httpx.ASGITransport(app), base_url="http://localhost", timeout=60
        ) as http:
            await _time_is_up(http, server)
            await _leave(http, server)
            answer = await http.post("/v1/completions", json=_LONG | {"prompt": "a", "max_tokens": 2})
            assert answer.status_code == 200

    try:
        asyncio.run(work())
    finally:
        server.close()


async def _time_is_up(http: httpx.AsyncClient, server: VllmServer) -> None:
    answer = await http.post("/v1/completions", json=_LONG)
    assert (answer.status_code, answer.json()["error"]["code"]) == (504, "timeout")
    await _idle(server)
    answer = await http.post("/v1/completions", json=_LONG | {"stream": True})
    *_, last = answer.text.strip().split("\n\n")
    assert json.loads(last.removeprefix("data: "))["error"]["code"] == "timeout"
    await _idle(server)


async def _leave(http: httpx.AsyncClient, server: VllmServer) -> None:
    asked = asyncio.create_task(http.post("/v1/completions", json=_LONG))
    await _until(lambda: server._engine.output_processor.has_unfinished_requests())
    asked.cancel()
    with pytest.raises(asyncio.CancelledError):
        await asked
    await _idle(server)


async def _idle(server: VllmServer) -> None:
    await asyncio.wait_for(_until(lambda: not server._engine.output_processor.has_unfinished_requests()), 20)


async def _until(condition: Callable[[], bool]) -> None:
    while not condition():
        await asyncio.sleep(0.01)
