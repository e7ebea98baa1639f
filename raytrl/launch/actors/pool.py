"""Requests over a pool of actors that may die: what is lost goes to another actor, and no wait is without limit.

Knows nothing of Ray: `Calls` says how an actor is called. A pool belongs to one learner worker, and to one of its threads at
a time.
"""

import math
import threading
import time
from collections import ChainMap, deque
from collections.abc import Callable, Collection, Iterable, Iterator
from dataclasses import dataclass
from typing import Any, Protocol

from raytrl.errors import ActorsGoneError, RunError, StalledError, WeightsGoneError, WeightsVersionError

_REVIVE_PAUSE_S = 0.5
_BEAT_S = 1.0
# A request that was lost this often is taken for the cause of it.
_MAX_LOSSES = 8
# An actor that broke so often without an answer in between is left out.
_MAX_BREAKS = 3
# How long the others are waited for once the first actor is up to date: this, and so many times what the first took.
_PATIENCE_S = 2.0
_PATIENCE = 3.0


class ActorLostError(Exception):
    """The actor died, or cannot be reached; `final`: it does not come back; `broke`: it raised, and is started anew."""

    def __init__(self, text: str, final: bool = False, broke: bool = False) -> None:
        super().__init__(text)
        self.final, self.broke = final, broke


class Calls(Protocol):
    """How the actors of a pool are called. A ticket stands for a call under way."""

    def __len__(self) -> int:
        """Actors in the pool, living or not."""
        ...

    def call(self, actor: int, method: str, *arguments: Any) -> Any:
        """Start a call; returns a ticket at once."""
        ...

    def tell(self, actor: int, method: str, *arguments: Any) -> None:
        """Start a call that nobody waits for, and that may be lost."""
        ...

    def wait(self, tickets: Collection[Any], timeout_s: float) -> list[Any]:
        """The tickets that are done; waits until at least one is, or the time is up.

        Each is told once; one that is done and not among those that are asked for is not told later either.
        """
        ...

    def drop(self, ticket: Any) -> None:
        """Nobody will ask for its result."""
        ...

    def result(self, ticket: Any) -> Any:
        """Of a ticket that is done. Raises what the actor raised, or ActorLostError."""
        ...


class Arrivals:
    """`Calls.wait` where other threads say what is done: what it costs follows from what arrives, not from what flies."""

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self._arrived: list[Any] = []

    def add(self, ticket: Any) -> None:
        with self._changed:
            self._arrived.append(ticket)
            self._changed.notify()

    def wait(self, tickets: Collection[Any], timeout_s: float) -> list[Any]:
        with self._changed:
            self._changed.wait_for(lambda: any(ticket in tickets for ticket in self._arrived), timeout_s)
            arrived, self._arrived = self._arrived, []
        return [ticket for ticket in arrived if ticket in tickets]


@dataclass(frozen=True)
class Request:
    """One call that any actor of the pool may answer."""

    name: str  # for messages
    place: int  # of equally busy actors, the one of choice is `place` modulo the pool's size
    method: str
    arguments: tuple[Any, ...]
    losses: int = 0


