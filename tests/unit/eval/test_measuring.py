"""Slices of requests over actors: the same whoever answers, and none is lost with an actor."""

import math
from concurrent.futures import Future
from types import SimpleNamespace
from typing import Any

import pytest

from raytrl.config.sections.benchmark import BenchmarkSection
from raytrl.errors import NonFiniteError, WeightsVersionError
from raytrl.launch.actors.measuring import MeasuringActor, PoolAsker
from raytrl.launch.actors.pool import ActorLostError
from raytrl.records.samples import Attempt
from raytrl.roles.benchmark.sliced import Answered, SlicedLM, sliced
from tests.thread_calls import ThreadCalls


def requests(*choices: int, task: str = "a") -> list[Any]:
    """Of documents with so many choices."""
    return [
        SimpleNamespace(task_name=task, doc_id=doc, args=(f"{doc}", f"{choice}"))
        for doc, count in enumerate(choices)
        for choice in range(count)
    ]


def test_no_slice_ends_within_a_document() -> None:
    asked = requests(2, 3, 3, 1, 2)
    parts = list(sliced(asked, 4))
    assert [len(part) for part in parts] == [5, 4, 2]
    assert [request for part in parts for request in part] == asked
    assert [len(part) for part in sliced([*requests(2), *requests(2, task="b")], 2)] == [2, 2]
    assert list(sliced([], 4)) == []


def asked_of(answer: Any, size: int = 4) -> SlicedLM:
    return SlicedLM(lambda method, parts: [Answered([answer(*args) for args in part], 1) for part in parts], None, size)


def test_answers_come_in_the_order_asked() -> None:
    lm, asked = asked_of(lambda doc, choice: (-float(doc), True)), requests(2, 3, 3, 1, 2)
    assert lm.loglikelihood(asked) == [(-float(request.doc_id), True) for request in asked]
    assert lm.cut == 3


def test_a_model_that_says_nan_is_no_wrong_answer() -> None:
    lm = asked_of(lambda doc, choice: (math.nan if doc == "2" else -1.0, False))
    with pytest.raises(
        NonFiniteError, match=r"benchmark: a: document 2: the model gave no log-probability; found: nan"
    ):
        lm.loglikelihood(requests(2, 2, 2))
    assert asked_of(lambda doc, choice: (-math.inf, False)).loglikelihood(requests(1)) == [(-math.inf, False)]


class Echo:
    """Stands for a model."""

    def __init__(self, key: str) -> None:
        self.key, self.closed = key, False

    def close(self) -> None:
        self.closed = True

    def answer(self, method: str, number: int, parts: Any) -> Any:
        return self.key, method, number, list(parts)


def make_actor() -> MeasuringActor:
    return MeasuringActor(lambda: Echo)


class Killing(ThreadCalls):
    """Kills actor 0 at some of its answers, which an actor without a model takes its place after."""

    def __init__(self, kills: int) -> None:
        super().__init__([make_actor(), make_actor()])
        self.kills, self.died = kills, 0

    def call(self, actor: int, method: str, *arguments: Any) -> "Future[Any]":
        if actor == 0 and method == "answer" and self.died < self.kills:
            self.died += 1
            self.actors[0] = make_actor()
            ticket = self.threads[0].submit(self._dead)
            ticket.add_done_callback(self._arrivals.add)
            return ticket
        return super().call(actor, method, *arguments)

    @staticmethod
    def _dead() -> None:
        raise ActorLostError("killed")


@pytest.mark.parametrize("kills", [0, 1, 3])
def test_every_slice_is_answered_in_order_by_actors_that_die(kills: int) -> None:
    calls, told = Killing(kills), list[tuple[int, int]]()
    asker = PoolAsker(calls, "echoes", "the test", BenchmarkSection(tasks=["a"]), Attempt("run", 1))
    for key in ("model", "compare"):
        asker.hold(key)
        slices = [[number] * 3 for number in range(9)]
        found = asker.ask("loglikelihood", slices, lambda done, count: told.append((done, count)))
        assert found == [(key, "loglikelihood", number, [number] * 3) for number in range(9)]
    assert told == [(done, 9) for done in range(1, 10)] * 2
    assert calls.died == kills


def test_an_actor_holds_one_model_at_a_time_and_says_which() -> None:
    actor, attempt = make_actor(), Attempt("run", 1)
    with pytest.raises(WeightsVersionError, match="model: this actor holds no model"):
        actor.answer(attempt, "model", "x", 0, [])
    assert actor.prepare(attempt, "model") == "model"
    held = actor._held
    assert isinstance(held, Echo)
    assert actor.prepare(attempt, "model") == "model"
    assert actor._held is held
    assert actor.prepare(attempt, "compare") == "compare"
    assert held.closed
    with pytest.raises(WeightsVersionError, match="model: this actor holds compare"):
        actor.answer(attempt, "model", "x", 0, [])
