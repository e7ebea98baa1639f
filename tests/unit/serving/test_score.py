"""POST /score in this process: what it computes in, and when it is started anew."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import httpx
import pytest

from raytrl.config.runs.serve import ServeRun
from raytrl.config.sections.reward import SourceSection
from raytrl.roles.reward.call import Asked
from raytrl.roles.reward.model import ModelSource
from raytrl.roles.serving.score import ScoreServer
from tests.unit.reward.conftest import TEXTS, save_classifier

BODY = {"prompts": TEXTS, "completions": TEXTS[::-1], "ended": [True, False, True]}
ROWS = [Asked(*row) for row in zip(TEXTS, TEXTS[::-1], [True, False, True], strict=True)]


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("reward")
    save_classifier(folder)
    return str(folder)


def _server(path: str, **serve: Any) -> ScoreServer:
    return ScoreServer(ServeRun.model_validate({"run": path, "serve": serve}))


@asynccontextmanager
async def _client(server: ScoreServer) -> AsyncIterator[httpx.AsyncClient]:
    transport = httpx.ASGITransport(await server.application(), raise_app_exceptions=False)
    async with httpx.AsyncClient(transport=transport, base_url="http://localhost") as http:
        yield http


def _direct(path: str, **more: Any) -> list[object]:
    source = ModelSource(SourceSection(name="rm", model=path, **more))
    return list(source.scores([source.token_ids(row) for row in ROWS]))


def test_dtype_is_what_it_computes_in(path: str) -> None:
    async def scores(dtype: str) -> list[object]:
        async with _client(_server(path, dtype=dtype)) as http:
            found: list[object] = (await http.post("/score", json=BODY)).json()["scores"]
            return found

    whole, half = (asyncio.run(scores(dtype)) for dtype in ("float32", "bfloat16"))
    assert half == _direct(path, dtype="bfloat16")
    assert whole == _direct(path, dtype="float32") != half


def test_it_is_started_anew_after_failures_in_a_row(path: str, monkeypatch: pytest.MonkeyPatch) -> None:
    server, fails = _server(path), False
    scores = ModelSource.scores

    def broken(self: ModelSource, rows: Any) -> Any:
        if fails:
            raise RuntimeError("the device is gone")
        return scores(self, rows)

    monkeypatch.setattr(ModelSource, "scores", broken)

    async def work() -> None:
        nonlocal fails
        async with _client(server) as http:
            for fails, alive in ((True, True), (True, True), (False, True), (True, True), (True, True), (True, False)):
                answer = await http.post("/score", json=BODY)
                assert (answer.status_code, server.is_alive()) == (500 if fails else 200, alive)
                assert "device" not in answer.text

    asyncio.run(work())
