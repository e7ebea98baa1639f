"""Actors that each hold one of several finished models at a time, and the pool that asks them."""

from collections.abc import Callable, Sequence
from typing import Any, Protocol

from raytrl.config.sections.benchmark import MeasuringSection
from raytrl.errors import WeightsVersionError
from raytrl.launch.actors.base import CONTROL, Actor, in_group
from raytrl.launch.actors.calls import RayCalls
from raytrl.launch.actors.pool import Calls, Pool, Request
from raytrl.launch.session.gauges import RoleGauges
from raytrl.records.samples import Attempt

_WINDOW = 2  # requests of an actor: the next is there when it is done with one


class Held(Protocol):
    """A model that is measured, in its actor."""

    close: Callable[[], None]

    def answer(self, method: str, number: int, requests: Sequence[Any]) -> Any:
        """What it makes of one slice; `number` is that of the slice."""
        ...


class MeasuringActor(Actor):
    """Holds a model by the key that the run file has it under."""

    def __init__(self, make_load: Callable[[], Callable[[str], Held]]) -> None:
        super().__init__()
        self._load = make_load()
        self._key, self._held = "", None  # type: str, Held | None

    @in_group(CONTROL)
    def start(self) -> None:
        """Nothing is loaded before it is known which model."""

    @in_group(CONTROL)
    def prepare(self, attempt: Attempt, key: str) -> str:
        """Hold this model and no other; returns which it holds."""
        self.begin(attempt)
        with self._busy(f"loading {key}"):
            if self._key != key:
                if self._held is not None:  # there may be no room for two
                    self._key = ""
                    self._held.close()
                self._held, self._key = self._load(key), key
        return self._key

    def answer(self, attempt: Attempt, key: str, method: str, number: int, requests: Sequence[Any]) -> Any:
        """`Held.answer`.

        Raises:
            WeightsVersionError: it holds another model, or none since it was restarted.
            StaleAttemptError: a newer attempt has begun.
        """
        with self._busy(f"{method} of slice {number}"):
            self._refuse_if_old(attempt)
            if self._held is None or self._key != key:
                raise WeightsVersionError(f"{key}: this actor holds {self._key or 'no model'}")
            return self._held.answer(method, number, requests)


class PoolAsker:
    """Asks a pool of measuring actors; which of them answers changes nothing."""

    def __init__(self, calls: Calls, what: str, who: str, section: MeasuringSection, attempt: Attempt) -> None:
        """
        Args:
            what: the actors, in the plural, for messages.
            who: the one that waits.
        """
        self._pool = Pool(calls, what, who, section.timeout_s, _WINDOW)
        self._section, self._attempt, self._key = section, attempt, ""

    def hold(self, key: str) -> None:
        """Returns when at least one actor holds the model; one that is lost loads it again before it serves.

        Raises:
            StalledError: none did in time. And what an actor raised.
        """
        self._pool.prepare_all("prepare", self._attempt, key, expect=key, timeout_s=self._section.start_timeout_s)
        self._key = key

    def ask(self, method: str, slices: Sequence[Sequence[Any]], tell: Callable[[int, int], None]) -> list[Any]:
        """The answer to every slice, in order.

        Args:
            tell: hears how many slices of how many are answered.

        Raises:
            StalledError, ActorsGoneError, RunError: as `Pool.answers`. And what an actor raised.
        """
        for number, part in enumerate(slices):
            name = f"{self._key}: {method} of slice {number + 1} of {len(slices)}"
            self._pool.send(Request(name, number, "answer", (self._attempt, self._key, method, number, part)))
        answers: dict[int, Any] = {}
        for request, answer in self._pool.answers():
            answers[request.place] = answer
            tell(len(answers), len(slices))
        return [answers[number] for number in range(len(slices))]


def asker_on(handles: Sequence[Any], run_name: str, role: str, section: MeasuringSection) -> PoolAsker:
    """An asker of Ray actors that this process has started."""
    calls = RayCalls(handles, RoleGauges(run_name, role).part())
    return PoolAsker(calls, f"{role} actors", "the evaluation", section, Attempt(run_name, 1))
