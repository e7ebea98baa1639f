"""Actors in this process instead of Ray's."""

from collections.abc import Collection, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

from raytrl.launch.actors.pool import Arrivals


class ThreadCalls:
    """`pool.Calls` on objects in this process, with one thread an actor."""

    def __init__(self, actors: Sequence[Any]) -> None:
        self.actors = list(actors)
        self.threads = [ThreadPoolExecutor(1) for _ in actors]
        self._arrivals = Arrivals()

    def __len__(self) -> int:
        return len(self.actors)

    def call(self, actor: int, method: str, *arguments: Any) -> "Future[Any]":
        ticket = self.threads[actor].submit(getattr(self.actors[actor], method), *arguments)
        ticket.add_done_callback(self._arrivals.add)
        return ticket

    def tell(self, actor: int, method: str, *arguments: Any) -> None:
        self.call(actor, method, *arguments)

    def wait(self, tickets: Collection["Future[Any]"], timeout_s: float) -> list["Future[Any]"]:
        return self._arrivals.wait(tickets, timeout_s)

    def drop(self, ticket: "Future[Any]") -> None:
        """Nothing is kept of it."""

    def result(self, ticket: "Future[Any]") -> Any:
        return ticket.result()
