"""`raytrl serve` as a user starts it, and questions to it."""

import json
import signal
import subprocess
import urllib.error
import urllib.request
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil

from tests.runs import LIMIT_S, free_port, kill_everything, start, wait_for


@dataclass
class Server:
    """One that is ready."""

    process: subprocess.Popen[str]
    base: str
    log: Path

    def said(self) -> str:
        return self.log.read_text()

    def ask(
        self, path: str, body: Any = None, *, headers: Mapping[str, str] | None = None, method: str | None = None
    ) -> tuple[int, dict[str, str], Any]:
        """Status, headers and body (JSON where it is) of one request; bytes go out as they are."""
        data = body if isinstance(body, bytes | None) else json.dumps(body).encode()
        request = urllib.request.Request(
            self.base + path, data, {"Content-Type": "application/json"} | dict(headers or {})
        )
        request.method = method or ("GET" if data is None else "POST")
        try:
            with urllib.request.urlopen(request, timeout=120) as answer:
                status, found, text = answer.status, dict(answer.headers), answer.read()
        except urllib.error.HTTPError as error:
            status, found, text = error.code, dict(error.headers), error.read()
        try:
            return status, found, json.loads(text)
        except ValueError:
            return status, found, text.decode()

    def below(self, name: str) -> list[psutil.Process]:
        """Its processes with this in their title or command."""
        found = []
        for child in psutil.Process(self.process.pid).children(recursive=True):
            try:
                if name in " ".join(child.cmdline()) or name in child.name():
                    found.append(child)
            except psutil.NoSuchProcess:
                continue
        return found

    def stop(self) -> str:
        """As Ctrl-C does; returns all that it has said."""
        self.process.send_signal(signal.SIGTERM)
        assert self.process.wait(timeout=LIMIT_S) == 0, self.said()
        return self.said()


@contextmanager
def served(folder: Path, *words: str, port: int | None = None, **environment: str) -> Iterator[Server]:
    """A server that is ready within the block, and is stopped after it if that has not happened."""
    port = port or free_port()
    log = folder / f"serve-{port}.log"
    output = log.open("w")
    with output:
        process = start("serve", *words, f"serve.port={port}", cwd=folder, output=output, **environment)
        server = Server(process, f"http://127.0.0.1:{port}", log)
        try:
            wait_for("ready", lambda: "ready at" in server.said() or process.poll() is not None, process)
            yield server
            if process.poll() is None:
                server.stop()
        finally:
            if process.poll() is None:
                kill_everything(process)