class Pool:
    """Sends requests, takes answers in any order, and brings reborn actors up to date before they serve."""

    def __init__(
        self,
        calls: Calls,
        what: str,
        who: str,
        timeout_s: float,
        window: int | None = None,
        beat: Callable[[], None] = lambda: None,
    ) -> None:
        """
        Args:
            what: the actors, in the plural, for messages: "rollout actors".
            who: the one that waits.
            timeout_s: without any answer before StalledError.
            window: requests that an actor has at a time; the others wait here, for whichever actor is done first.
                None: requests are shared out at once.
            beat: is called every few seconds while it waits: a wait within its limit is no standstill.
        """
        self._calls, self._what, self._who, self._timeout_s = calls, what, who, timeout_s
        self._window = math.inf if window is None else window
        self._beat = beat
        self._prepare: tuple[Any, ...] = ()  # the call that brings an actor up to date: method, then arguments
        self._expect: Any = None
        self._up: set[int] = set()
        self._late: set[int] = set()  # actors that nobody waits for until they are up to date
        self._gone: dict[int, str] = {}  # for good, and why
        self._next_try: dict[int, float] = {}  # actors that are down and not being prepared
        self._preparing: dict[Any, int] = {}
        self._flying: dict[Any, tuple[Request, int]] = {}
        self._load = [0] * len(calls)  # requests that each actor has
        self._breaks = [0] * len(calls)  # since its last answer
        self._has_served = False
        self._unsent: deque[Request] = deque()
        self._last_loss = ""

    @property
    def up(self) -> frozenset[int]:
        """Actors that have proved to be up to date."""
        return frozenset(self._up)

    @property
    def size(self) -> int:
        """Actors in the pool, living or not."""
        return len(self._calls)

    @property
    def is_busy(self) -> bool:
        """Whether requests are under way."""
        return bool(self._flying or self._unsent)

    @property
    def is_gone(self) -> bool:
        """Whether all actors are, for good."""
        return len(self._gone) == len(self._calls)

    @property
    def last_loss(self) -> str:
        """How the last actor was lost, for messages."""
        return self._last_loss

    def prepare_all(self, method: str, *arguments: Any, expect: Any = None, timeout_s: float | None = None) -> None:
        """Bring all actors up to date; returns when at least one is, and the others are, or are down, or are far behind.

        An actor that is down now is brought up to date by the same call when it is back. One that takes much longer
        than the first, most likely as it starts anew, is not waited for, nor in later rounds until it has caught up.

        Args:
            expect: what the call must answer, the proof that the actor is up to date.
            timeout_s: default: the pool's.

        Raises:
            StalledError: none was up in time.
            ActorsGoneError, WeightsGoneError: none will be. And what an actor raised.
        """
        self.forget()
        if self.is_gone:
            raise self._all_gone()
        self._prepare, self._expect = (method, *arguments), expect
        self._next_try = {actor: 0.0 for actor in range(len(self._calls)) if actor not in self._gone}
        limit_s = timeout_s or self._timeout_s
        deadline = time.monotonic() + limit_s
        began, patience_ends = time.monotonic(), math.inf
        self._start_preparing()
        awaited = {ticket for ticket, actor in self._preparing.items() if actor not in self._late}
        while not self._up or (awaited & self._preparing.keys() and time.monotonic() < patience_ends):
            self._take(deadline, limit_s, method, patience_ends)
            if self._up and patience_ends == math.inf:
                now = time.monotonic()
                patience_ends = now + _PATIENCE_S + _PATIENCE * (now - began)
        self._late |= {self._preparing[ticket] for ticket in awaited & self._preparing.keys()}

    def take_over(self, up: Collection[int], method: str, *arguments: Any, expect: Any = None) -> None:
        """As `prepare_all`, which another worker's pool of the same actors has done; these it has found up to date."""
        self.forget()
        self._prepare, self._expect = (method, *arguments), expect
        self._up, self._has_served = set(up) - self._gone.keys(), True
        due = time.monotonic() + _REVIVE_PAUSE_S
        self._next_try = {
            actor: due for actor in range(len(self._calls)) if actor not in self._up and actor not in self._gone
        }

    def tell_all(self, method: str, *arguments: Any) -> None:
        """Start a call of every actor that nobody waits for: what it does must be made up for by `prepare_all`."""
        for actor in range(len(self._calls)):
            if actor not in self._gone:
                self._calls.tell(actor, method, *arguments)

    def all_answer(self, expected: Any, method: str, *arguments: Any, timeout_s: float) -> bool:
        """Whether each actor answers so in time; False as soon as one does not, or is lost. Not while requests fly."""
        waiting = {self._calls.call(actor, method, *arguments) for actor in range(len(self._calls))}
        deadline = time.monotonic() + timeout_s
        while waiting:
            self._beat()
            done = self._calls.wait(waiting, max(0.01, min(_BEAT_S, deadline - time.monotonic())))
            if not done and time.monotonic() > deadline:
                self._drop(waiting)
                return False
            waiting.difference_update(done)
            try:
                as_expected = all(self._calls.result(ticket) == expected for ticket in done)
            except ActorLostError as loss:
                self._last_loss, as_expected = str(loss), False
            if not as_expected:
                self._drop([*done, *waiting])
                return False
        return True

    def _drop(self, tickets: Iterable[Any]) -> None:
        for ticket in tickets:
            self._calls.drop(ticket)

    def forget(self) -> None:
        """Until `prepare_all` no actor is up to date, and nothing is kept that it was brought up to date with."""
        assert not self.is_busy, "requests are under way"
        self._prepare, self._expect = (), None
        self._up.clear()
        self._drop(self._preparing)
        self._preparing.clear()
        self._next_try.clear()

    def abandon(self) -> None:
        """Nobody waits any more for what was sent and not answered."""
        self._drop(self._flying)
        self._flying.clear()
        self._unsent.clear()
        self._load = [0] * len(self._calls)

    def send(self, request: Request) -> None:
        """Returns at once; the request goes to the least busy actor that is up, of several to its actor of choice."""
        self._unsent.append(request)
        self._hand_out()

    def _hand_out(self) -> None:
        while self._unsent and self._up:
            choice = self._unsent[0].place % len(self._calls)
            actor = min(self._up, key=lambda candidate: (self._load[candidate], candidate != choice, candidate))
            if self._load[actor] >= self._window:
                return
            request = self._unsent.popleft()
            self._load[actor] += 1
            self._flying[self._calls.call(actor, request.method, *request.arguments)] = (request, actor)

    def answers(self) -> Iterator[tuple[Request, Any]]:
        """The answer to every request that was sent, as they come.

        Raises:
            StalledError: no actor answered within the limit.
            WeightsGoneError: nobody has the weights any more that were asked for, nor can get them.
            ActorsGoneError: all actors are gone for good. And what an actor raised.
        """
        deadline = time.monotonic() + self._timeout_s
        while self._flying or self._unsent:
            for answer in self._take(deadline, self._timeout_s, "an answer"):
                yield answer
                deadline = time.monotonic() + self._timeout_s

    def _take(
        self, deadline: float, limit_s: float, awaited: str, patience_ends: float = math.inf
    ) -> list[tuple[Request, Any]]:
        """Wait for whatever comes next: answers (returned), an actor that is up to date, a loss, the end of patience."""
        self._start_preparing()
        self._beat()
        pause = min(_BEAT_S, min((due - time.monotonic() for due in self._next_try.values()), default=limit_s))
        tickets = ChainMap[Any, Any](self._preparing, self._flying)  # a view: nothing is copied
        ready = self._calls.wait(tickets, max(0.01, min(pause, min(deadline, patience_ends) - time.monotonic())))
        if not ready and time.monotonic() > deadline:
            raise self._stalled(awaited, limit_s)
        answers: list[tuple[Request, Any]] = []
        for ticket in ready:
            if ticket in self._preparing:
                self._prepared(ticket)
            else:
                answers += self._answered(ticket)
        self._hand_out()
        return answers

    def _prepared(self, ticket: Any) -> None:
        actor = self._preparing.pop(ticket)
        try:
            proof = self._calls.result(ticket)
        except ActorLostError as loss:
            self._lost(actor, loss)
            return
        except WeightsGoneError as gone:  # until the next round nothing brings it up to date
            self._last_loss = f"actor {actor}: {gone}"
            if not (self._up or self._preparing or self._next_try):
                raise WeightsGoneError(
                    f"{self._who}: no {self._what} are up to date any more, nor can any be; last: {self._last_loss}"
                ) from None
            return
        if proof != self._expect:
            raise WeightsVersionError(
                f"{self._who}: actor {actor} of the {self._what} is not up to date after {self._prepare[0]}; found: "
                f"{proof}; expected: {self._expect}"
            )
        self._up.add(actor)
        self._has_served = True
        self._late.discard(actor)

    def _answered(self, ticket: Any) -> list[Any]:
        request, actor = self._flying.pop(ticket)
        self._load[actor] -= 1
        try:
            answer = self._calls.result(ticket)
            self._breaks[actor] = 0
            return [(request, answer)]
        except ActorLostError as loss:
            self._lost(actor, loss)
        except WeightsVersionError as error:  # restarted behind our back: up again, but not up to date
            self._lost(actor, ActorLostError(str(error)))
        if request.losses + 1 >= _MAX_LOSSES:
            raise RunError(
                f"{self._who}: {request.name}: was lost with {_MAX_LOSSES} {self._what} one after the other, so it may "
                f"be what ends them; last: {self._last_loss}"
            ) from None
        # First in the line: whoever waits has waited for it longest.
        self._unsent.appendleft(
            Request(request.name, request.place, request.method, request.arguments, request.losses + 1)
        )
        return []

    def _lost(self, actor: int, loss: ActorLostError) -> None:
        self._up.discard(actor)
        self._last_loss = f"actor {actor}: {loss}"
        if loss.broke:
            self._breaks[actor] += 1
            if not self._has_served and all(self._breaks):  # as with an engine that cannot load this model
                raise ActorsGoneError(f"{self._who}: no {self._what} can serve; last: {self._last_loss}") from None
        if loss.final or self._breaks[actor] >= _MAX_BREAKS:
            self._gone[actor] = str(loss)
            self._next_try.pop(actor, None)
            if self.is_gone:
                raise self._all_gone() from None
        elif actor not in self._preparing.values():
            self._next_try.setdefault(actor, time.monotonic() + _REVIVE_PAUSE_S)

    def _all_gone(self) -> ActorsGoneError:
        return ActorsGoneError(f"{self._who}: all {self._what} are gone for good; last: {self._last_loss}")

    def _start_preparing(self) -> None:
        for actor in [actor for actor, due in self._next_try.items() if due <= time.monotonic()]:
            del self._next_try[actor]
            self._preparing[self._calls.call(actor, *self._prepare)] = actor

    def _stalled(self, awaited: str, limit_s: float) -> StalledError:
        waiting = sorted({request.name for request, _ in self._flying.values()} | {r.name for r in self._unsent})
        actors = sorted({actor for _, actor in self._flying.values()} | set(self._preparing.values()))
        named = f" ({', '.join(waiting[:4])})" if waiting else ""
        return StalledError(
            f"{self._who} has waited {limit_s:g} s for {awaited} of the {self._what}{named}; "
            f"{'; '.join(self._doing(actor) for actor in actors) or 'none is up'}"
            f"{'; last loss: ' + self._last_loss if self._last_loss else ''}"
        )

    def _doing(self, actor: int) -> str:
        ticket = self._calls.call(actor, "doing")
        try:
            found = self._calls.result(ticket) if self._calls.wait([ticket], 2.0) else "does not answer"
        except ActorLostError:
            found = "is down"
        return f"actor {actor}: {found}"
