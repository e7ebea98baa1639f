"""What every request goes through first, without Ray: tasks are cancelled here as Ray Serve does when a client leaves."""

import asyncio
import json
from collections.abc import AsyncIterator, Callable, Coroutine, Mapping
from types import SimpleNamespace
from typing import Any

import pytest
from prometheus_client import CollectorRegistry
from starlette.responses import StreamingResponse

from raytrl.config.sections.serve import ServeSection
from raytrl.roles.serving.answers import App, Message, RefusalError
from raytrl.roles.serving.guard import Guard
from raytrl.roles.serving.metrics import ServerMetrics

KEY = "a-key-of-some-length"


class _World:
    """A guard in front of an application, and what comes back."""

    def __init__(
        self, app: App, keys: tuple[str, ...] = (), alive: Callable[[], bool] = lambda: True, **section: Any
    ) -> None:
        self.metrics = ServerMetrics(CollectorRegistry())
        self.guard = Guard(app, ServeSection(**section), keys, alive, self.metrics)

    def ask(
        self, path: str = "/score", body: bytes = b"{}", method: str = "POST", **headers: str
    ) -> "asyncio.Task[tuple[int, dict[str, str], bytes]]":
        return asyncio.create_task(self._ask(path, body, method, headers))

    async def _ask(
        self, path: str, body: bytes, method: str, headers: Mapping[str, str]
    ) -> tuple[int, dict[str, str], bytes]:
        sent: list[Message] = [
            {"type": "http.request", "body": part, "more_body": True} for part in (body[:2], body[2:])
        ]
        sent.append({"type": "http.request", "body": b"", "more_body": False})
        back: list[Message] = []

        async def receive() -> Message:
            if sent:
                return sent.pop(0)
            return await asyncio.get_running_loop().create_future()  # type: ignore[no-any-return]

        async def send(message: Message) -> None:
            back.append(message)

        headers = {"content_type": "application/json", **headers}
        raw = [(name.replace("_", "-").encode(), value.encode()) for name, value in headers.items()]
        scope = {"type": "http", "method": method, "path": f"/mine{path}", "root_path": "/mine", "headers": raw}
        await self.guard(scope, receive, send)
        found = {name.decode(): value.decode() for name, value in back[0].get("headers", ())}
        return back[0]["status"], found, b"".join(message.get("body", b"") for message in back[1:])


async def _echo(scope: Any, receive: Any, send: Any) -> None:
    message = await receive()
    await send({"type": "http.response.start", "status": 200, "headers": []})
    await send({"type": "http.response.body", "body": message.get("body", b"")})


class _Slow:
    """Answers when it is let go; says how it ended."""

    def __init__(self, stream: bool = False) -> None:
        self.go, self.began, self.stream = asyncio.Event(), 0, stream
        self.ends: list[str] = []

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        self.began += 1
        try:
            if self.stream:
                headers = [(b"content-type", b"text/event-stream; charset=utf-8")]
                await send({"type": "http.response.start", "status": 200, "headers": headers})
                await send({"type": "http.response.body", "body": b"data: a\n\n", "more_body": True})
            await self.go.wait()
            await _echo(scope, receive, send)
            self.ends.append("done")
        except asyncio.CancelledError:
            self.ends.append("cancelled")
            raise


def _run(work: Callable[[], Coroutine[Any, Any, None]]) -> None:
    async def bounded() -> None:
        await asyncio.wait_for(work(), 20)

    asyncio.run(bounded())


async def _until(condition: Callable[[], bool]) -> None:
    while not condition():
        await asyncio.sleep(0.001)


@pytest.mark.parametrize(
    "path", ["/score", "/v1/models", "/metrics", "/invocations", "/tokenize", "/nowhere", "/health/", "//health"]
)
@pytest.mark.parametrize(
    "header",
    [
        None,
        "Bearer wrong",
        f"Basic {KEY}",
        KEY,
        "Bearer",
        "Bearer ",
        f"Bearer {KEY}x",
        f"Bearer {KEY[:-1]}",
        "Bearer \xff",
    ],
)
def test_the_key_guards_every_path(path: str, header: str | None) -> None:
    async def work() -> None:
        world = _World(_echo, keys=(KEY,))
        given = {} if header is None else {"authorization": header}
        status, headers, body = await world.ask(path, **given)
        assert status == 401
        assert headers["www-authenticate"] == "Bearer"
        assert json.loads(body)["error"]["code"] == "invalid_api_key"
        assert KEY not in body.decode()

    _run(work)


