"""Refusals in OpenAI's form, which its clients read."""

import asyncio
import json
from collections.abc import Awaitable, Callable, Mapping, MutableMapping
from typing import Any

from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import JSONResponse, Response

Message = MutableMapping[str, Any]
Scope = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]
App = Callable[[Scope, Receive, Send], Awaitable[None]]

COME_AGAIN_S = 1  # what Retry-After says


class RefusalError(Exception):
    """A request that is not worked on; each has a status, a code for programs and a text for people."""

    def __init__(self, status: int, code: str, text: str, *, param: str | None = None, again: bool = False) -> None:
        """`again`: whoever comes again a little later may be served."""
        super().__init__(text)
        self.status, self.code, self.text, self.param, self.again = status, code, text, param, again

    def to_json(self) -> dict[str, Any]:
        """The body."""
        kind = "invalid_request_error" if self.status < 500 else "server_error"
        return {"error": {"message": self.text, "type": kind, "param": self.param, "code": self.code}}

    @property
    def headers(self) -> dict[str, str]:
        found = {"Retry-After": str(COME_AGAIN_S)} if self.again else {}
        return found | ({"WWW-Authenticate": "Bearer"} if self.status == 401 else {})

    async def answer(self, send: Send) -> None:
        """As a whole response."""
        headers = {"Content-Type": "application/json", **self.headers}
        raw = [(name.lower().encode(), value.encode()) for name, value in headers.items()]
        await send({"type": "http.response.start", "status": self.status, "headers": raw})
        await send({"type": "http.response.body", "body": json.dumps(self.to_json()).encode()})

    def as_event(self) -> bytes:
        """As the last event of a stream."""
        return f"data: {json.dumps(self.to_json())}\n\n".encode()


async def post(app: App, path: str, body: Mapping[str, Any]) -> int:
    """The status of what an application of this process answers."""
    found: list[int] = []
    sent = [json.dumps(body).encode()]
    scope = {
        "type": "http",
        "asgi": {"version": "3.0"},
        "http_version": "1.1",
        "method": "POST",
        "scheme": "http",
        "path": path,
        "raw_path": path.encode(),
        "root_path": "",
        "query_string": b"",
        "headers": [(b"content-type", b"application/json")],
        "client": None,
        "server": None,
    }

    async def hear() -> Message:
        if sent:
            return {"type": "http.request", "body": sent.pop(), "more_body": False}
        return await asyncio.get_running_loop().create_future()  # type: ignore[no-any-return]  # nobody leaves

    async def tell(message: Message) -> None:
        if message["type"] == "http.response.start":
            found.append(message["status"])

    await app(scope, hear, tell)
    return found[0]


async def refused(_: Request, error: Exception) -> Response:
    """Starlette's handler of a `RefusalError`."""
    assert isinstance(error, RefusalError)
    return JSONResponse(error.to_json(), error.status, error.headers)


async def no_such(request: Request, error: Exception) -> Response:
    """Starlette's handler of what it refuses itself: a path or method that nobody serves."""
    assert isinstance(error, HTTPException)
    code = {404: "not_found", 405: "method_not_allowed"}.get(error.status_code, "invalid_request")
    text = f"{request.method} {request.scope['path']}: {error.detail}"
    return JSONResponse(RefusalError(error.status_code, code, text).to_json(), error.status_code, error.headers)


async def failed(_: Request, error: Exception) -> Response:
    """Starlette's handler of all else; it is raised again for the guard, which knows whether the engine is gone."""
    return JSONResponse(RefusalError(500, "internal_error", "the server failed at this request").to_json(), 500)
