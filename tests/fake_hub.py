"""A Hugging Face Hub on this machine, as far as huggingface_hub 2.4 asks it to make a repository and commit to it.

It stands in for what no test can have: the real one. Files come by both ways that the client has. As LFS (the client's
HF_HUB_DISABLE_XET=1) each is stored and compared with its hash. By Xet, which the client takes by itself, `hf_xet` cuts and
packs files in ways that this hub does not undo: their bytes are not known here, only their sizes and hashes.
"""

import base64
import hashlib
import json
import re
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import unquote

TOKEN = "hf_a-good-one-that-may-stand-nowhere"
USER = "someone"

Files = dict[str, bytes]


@dataclass
class Repo:
    private: bool
    branches: dict[str, Files] = field(default_factory=lambda: {"main": {".gitattributes": b""}})
    messages: list[str] = field(default_factory=list)


class FakeHub:
    """Repositories by id; `refuse` answers a request in the hub's place: a status and a reason, or None."""

    def __init__(self) -> None:
        self.repos: dict[str, Repo] = {}
        self.objects: Files = {}
        self.requests: list[str] = []
        self.uploads: list[str] = []  # hashes of what was stored, each time
        self.refuse: Callable[[str], tuple[int, str] | None] = lambda _: None
        self.hangs_at: re.Pattern[str] | None = None
        self.released = threading.Event()
        outer = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def answer(self) -> None:
                outer.answer(self)

            do_GET = do_POST = do_PUT = do_HEAD = answer  # noqa: N815

            def log_message(self, *_: Any) -> None: ...

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.server.daemon_threads = True
        self.url = f"http://127.0.0.1:{self.server.server_port}"

    def answer(self, request: BaseHTTPRequestHandler) -> None:
        body = _body(request)
        line = f"{request.command} {request.path}"
        self.requests.append(line)
        if self.hangs_at is not None and self.hangs_at.search(line):
            self.released.wait(60)
            request.close_connection = True
            return
        status, answer = self._answer(line, request.headers.get("Authorization"), body)
        content = json.dumps(answer).encode()
        request.send_response(status)
        if "error" in answer:
            request.send_header("X-Error-Message", answer["error"])
        request.send_header("Content-Type", "application/json")
        request.send_header("Content-Length", str(len(content)))
        request.end_headers()
        request.wfile.write(content)

    def _answer(self, line: str, authorization: str | None, body: bytes) -> tuple[int, dict[str, Any]]:
        if refused := self.refuse(line):
            return refused[0], {"error": refused[1]}
        if match := re.fullmatch(r"PUT /storage/(\w+)", line):  # a signed address: nobody else is told the token
            return self._store(match[1], body) if authorization is None else (400, {"error": "told the token"})
        if line.startswith(("GET /v", "POST /v", "HEAD /v")):
            return self._xet(line, authorization)
        if authorization != f"Bearer {TOKEN}":
            return 401, {"error": "Invalid credentials in Authorization header"}
        for pattern, method in _ROUTES:
            if match := re.fullmatch(pattern, line):
                return method(self, *map(unquote, match.groups()), body=body)
        return 404, {"error": f"this hub has no {line}"}

    def _create(self, body: bytes) -> tuple[int, dict[str, Any]]:
        asked = json.loads(body)
        name = f"{asked['organization'] or USER}/{asked['name']}"
        answer = {"url": f"{self.url}/{name}", "name": name}
        if name in self.repos:
            return 409, answer | {"error": "You already created this model repo"}
        self.repos[name] = Repo(asked.get("visibility") == "private")
        return 200, answer

    def _info(self, name: str, branch: str = "main", *, body: bytes) -> tuple[int, dict[str, Any]]:
        repo = self.repos[name]
        siblings = [{"rfilename": file} for file in repo.branches[branch]]
        return 200, {"id": name, "private": repo.private, "sha": "0" * 40, "siblings": siblings, "tags": []}

    def _branch(self, name: str, branch: str, *, body: bytes) -> tuple[int, dict[str, Any]]:
        branches = self.repos[name].branches
        if branch in branches:
            return 409, {"error": "Reference already exists"}
        branches[branch] = dict(branches["main"])
        return 200, {}

    def _preupload(self, name: str, branch: str, *, body: bytes) -> tuple[int, dict[str, Any]]:
        there = self.repos[name].branches[branch]
        found = []
        for file in json.loads(body)["files"]:
            mode = "lfs" if file["path"].endswith(".safetensors") else "regular"
            found.append({"path": file["path"], "uploadMode": mode, "shouldIgnore": False})
            if file["path"] in there:
                found[-1]["oid"] = _oid(there[file["path"]], mode)
        return 200, {"files": found}

    def _batch(self, name: str, *, body: bytes) -> tuple[int, dict[str, Any]]:
        objects = []
        for file in json.loads(body)["objects"]:
            objects.append(file)
            if file["oid"] not in self.objects:
                file["actions"] = {"upload": {"href": f"{self.url}/storage/{file['oid']}"}}
        return 200, {"transfer": "basic", "objects": objects}

    def _store(self, oid: str, body: bytes) -> tuple[int, dict[str, Any]]:
        if hashlib.sha256(body).hexdigest() != oid:
            return 400, {"error": "the bytes are not those of the hash"}
        self.objects[oid] = body
        self.uploads.append(oid)
        return 200, {}

    def _commit(self, name: str, branch: str, *, body: bytes) -> tuple[int, dict[str, Any]]:
        repo = self.repos[name]
        files = dict(repo.branches[branch])
        for line in map(json.loads, body.splitlines()):
            value = line["value"]
            if line["key"] == "header":
                repo.messages.append(value["summary"])
            elif line["key"] == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            elif line["key"] == "lfsFile":
                files[value["path"]] = self.objects.get(value["oid"], value["oid"].encode())
            else:
                del files[value["path"]]
        repo.branches[branch] = files
        return 200, {"commitUrl": f"{self.url}/{name}/commit/{'1' * 40}", "commitOid": "1" * 40}

    def _xet_token(self, name: str, branch: str, *, body: bytes) -> tuple[int, dict[str, Any]]:
        return 200, {"casUrl": self.url, "accessToken": "short-lived", "exp": int(time.time()) + 3600}

    def _xet(self, line: str, authorization: str | None) -> tuple[int, dict[str, Any]]:
        """What hf_xet 1.8 asks of a store: is a piece known (no), take a pack, take the list of pieces."""
        if authorization != "Bearer short-lived":
            return 401, {"error": "not the store's own token"}
        if line.startswith("POST /v1/xorbs/"):
            return 200, {"was_inserted": True}
        return (200, {"result": 1}) if line == "POST /v1/shards" else (404, {"error": "not known"})

    def _valid(self, body: bytes) -> tuple[int, dict[str, Any]]:
        return 200, {"errors": [], "warnings": []}


