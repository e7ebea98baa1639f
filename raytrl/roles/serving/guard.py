"""What every request goes through first: who may ask, how much, how long, and what happens when the client leaves."""

import asyncio
import contextlib
import hashlib
import hmac
import json
import logging
import time
from collections.abc import AsyncIterator, Callable, Sequence
from urllib.parse import urlsplit

from raytrl.config.sections.serve import ServeSection, is_this_machine
from raytrl.roles.serving.answers import App, Message, Receive, RefusalError, Scope, Send
from raytrl.roles.serving.metrics import ServerMetrics

_log = logging.getLogger(__name__)

_ENDS_S = 60.0  # after a drain, for whoever asked for it to end this process
_CLIENT_LEFT = 499  # nginx' word for it, in metrics alone


class Guard:
    """The outermost ASGI application of a replica.

    Ray Serve cancels the task of a client that leaves, a limit here cancels it, too; so the application inside must let a
    cancellation through to its engine.

    It answers /health and /metrics itself, for every server alike. All else needs the key. What works (POST) takes one of
    `max_ongoing` places, or waits with `max_queued` others; its body and its time are bounded. What the application inside does
    not survive is answered 503 and not 500 where the engine is gone.
    """

    def __init__(
        self, app: App, section: ServeSection, keys: Sequence[str], alive: Callable[[], bool], metrics: ServerMetrics
    ) -> None:
        """
        Args:
            keys: each of them opens; none: no key is asked for.
            alive: whether the engine behind `app` works; False: it will be started anew.
        """
        self._app, self._section, self._alive, self._metrics = app, section, alive, metrics
        self.take_keys(keys)
        self._places = asyncio.Semaphore(section.max_ongoing)
        self._waiting = 0
        self._drains_until = 0.0
        self._in_flight = 0
        self._idle = asyncio.Event()
        self._idle.set()

    def take_keys(self, keys: Sequence[str]) -> None:
        """From now on these open."""
        self._keys = [hashlib.sha256(key.encode()).digest() for key in keys]

    async def drain(self, limit_s: float) -> int:
        """Refuses what comes from now on, and waits for what is in flight; returns how many requests are left at the limit.

        Whoever asked for it ends this process soon; where he is gone himself, it serves again.
        """
        self._drains_until = time.monotonic() + limit_s + _ENDS_S
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(self._idle.wait(), limit_s)
        return self._in_flight

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "lifespan":
            return await self._app(scope, receive, send)
        if scope["type"] != "http":
            return await send({"type": "websocket.close", "code": 1008})
        path = str(scope["path"]).removeprefix(scope.get("root_path", "")) or "/"
        answer, began = _Answer(send, self._alive), time.monotonic()

        gone: list[Message] = []

        async def hear() -> Message:
            if gone:  # Ray Serve says what follows once only
                return gone[0]
            try:
                message = await receive()
            except Exception:  # of Ray Serve: its proxy, or its task for this request, is gone, and the client with it
                message = {"type": "http.disconnect"}
            if message["type"] == "http.disconnect":
                answer.leave()
                gone.append(message)
            return message

        self._in_flight += 1
        self._idle.clear()
        try:
            await self._answer(path, scope, hear, answer)
        except RefusalError as refused:
            await answer.refuse(refused)
        except asyncio.CancelledError:
            answer.leave()
            raise
        except Exception as error:
            if not answer.is_left:  # its text may hold what the user sent: only its kind is logged
                _log.error("%s: raised %s", path, type(error).__name__)
                await answer.refuse(RefusalError(500, "internal_error", "the server failed at this request"))
        finally:
            self._in_flight -= 1
            if not self._in_flight:
                self._idle.set()
            status = _CLIENT_LEFT if answer.is_left else answer.status
            self._metrics.answered(path, status, time.monotonic() - began)
        return None

    async def _answer(self, path: str, scope: Scope, receive: Receive, answer: "_Answer") -> None:
        works = scope["method"] not in ("GET", "HEAD")
        if path != "/health" or works:
            self._check_key(scope)
        if time.monotonic() < self._drains_until and path != "/metrics":
            raise RefusalError(503, "draining", "the server is being stopped; come again", again=True)
        if path == "/health" and not works:
            return await answer.whole(200 if self._alive() else 503)
        if path == "/metrics" and not works:
            return await answer.whole(200, self._metrics.text())
        if not works:
            return await self._app(scope, receive, answer.send)
        try:
            async with asyncio.timeout(self._section.request_timeout_s) as limit:
                body = await self._body(scope, receive)  # before it has a place: who sends slowly keeps nobody waiting
                async with self._place():
                    await self._app(scope, _replayed(body, receive), answer.send)
        except TimeoutError:
            if not limit.expired():
                raise
            limit_s = self._section.request_timeout_s
            raise RefusalError(504, "timeout", f"not done within {limit_s:g} s (serve.request_timeout_s)") from None

    def _check_key(self, scope: Scope) -> None:
        headers = dict(scope["headers"])
        if not self._keys:
            # A page of anywhere that is open in a browser of this machine reaches its servers, too, by a name of its own.
            host = headers.get(b"host", b"localhost").decode("latin1")
            if not is_this_machine(urlsplit(f"//{host}").hostname or ""):
                raise RefusalError(403, "wrong_host", "without a key it answers to names of this machine alone")
            return
        scheme, _, key = headers.get(b"authorization", b"").decode("latin1").partition(" ")
        digest = hashlib.sha256(key.strip().encode("latin1")).digest()
        # All are compared, in constant time, so that nothing can be learnt from how long it takes.
        fits = [hmac.compare_digest(digest, known) for known in self._keys]
        if scheme.lower() != "bearer" or not any(fits):
            raise RefusalError(
                401, "invalid_api_key", "missing or wrong API key; expected: Authorization: Bearer <key>"
            )

    @contextlib.asynccontextmanager
    async def _place(self) -> AsyncIterator[None]:
        if self._places.locked() and self._waiting >= self._section.max_queued:
            raise RefusalError(429, "too_many_requests", "too many requests wait already; come again", again=True)
        self._waiting += 1
        self._metrics.waiting.inc()
        try:
            await self._places.acquire()
        finally:
            self._waiting -= 1
            self._metrics.waiting.dec()
        self._metrics.running.inc()
        try:
            yield
        finally:
            self._metrics.running.dec()
            self._places.release()

    async def _body(self, scope: Scope, receive: Receive) -> bytes:
        kind = dict(scope["headers"]).get(b"content-type", b"").partition(b";")[0].strip().lower()
        if kind != b"application/json":  # what a browser sends for any page, without asking first, is none
            raise RefusalError(415, "unsupported_media_type", "expected: Content-Type: application/json")
        limit, body = self._section.max_body_bytes, bytearray()
        too_long = RefusalError(
            413, "request_too_large", f"the body is longer than {limit} bytes (serve.max_body_bytes)"
        )
        length = dict(scope["headers"]).get(b"content-length", b"0")
        if length.isdigit() and int(length) > limit:
            raise too_long
        while True:
            message = await receive()
            if message["type"] == "http.disconnect":
                raise asyncio.CancelledError
            body += message.get("body", b"")
            if len(body) > limit:
                raise too_long
            if not message.get("more_body", False):
                return bytes(body)