def test_health_is_open_to_be_read_and_takes_no_place() -> None:
    async def work() -> None:
        world = _World(_echo, keys=(KEY,))
        assert [(await world.ask("/health", method=method))[0] for method in ("GET", "HEAD")] == [200, 200]
        assert [(await world.ask("/health", method=method))[0] for method in ("POST", "PUT", "OPTIONS")] == [401] * 3
        assert (await _World(_echo, alive=lambda: False).ask("/health", method="GET"))[0] == 503
        assert (
            b"raytrl_serve_answers_total"
            in (await world.ask("/metrics", method="GET", authorization=f"Bearer {KEY}"))[2]
        )

    _run(work)


@pytest.mark.parametrize(
    "host", ["evil.example", "evil.example:8000", "localhost.evil.example", "10.0.0.1", "127.0.0.1.evil.example"]
)
def test_without_a_key_it_answers_to_names_of_this_machine_alone(host: str) -> None:
    async def work() -> None:
        status, _, body = await _World(_echo).ask(host=host)
        assert (status, json.loads(body)["error"]["code"]) == (403, "wrong_host")
        assert (await _World(_echo, keys=(KEY,)).ask(host=host, authorization=f"Bearer {KEY}"))[0] == 200
        for own in ("localhost", "127.0.0.1:8000", "[::1]:8000"):
            assert (await _World(_echo).ask(host=own))[0] == 200

    _run(work)


@pytest.mark.parametrize(
    "kind", ["text/plain", "application/x-www-form-urlencoded", "", "multipart/form-data; a=application/json"]
)
def test_what_a_browser_sends_for_any_page_is_refused(kind: str) -> None:
    async def work() -> None:
        status, _, body = await _World(_echo).ask(content_type=kind)
        assert (status, json.loads(body)["error"]["code"]) == (415, "unsupported_media_type")
        assert (await _World(_echo).ask(content_type="Application/JSON; charset=utf-8"))[0] == 200

    _run(work)


def test_keys_may_change() -> None:
    async def work() -> None:
        world = _World(_echo, keys=(KEY,))
        world.guard.take_keys(("next-key",))
        assert (await world.ask(authorization=f"Bearer {KEY}"))[0] == 401
        assert (await world.ask(authorization="Bearer next-key"))[0] == 200

    _run(work)


@pytest.mark.parametrize(("code", "alive", "status"), [(400, True, 400), (None, True, 500), (500, False, 503)])
def test_an_error_that_comes_first_in_a_stream_is_an_answer(code: int | None, alive: bool, status: int) -> None:
    async def streams(scope: Any, receive: Any, send: Any) -> None:
        await send({"type": "http.response.start", "status": 200, "headers": [(b"content-type", b"text/event-stream")]})
        event = json.dumps(
            {"error": {"message": "out of vocab", "type": "BadRequestError", "param": None, "code": code}}
        )
        await send({"type": "http.response.body", "body": f"data: {event}\n\n".encode(), "more_body": True})
        await send({"type": "http.response.body", "body": b"data: [DONE]\n\n"})

    async def work() -> None:
        found, headers, body = await _World(streams, alive=lambda: alive).ask()
        assert (found, headers["content-type"]) == (status, "application/json")
        assert json.loads(body)["error"]["message"] == (
            "out of vocab" if alive else "the engine is started anew; come again"
        )

    _run(work)


def test_a_slow_sender_keeps_nobody_waiting() -> None:
    async def work() -> None:
        world = _World(_echo, max_ongoing=1, max_queued=0)

        async def never() -> Message:
            return await asyncio.get_running_loop().create_future()  # type: ignore[no-any-return]

        headers = [(b"content-type", b"application/json")]
        scope = {"type": "http", "method": "POST", "path": "/score", "headers": headers}
        slow = asyncio.create_task(world.guard(scope, never, never))  # type: ignore[arg-type]
        await asyncio.sleep(0.01)
        assert (await world.ask())[0] == 200
        slow.cancel()
        await asyncio.wait({slow})

    _run(work)