_NAME = r"([\w.-]+/[\w.-]+)"
_ROUTES: tuple[tuple[str, Callable[..., tuple[int, dict[str, Any]]]], ...] = (
    (r"POST /api/repos/create", FakeHub._create),
    (r"POST /api/validate-yaml", FakeHub._valid),
    (rf"GET /api/models/{_NAME}", FakeHub._info),
    (rf"GET /api/models/{_NAME}/revision/([^/]+)", FakeHub._info),
    (rf"POST /api/models/{_NAME}/branch/([^/]+)", FakeHub._branch),
    (rf"POST /api/models/{_NAME}/preupload/([^/]+)", FakeHub._preupload),
    (rf"POST /{_NAME}\.git/info/lfs/objects/batch", FakeHub._batch),
    (rf"GET /api/models/{_NAME}/xet-write-token/([^/]+)", FakeHub._xet_token),
    (rf"POST /api/models/{_NAME}/commit/([^/]+)", FakeHub._commit),
)


def _oid(content: bytes, mode: str) -> str:
    """What the hub calls a file by: git's hash, or that of LFS."""
    if mode == "lfs":
        return hashlib.sha256(content).hexdigest()
    return hashlib.sha1(b"blob %d\0%s" % (len(content), content), usedforsecurity=False).hexdigest()


def _body(request: BaseHTTPRequestHandler) -> bytes:
    if request.headers.get("Transfer-Encoding") != "chunked":
        return request.rfile.read(int(request.headers.get("Content-Length", 0)))
    parts = []
    while size := int(request.rfile.readline(), 16):
        parts.append(request.rfile.read(size))
        request.rfile.readline()
    request.rfile.readline()
    return b"".join(parts)


@contextmanager
def fake_hub() -> Iterator[FakeHub]:
    hub = FakeHub()
    threading.Thread(target=hub.server.serve_forever, args=(0.01,), daemon=True).start()
    try:
        yield hub
    finally:
        hub.released.set()
        hub.server.shutdown()
        hub.server.server_close()