class _Answer:
    """What goes back: which status, and whether it has begun.

    The status of a stream goes out with its first event: engines look at some of what was asked only then, and an error that
    comes first is an answer of its own.
    """

    def __init__(self, send: Send, alive: Callable[[], bool]) -> None:
        self._alive = alive
        self.status, self._begun, self._is_stream, self._replaced = 500, False, False, False
        self._held: Message | None = None
        self.is_left, self._is_whole = False, False

        async def pass_on(message: Message) -> None:
            await send(message)
            self._is_whole = message["type"] == "http.response.body" and not message.get("more_body", False)

        self._send = pass_on

    def leave(self) -> None:
        """The client is gone; nobody leaves who has had all of it."""
        self.is_left = self.is_left or not self._is_whole

    async def send(self, message: Message) -> None:
        if self._replaced:
            return
        if message["type"] == "http.response.start":
            if message["status"] >= 500 and not self._alive():
                await self._replace(_ENGINE_GONE)
                return
            kind = dict(message.get("headers", ())).get(b"content-type", b"")
            if kind.startswith(b"text/event-stream"):
                self._held = message
                return
            await self._begin(message)
        elif self._held is not None:
            begin, self._held = self._held, None
            if (refused := _error_in(message.get("body", b""))) is not None:
                await self._replace(refused if self._alive() else _ENGINE_GONE)
                return
            self._is_stream = True
            await self._begin(begin)
            await self._send(message)
        else:
            await self._send(message)

    async def whole(self, status: int, text: bytes = b"") -> None:
        """A page that is there at once, in Prometheus' form."""
        headers = [(b"content-type", b"text/plain; version=0.0.4")]
        await self._begin({"type": "http.response.start", "status": status, "headers": headers})
        await self._send({"type": "http.response.body", "body": text})

    async def refuse(self, refused: RefusalError) -> None:
        """As a response of its own; where one has begun, as the last event of a stream."""
        if not self._begun:
            gone = refused.status == 500 and not self._alive()
            await self._replace(_ENGINE_GONE if gone else refused)
        elif self._is_stream:
            self.status = refused.status
            await self._send({"type": "http.response.body", "body": refused.as_event(), "more_body": False})

    async def _begin(self, message: Message) -> None:
        self.status, self._begun = message["status"], True
        await self._send(message)

    async def _replace(self, refused: RefusalError) -> None:
        self.status, self._begun, self._replaced = refused.status, True, True
        await refused.answer(self._send)


_ENGINE_GONE = RefusalError(503, "engine_gone", "the engine is started anew; come again", again=True)


def _error_in(event: bytes) -> RefusalError | None:
    """What a stream's first event refuses; None: it is no error."""
    if not event.startswith(b'data: {"error"'):
        return None
    error = json.loads(event.removeprefix(b"data: ").split(b"\n\n")[0])["error"]
    status = error.get("code")
    known = isinstance(status, int) and 400 <= status < 600
    return RefusalError(
        status if known else 500, str(error.get("type")), str(error.get("message")), param=error.get("param")
    )


def _replayed(body: bytes, receive: Receive) -> Receive:
    """A body that is read already, then what the client says next."""
    messages: list[Message] = [{"type": "http.request", "body": body, "more_body": False}]

    async def hear() -> Message:
        return messages.pop() if messages else await receive()

    return hear
