"""The end of a server, as the process that started it brings it about."""

import socket
from types import SimpleNamespace
from typing import Any

import pytest

from raytrl.launch.serving import service
from raytrl.launch.serving.service import Service


def test_it_hangs_up_before_its_replicas_end(monkeypatch: pytest.MonkeyPatch) -> None:
    """Serve's proxies answer 500 for replicas that are gone. One of them has ended by itself."""
    proxies = {"a": {"actor_name": "gone"}, "b": {"actor_name": "proxy"}}
    killed: list[str] = []
    with socket.create_server(("127.0.0.1", 0)) as listening:

        def get_actor(name: str, namespace: str) -> str:
            if name == "gone":
                raise ValueError("no actor of that name")
            return f"{namespace}/{name}"

        def kill(actor: str) -> None:
            killed.append(actor)
            listening.close()

        stopped: Any = Service.__new__(Service)
        stopped._run = SimpleNamespace(serve=SimpleNamespace(host="127.0.0.1", port=listening.getsockname()[1]))
        monkeypatch.setattr(service, "_details", lambda: {"proxies": proxies})
        monkeypatch.setattr(service, "ray", SimpleNamespace(get_actor=get_actor, kill=kill))
        stopped._hang_up()
    assert killed == ["serve/proxy"]
