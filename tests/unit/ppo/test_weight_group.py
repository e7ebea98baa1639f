"""Weights by broadcast, over real gloo: actors in threads of this process, deaths, rebirths, limits."""

from collections.abc import Callable, Collection
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.multiprocessing as mp
from test_pools import ROLLOUT, expected, responses, weights
from toy import gpt2, make_engine

from raytrl.errors import RunError, WeightGroupError, WeightsVersionError
from raytrl.launch.actors import RolloutActor
from raytrl.launch.pool import Arrivals, Pool
from raytrl.launch.roles import RolloutPool
from raytrl.launch.transport import Receivers, SentWeights, broadcast, send
from raytrl.records import Attempt
from raytrl.roles.weight_group import Announcement, WeightGroup
from raytrl.roles.weights import Weights

CPU = torch.device("cpu")


class ThreadCalls:
    """`pool.Calls` on objects in this process, with one thread an actor."""

    def __init__(self, size: int) -> None:
        self.actors: list[Any] = [None] * size
        self.threads: list[Any] = [None] * size
        self.ran: list[tuple[int, str]] = []
        self._arrivals = Arrivals()
        for actor in range(size):
            self.kill(actor)

    def __len__(self) -> int:
        return len(self.actors)

    def kill(self, actor: int) -> None:
        """A new one takes its place, which answers what the old one was asked."""
        self.actors[actor] = RolloutActor(lambda: make_engine(gpt2(width=16), chunk=4))
        self.threads[actor] = ThreadPoolExecutor(1)

    def call(self, actor: int, method: str, *arguments: Any) -> "Future[Any]":
        self.ran.append((actor, method))
        ticket = self.threads[actor].submit(getattr(self.actors[actor], method), *arguments)
        ticket.add_done_callback(self._arrivals.add)
        return ticket

    def tell(self, actor: int, method: str, *arguments: Any) -> None:
        self.call(actor, method, *arguments)

    def wait(self, tickets: Collection[Any], timeout_s: float) -> list[Any]:
        return self._arrivals.wait(tickets, timeout_s)

    def result(self, ticket: Any) -> Any:
        return ticket.result()


class Sharing:
    """As `launch.sharing.Sharing` has it, of one learner worker and without Ray."""

    def __init__(self, limit_s: float) -> None:
        self.group: WeightGroup | None = None
        self.group_version: int | None = None
        self.limit_s = limit_s
        self.ways: list[str] = []

    def __call__(self, sent: Weights, receivers: Receivers) -> SentWeights:
        if receivers.complete:
            try:
                if not receivers.agree("can_receive", sent.version, self.group_version):
                    raise WeightGroupError("not all can")
                if self.group is None:
                    self.group_version = sent.version

                    def invite(invitation: Any) -> None:
                        receivers.tell("join_group", sent.version, invitation)

                    self.group = WeightGroup.lead("127.0.0.1", receivers.count + 1, CPU, self.limit_s, invite)
                found = broadcast(sent, receivers, self.group)
                self.ways.append("broadcast")
                return found
            except WeightGroupError as error:
                self.ways.append(str(error))
        self.close()
        return send(sent, receivers)

    def close(self) -> None:
        if self.group is not None:
            self.group.close()
            self.group = self.group_version = None


def alone(test: Callable[[Sharing], None]) -> Callable[[], None]:
    """Runs a test in a process of its own: other tests fork, and gloo's threads do not outlive a fork."""

    def run() -> None:
        mp.start_processes(_with_sharing, (test,), nprocs=1, start_method="fork")

    run.__doc__ = test.__doc__
    return run


def _with_sharing(rank: int, test: Callable[[Sharing], None]) -> None:
    sharing = Sharing(10.0)
    test(sharing)
    sharing.close()


def pool_on(calls: ThreadCalls, sharing: Sharing) -> RolloutPool:
    pool = Pool(calls, "rollout actors", "worker 0", 20.0)
    return RolloutPool(pool, ROLLOUT, samples=2, attempt=Attempt("run", 1), share=sharing)


