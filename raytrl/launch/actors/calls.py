"""The pools' calls on Ray actors."""

from collections.abc import Collection, Sequence
from concurrent.futures import Future
from typing import Any

import ray
import ray.exceptions

from raytrl.errors import ActorBrokenError
from raytrl.launch.actors.pool import ActorLostError, Arrivals
from raytrl.launch.session.gauges import PoolGauges

_FINAL_AFTER = 10  # answers "died" in a row, half a second apart: it is not coming back


class RayCalls:
    """`pool.Calls` on Ray actors. A ticket is the future of a call's answer."""

    def __init__(self, handles: Sequence[Any], gauges: PoolGauges) -> None:
        self._handles, self._gauges = handles, gauges
        self._down: set[int] = set()
        self._restarts = 0
        self._actor_of: dict[Future[Any], int] = {}
        self._arrivals = Arrivals()
        self._deaths = [0] * len(handles)

    def __len__(self) -> int:
        return len(self._handles)

    def tell(self, actor: int, method: str, *arguments: Any) -> None:
        getattr(self._handles[actor], method).remote(*arguments)

    def call(self, actor: int, method: str, *arguments: Any) -> "Future[Any]":
        ticket: Future[Any] = getattr(self._handles[actor], method).remote(*arguments).future()
        self._actor_of[ticket] = actor
        self._gauges.waiting(len(self._actor_of))
        ticket.add_done_callback(self._arrivals.add)
        return ticket

    def wait(self, tickets: Collection["Future[Any]"], timeout_s: float) -> "list[Future[Any]]":
        return self._arrivals.wait(tickets, timeout_s)

    def drop(self, ticket: "Future[Any]") -> None:
        self._actor_of.pop(ticket, None)
        self._gauges.waiting(len(self._actor_of))

    def result(self, ticket: "Future[Any]") -> Any:
        actor = self._actor_of.pop(ticket)
        self._gauges.waiting(len(self._actor_of))
        try:
            answer = ticket.result()
        except ray.exceptions.RayTaskError as error:
            self._deaths[actor] = 0
            if isinstance(error.cause, ActorBrokenError):
                self.tell(actor, "end_if_broken")
                self._note_loss(actor)
                raise ActorLostError(str(error.cause), broke=True) from None
            raise error.cause if isinstance(error.cause, Exception) else error from None
        except ray.exceptions.RayError as error:  # died, restarting, unreachable, its answer lost with its node
            self._deaths[actor] += isinstance(error, ray.exceptions.ActorDiedError)
            self._note_loss(actor)
            text = f"{type(error).__name__}: {str(error).strip().splitlines()[0]}"
            raise ActorLostError(text, final=self._deaths[actor] >= _FINAL_AFTER) from None
        self._deaths[actor] = 0
        self._down.discard(actor)
        return answer

    def _note_loss(self, actor: int) -> None:
        """One death is told by every call that was under way."""
        if actor not in self._down:
            self._down.add(actor)
            self._restarts += 1
            self._gauges.restarts(self._restarts)