def test_who_asked_for_a_drain_and_is_gone_leaves_a_server_that_serves(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [0.0]
    monkeypatch.setattr("raytrl.roles.serving.guard.time", SimpleNamespace(monotonic=lambda: now[0]))

    async def work() -> None:
        world = _World(_echo)
        assert await world.guard.drain(5.0) == 0
        for now[0], status in ((0.0, 503), (5.0 + 59.0, 503), (5.0 + 61.0, 200)):
            assert (await world.ask())[0] == status

    _run(work)


def test_a_timeout_inside_is_not_the_limit() -> None:
    async def fails(scope: Any, receive: Any, send: Any) -> None:
        raise TimeoutError

    async def work() -> None:
        assert (await _World(fails).ask())[0] == 500

    _run(work)


def test_each_of_the_keys_opens_and_health_needs_none() -> None:
    async def work() -> None:
        world = _World(_echo, keys=(KEY, "another-key"))
        for key in (KEY, "another-key"):
            assert (await world.ask(authorization=f"Bearer {key}"))[0] == 200
            assert (await world.ask(authorization=f"bearer {key}"))[0] == 200
        assert (await world.ask("/health", method="GET"))[0] == 200

    _run(work)


def test_the_body_arrives_whole_and_a_longer_one_is_refused_whatever_it_says_of_itself() -> None:
    async def work() -> None:
        world = _World(_echo, max_body_bytes=10)
        assert (await world.ask(body=b"0123456789"))[2] == b"0123456789"
        for headers in ({}, {"content_length": "3"}, {"content_length": "x"}, {"content_length": "99"}):
            status, _, body = await world.ask(body=b"0123456789a", **headers)
            assert (status, json.loads(body)["error"]["code"]) == (413, "request_too_large")

    _run(work)


def test_more_than_may_wait_are_told_to_come_again() -> None:
    async def work() -> None:
        app = _Slow()
        world = _World(app, max_ongoing=2, max_queued=1)
        asked = [world.ask() for _ in range(3)]
        await _until(lambda: app.began == 2)
        status, headers, body = await world.ask()
        assert (status, headers["retry-after"], json.loads(body)["error"]["code"]) == (429, "1", "too_many_requests")
        app.go.set()
        assert [answer[0] for answer in await asyncio.gather(*asked)] == [200] * 3

    _run(work)


def test_who_leaves_while_he_waits_makes_room() -> None:
    async def work() -> None:
        app = _Slow()
        world = _World(app, max_ongoing=1, max_queued=1)
        first, second = world.ask(), world.ask()
        await _until(lambda: app.began == 1)
        second.cancel()
        await asyncio.wait({second})
        third = world.ask()
        await asyncio.sleep(0)
        app.go.set()
        assert [(await first)[0], (await third)[0]] == [200, 200]
        assert app.began == 2

    _run(work)


@pytest.mark.parametrize("stream", [False, True])
def test_a_client_that_leaves_ends_its_work(stream: bool) -> None:
    async def work() -> None:
        app = _Slow(stream)
        world = _World(app)
        asked = world.ask()
        await _until(lambda: app.began == 1)
        await asyncio.sleep(0.01)
        asked.cancel()
        await asyncio.wait({asked})
        assert app.ends == ["cancelled"]
        assert 'raytrl_serve_answers_total{path="/score",status="499"} 1.0' in world.metrics.text().decode()
        assert "raytrl_serve_running 0.0" in world.metrics.text().decode()

    _run(work)


def test_a_client_whose_proxy_is_gone_has_left(caplog: pytest.LogCaptureFixture) -> None:
    """Ray Serve raises its own error then, where the client's next message would come from."""
    ended: list[str] = []

    async def endless() -> AsyncIterator[str]:
        try:
            while True:
                yield "data: a\n\n"
                await asyncio.sleep(0.001)
        finally:
            ended.append("cancelled")

    async def app(scope: Any, receive: Any, send: Any) -> None:
        await receive()
        await StreamingResponse(endless(), media_type="text/event-stream")(scope, receive, send)
        assert (await receive())["type"] == "http.disconnect"  # whoever asks again is told again

    async def work() -> None:
        world, back, lost = _World(app), list[Message](), list[bool]()
        received = iter([{"type": "http.request", "body": b"{}"}])

        async def receive() -> Message:
            if (message := next(received, None)) is not None:
                return message
            await _until(lambda: len(back) > 3)
            if lost:  # Serve's queue is empty from then on
                await asyncio.get_running_loop().create_future()
            lost.append(True)
            raise RuntimeError("the request was cancelled")

        async def send(message: Message) -> None:
            back.append(message)

        headers = [(b"content-type", b"application/json")]
        await world.guard({"type": "http", "method": "POST", "path": "/score", "headers": headers}, receive, send)
        assert ended == ["cancelled"]
        assert 'raytrl_serve_answers_total{path="/score",status="499"} 1.0' in world.metrics.text().decode()
        assert b"error" not in b"".join(message.get("body", b"") for message in back)

    _run(work)
    assert caplog.text == ""


@pytest.mark.parametrize("stream", [False, True])
def test_time_is_up(stream: bool) -> None:
    async def work() -> None:
        app = _Slow(stream)
        status, _, body = await _World(app, request_timeout_s=0.05).ask()
        assert app.ends == ["cancelled"]
        if stream:  # its status was sent long ago
            *_, last = body.decode().strip().split("\n\n")
            assert json.loads(last.removeprefix("data: "))["error"]["code"] == "timeout"
        else:
            assert (status, json.loads(body)["error"]["code"]) == (504, "timeout")

    _run(work)


def test_to_wait_counts_as_time() -> None:
    async def work() -> None:
        app = _Slow()
        world = _World(app, request_timeout_s=0.1, max_ongoing=1)
        async with world.guard._place():
            assert (await world.ask())[0] == 504
        assert app.began == 0

    _run(work)


def test_what_drains_finishes_and_refuses() -> None:
    async def work() -> None:
        app = _Slow()
        world = _World(app)
        asked = world.ask()
        await _until(lambda: app.began == 1)
        drained = asyncio.create_task(world.guard.drain(20))
        await asyncio.sleep(0)
        for path, method in (("/score", "POST"), ("/health", "GET"), ("/v1/models", "GET")):
            status, headers, body = await world.ask(path, method=method)
            assert (status, headers["retry-after"], json.loads(body)["error"]["code"]) == (503, "1", "draining")
        assert not drained.done()
        app.go.set()
        assert (await asked)[0] == 200
        assert await drained == 0

    _run(work)


def test_a_drain_has_a_limit() -> None:
    async def work() -> None:
        app = _Slow()
        world = _World(app)
        asked = world.ask()
        await _until(lambda: app.began == 1)
        assert await world.guard.drain(0.05) == 1
        app.go.set()
        await asked

    _run(work)


@pytest.mark.parametrize(("alive", "status", "code"), [(True, 500, "internal_error"), (False, 503, "engine_gone")])
def test_a_failure_inside_says_nothing_of_the_request(alive: bool, status: int, code: str, caplog: Any) -> None:
    async def fails(scope: Any, receive: Any, send: Any) -> None:
        raise ValueError("the prompt was: my secret")

    async def work() -> None:
        found, _, body = await _World(fails, alive=lambda: alive).ask()
        assert (found, json.loads(body)["error"]["code"]) == (status, code)
        assert "secret" not in body.decode() + caplog.text

    _run(work)


def test_a_500_of_a_dead_engine_is_to_come_again() -> None:
    async def answers(scope: Any, receive: Any, send: Any) -> None:
        await send({"type": "http.response.start", "status": 500, "headers": []})
        await send({"type": "http.response.body", "body": b"EngineDeadError"})

    async def work() -> None:
        status, headers, body = await _World(answers, alive=lambda: False).ask()
        assert (status, headers["retry-after"], json.loads(body)["error"]["code"]) == (503, "1", "engine_gone")
        assert (await _World(answers).ask())[::2] == (500, b"EngineDeadError")

    _run(work)


def test_a_refusal_inside_is_answered() -> None:
    async def refuses(scope: Any, receive: Any, send: Any) -> None:
        raise RefusalError(400, "n_too_large", "n: found: 9", param="n")

    async def work() -> None:
        status, _, body = await _World(refuses).ask()
        assert status == 400
        assert json.loads(body) == {
            "error": {"message": "n: found: 9", "type": "invalid_request_error", "param": "n", "code": "n_too_large"}
        }

    _run(work)
