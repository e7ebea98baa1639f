"""Several batches on their way at a time: the loop on real actors' code, in threads, with deaths in every phase."""

import threading
from collections.abc import Callable
from concurrent.futures import Future
from contextlib import nullcontext
from copy import deepcopy
from functools import partial
from typing import Any

import pytest
from test_learner import parameters
from test_loop import STEPS, by_hand
from toy import LocalScorer, Log, Prompts, config, gpt2, make_engine, make_learner

from raytrl.config.sections.rollout import RolloutSection
from raytrl.launch.actors.generator import PoolGenerator
from raytrl.launch.actors.pool import ActorLostError, Pool
from raytrl.launch.actors.rollout import RolloutActor
from raytrl.launch.actors.transport import send
from raytrl.loop.loop import Schedule, run
from raytrl.records.samples import Attempt
from raytrl.roles.learner.learner import PpoLearner
from raytrl.roles.weights.buckets import checksum
from tests.thread_calls import ThreadCalls

ATTEMPT = Attempt("run", 1)
WEIGHTS = threading.Lock()


class MortalCalls(ThreadCalls):
    """One lane's calls on actors that other lanes may call, too. `dies` is asked before each call, whoever makes it."""

    def __init__(self, actors: list[Any], numbers: list[int], make: Callable[[], Any], dies: Any) -> None:
        super().__init__([None] * len(numbers))
        self._everybody, self._numbers, self._make, self._dies = actors, numbers, make, dies

    def call(self, actor: int, method: str, *arguments: Any) -> "Future[Any]":
        number = self._numbers[actor]

        def work() -> Any:
            fate = self._dies(number, method, arguments)
            if fate:
                self._everybody[number] = self._make()
                raise ActorLostError("killed", final=fate == "for good")
            called = self._everybody[number]
            # An actor has one thread for weights, whoever sends them.
            with nullcontext() if method == "generate" else WEIGHTS:
                result = getattr(called, method)(*arguments)
            if called is not self._everybody[number]:
                raise ActorLostError("killed meanwhile")
            return result

        ticket = self.threads[actor].submit(work)
        ticket.add_done_callback(self._arrivals.add)
        return ticket


def generator(lag: int, actors: int, versions: int, dies: Any = lambda *call: "", timeout_s: float = 20.0) -> Any:
    def make() -> RolloutActor:
        return RolloutActor(lambda: make_engine(gpt2(width=16), num_versions=versions))

    everybody, lanes = [make() for _ in range(actors)], config(max_lag=lag).lanes(versions)
    groups = -(-lanes // versions)
    pools = []
    for lane in range(lanes):
        numbers = list(range(actors))[lane % groups :: groups]
        pools.append(
            Pool(MortalCalls(everybody, numbers, make, dies), f"actors of lane {lane}", "w", timeout_s, window=2)
        )
    rollout = RolloutSection(chunk_prompts=8, timeout_s=timeout_s)
    return PoolGenerator(
        pools,
        rollout,
        samples=1,
        attempt=ATTEMPT,
        send_weights=partial(send, put=deepcopy),
        ahead=lag > 0,
        groups=groups,
    )


def learned(lag: int, pool: PoolGenerator, log: Log | None = None, **schedule: int) -> PpoLearner:
    learner = make_learner(gpt2(width=16), config(max_lag=lag))
    run(
        Schedule(STEPS, max_lag=lag, lanes=len(pool._lanes), **schedule),
        Prompts(16),
        pool,
        LocalScorer(),
        learner,
        log or Log(),
    )
    return learner


@pytest.mark.parametrize(
    ("lag", "actors", "versions"),
    [
        *((0, 2, 1), (1, 1, 1), (1, 3, 1), (1, 1, 2), (2, 2, 1), (2, 3, 1), (2, 1, 2), (2, 1, 3), (2, 3, 3)),
        *((3, 3, 1), (3, 1, 3), (3, 2, 2), (3, 2, 4)),
    ],
)
@pytest.mark.parametrize("eval_every", [0, 3])
def test_lanes_of_actors_are_as_one_process(lag: int, actors: int, versions: int, eval_every: int) -> None:
    expected, _ = by_hand(lag)
    found = learned(lag, generator(lag, actors, versions), eval_every=eval_every)
    assert checksum(parameters(found)) == checksum(parameters(expected))


class Death:
    """Of one actor, at its n-th call of a method."""

    def __init__(self, method: str, at: int, actor: int = 0) -> None:
        self.method, self.at, self.actor, self.seen, self.lock = method, at, actor, 0, threading.Lock()

    def __call__(self, actor: int, method: str, arguments: Any) -> str:
        with self.lock:
            self.seen += actor == self.actor and method == self.method
            return "once" if (actor, method) == (self.actor, self.method) and self.seen == self.at else ""


@pytest.mark.parametrize("method", ["take_bucket", "load_weights", "generate"])
@pytest.mark.parametrize("at", [pytest.param(1, marks=pytest.mark.slow), 2, pytest.param(3, marks=pytest.mark.slow)])
@pytest.mark.parametrize(("lag", "actors", "versions"), [(1, 1, 1), (1, 1, 2), (2, 2, 1), (2, 1, 3), (3, 2, 2)])
def test_a_death_in_any_phase_changes_nothing(method: str, at: int, lag: int, actors: int, versions: int) -> None:
    """Also where nobody else is in the lane: whoever is reborn finds the version that is asked for."""
    expected, _ = by_hand(lag)
    death, log = Death(method, at), Log()
    found = learned(lag, generator(lag, actors, versions, death), log)
    assert death.seen >= at
    assert checksum(parameters(found)) == checksum(parameters(expected))
    assert all(metrics["rollout/redone_newer"] == 0 for metrics in log.metrics)


def test_a_lane_whose_actors_are_gone_is_done_by_the_others_and_newer_weights() -> None:
    """The actor of lane 1 is lost for good with batch 3 of version 1: the batches of its lane are made by the newest weights."""
    gone = threading.Event()

    def dies(actor: int, method: str, arguments: Any) -> str:
        if actor == 1 and method == "generate" and arguments[1][0].step == 3:
            gone.set()
        return "for good" if actor == 1 and gone.is_set() else ""

    log = Log()
    learned(2, generator(2, 2, 1, dies, timeout_s=20.0), log)
    versions = [{response.policy_version for response in rollout.responses} for rollout in log.rollouts]
    assert versions == [{0}, {0}, {0}, {3}, {2}, {5}, {4}, {7}]
    assert [metrics["rollout/redone_newer"] for metrics in log.metrics] == [0, 0, 0, 16, 0, 16, 0, 16]
    assert [metrics["rollout/lag_max"] for metrics in log.metrics] == [0, 1, 2, 0, 2, 0, 2, 0]