@alone
def test_broadcast_weights_make_the_same_responses(sharing: Sharing) -> None:
    calls = ThreadCalls(3)
    pool = pool_on(calls, sharing)
    for version in range(4):
        pool.load_weights(weights(version, seed=version))
        assert responses(pool, version) == expected(version, seed=version)
    assert sharing.ways == ["broadcast"] * 3  # the first ones go where an actor that still starts finds them
    assert sum(method == "take_bucket" for _, method in calls.ran) == 3 * len(list(weights(0).buckets))


@alone
def test_an_actor_that_was_lost_waits_for_the_next_weights(sharing: Sharing) -> None:
    """Nobody has the weights for it; the others do its work. The next ones go through the object store, to all."""
    calls = ThreadCalls(2)
    pool = pool_on(calls, sharing)
    for version in range(2):
        pool.load_weights(weights(version, seed=version))
    calls.kill(1)
    assert responses(pool, 1) == expected(1, seed=1)
    assert pool.num_up == 1
    for version in (2, 3):
        pool.load_weights(weights(version, seed=version))
        assert pool.num_up == 2
        assert responses(pool, version) == expected(version, seed=version)
    assert sharing.ways == ["broadcast"] * 2


@alone
def test_none_that_has_the_weights(sharing: Sharing) -> None:
    calls = ThreadCalls(2)
    pool = pool_on(calls, sharing)
    for version in range(2):
        pool.load_weights(weights(version))
    calls.kill(0)
    calls.kill(1)
    with pytest.raises(RunError, match=r"no rollout actors are up to date.*version 1 were sent by broadcast"):
        responses(pool, 1)


@alone
def test_a_member_that_was_reborn_unnoticed(sharing: Sharing) -> None:
    """It is in no group: the weights go through the object store to all."""
    calls = ThreadCalls(2)
    pool = pool_on(calls, sharing)
    for version in range(2):
        pool.load_weights(weights(version))
    calls.kill(0)
    pool.load_weights(weights(2, seed=2))
    assert pool.num_up == 2
    assert responses(pool, 2) == expected(2, seed=2)
    assert sharing.ways == ["broadcast", "not all can"]


@alone
def test_a_member_that_is_lost_on_the_way(sharing: Sharing) -> None:
    """And does not even close its end, as when its node is lost. (A process that dies: tests/chaos.)"""
    sharing.limit_s = 3.0
    calls = ThreadCalls(2)
    pool = pool_on(calls, sharing)
    for version in range(2):
        pool.load_weights(weights(version))
    receive, received = calls.actors[1].receive_bucket, []

    def dies(attempt: Attempt, version: int, number: int, announced: Announcement) -> None:
        received.append(number)
        if number == 2:
            calls.kill(1)
        else:
            receive(attempt, version, number, announced)

    calls.actors[1].receive_bucket = dies
    pool.load_weights(weights(2, seed=2))
    assert received[:3] == [0, 1, 2]
    assert responses(pool, 2) == expected(2, seed=2)
    assert len(sharing.ways) == 2
    assert "no end within 3 s" in sharing.ways[1]


@alone
def test_a_bucket_that_does_not_fit_is_an_error(sharing: Sharing) -> None:
    """And the other member is not left waiting."""
    calls = ThreadCalls(2)
    pool = pool_on(calls, sharing)
    pool.load_weights(weights(0))
    receive = calls.actors[1].receive_bucket

    def wrong(attempt: Attempt, version: int, number: int, announced: Announcement) -> None:
        receive(attempt, version, number, replace(announced, checksum="0" * 32) if number == 1 else announced)

    calls.actors[1].receive_bucket = wrong
    with pytest.raises(WeightsVersionError, match="are not what the learner sent"):
        pool.load_weights(weights(1))
