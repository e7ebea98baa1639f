"""Weights by broadcast, over real gloo: actors in threads of this process, deaths, rebirths, limits."""

import threading
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from test_pools import ROLLOUT, expected, responses, weights
from toy import gpt2, make_engine

from raytrl.errors import WeightsVersionError
from raytrl.launch.actors.generator import PoolGenerator
from raytrl.launch.actors.pool import Pool
from raytrl.launch.actors.rollout import RolloutActor
from raytrl.launch.actors.send_weights import WeightSender
from raytrl.launch.actors.transport import Receivers, SentWeights
from raytrl.records.progress import Progress
from raytrl.records.samples import Attempt
from raytrl.roles.weights.buckets import Weights
from raytrl.roles.weights.group import Announcement
from tests.thread_calls import ThreadCalls

CPU = torch.device("cpu")
LIMIT_S = 3.0  # a busy machine gets its group together in it; one test waits for its end


class Actors(ThreadCalls):
    """Rollout actors in threads."""

    def __init__(self, size: int) -> None:
        super().__init__([None] * size)
        self.ran: list[tuple[int, str]] = []
        for actor in range(size):
            self.kill(actor)

    def kill(self, actor: int) -> None:
        """A new one takes its place, which answers what the old one was asked."""
        self.actors[actor] = RolloutActor(lambda: make_engine(gpt2(width=16), chunk=4))
        self.threads[actor] = ThreadPoolExecutor(1)

    def call(self, actor: int, method: str, *arguments: Any) -> "Future[Any]":
        self.ran.append((actor, method))
        return super().call(actor, method, *arguments)


class OnlyWorker:
    """What `WeightSender` asks of a learner worker's context."""

    rank, world_size = 0, 1

    def __init__(self) -> None:
        self.notices: list[str] = []

    def progress(self, event: Progress) -> None:
        self.notices.append(event.text)


class NotedSharing(WeightSender):
    """Without Ray, and notes how each version went: "broadcast", or why not."""

    def __init__(self, limit_s: float) -> None:
        worker = OnlyWorker()
        super().__init__(worker, CPU, broadcasts=True, shelf=None, put=lambda packed: packed, limit_s=limit_s)  # type: ignore[arg-type]
        self.ways = worker.notices

    def __call__(self, sent: Weights, receivers: Receivers) -> SentWeights:
        found = super().__call__(sent, receivers)
        if not found.buckets:
            self.ways.append("broadcast")
        return found


def alone(test: Callable[[NotedSharing], None]) -> Callable[[], None]:
    """Runs a test in a process of its own: other tests fork, and gloo's threads do not outlive a fork."""

    def run() -> None:
        mp.start_processes(_with_sharing, (test,), nprocs=1, start_method="fork")

    run.__doc__ = test.__doc__
    return run


def _with_sharing(rank: int, test: Callable[[NotedSharing], None]) -> None:
    sharing = NotedSharing(LIMIT_S)
    test(sharing)
    sharing.close()


def pool_on(calls: Actors, sharing: NotedSharing) -> PoolGenerator:
    pool = Pool(calls, "rollout actors", "worker 0", 20.0)
    return PoolGenerator([pool], ROLLOUT, samples=2, attempt=Attempt("run", 1), send_weights=sharing)


def two_with_broadcast_weights(sharing: NotedSharing) -> tuple[Actors, PoolGenerator]:
    """Two actors that hold version 1, which came by broadcast."""
    calls = Actors(2)
    pool = pool_on(calls, sharing)
    for version in range(2):
        pool.load_weights(weights(version, seed=version))
    return calls, pool


@alone
def test_broadcast_weights_make_the_same_responses(sharing: NotedSharing) -> None:
    calls = Actors(3)
    pool = pool_on(calls, sharing)
    for version in range(4):
        pool.load_weights(weights(version, seed=version))
        assert responses(pool, version) == expected(version, seed=version)
    assert sharing.ways == ["broadcast"] * 3  # the first ones go where an actor that still starts finds them
    assert sum(method == "take_bucket" for _, method in calls.ran) == 3 * len(list(weights(0).buckets))


@alone
def test_an_actor_that_was_lost_waits_for_the_next_weights(sharing: NotedSharing) -> None:
    """Nobody has the weights for it; the others do its work. The next ones go through the object store, to all."""
    calls, pool = two_with_broadcast_weights(sharing)
    calls.kill(1)
    assert responses(pool, 1) == expected(1, seed=1)
    assert pool.num_up == 1
    for version in (2, 3):
        pool.load_weights(weights(version, seed=version))
        assert pool.num_up == 2
        assert responses(pool, version) == expected(version, seed=version)
    assert sharing.ways == ["broadcast"] * 2


@alone
def test_none_that_has_the_weights(sharing: NotedSharing) -> None:
    calls, pool = two_with_broadcast_weights(sharing)
    calls.kill(0)
    calls.kill(1)
    assert responses(pool, 1) == {}
    pool.load_weights(weights(1, seed=1), anew=True)  # what the loop does then
    assert responses(pool, 1) == expected(1, seed=1)


@alone
def test_a_member_that_was_reborn_unnoticed(sharing: NotedSharing) -> None:
    """It is in no group: the weights go through the object store to all."""
    calls, pool = two_with_broadcast_weights(sharing)
    calls.kill(0)
    pool.load_weights(weights(2, seed=2))
    assert pool.num_up == 2
    assert responses(pool, 2) == expected(2, seed=2)
    assert len(sharing.ways) == 2
    assert sharing.ways[1].startswith("weights of version 2 go through the object store: ")
    assert "a rollout actor was lost" in sharing.ways[1]


@alone
def test_a_member_that_is_lost_on_the_way(sharing: NotedSharing) -> None:
    """And does not even close its end, as when its node is lost. (A process that dies: tests/chaos.)"""
    calls, pool = two_with_broadcast_weights(sharing)
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
def test_a_bucket_that_does_not_fit_is_an_error(sharing: NotedSharing) -> None:
    """And the other member is not left waiting."""
    calls = Actors(2)
    pool = pool_on(calls, sharing)
    pool.load_weights(weights(0))
    receive = calls.actors[1].receive_bucket

    def wrong(attempt: Attempt, version: int, number: int, announced: Announcement) -> None:
        receive(attempt, version, number, replace(announced, checksum="0" * 32) if number == 1 else announced)

    calls.actors[1].receive_bucket = wrong
    with pytest.raises(WeightsVersionError, match="are not what the learner sent"):
        pool.load_weights(weights(1))


class Lazy:
    """As NCCL's group: made without anybody else, and its first message waits for all members without limit."""

    def __init__(self, *made_of: Any) -> None:
        self.aborted = False

    def broadcast(self, message: list[torch.Tensor], options: Any) -> Any:
        threading.Event().wait()

    def abort(self) -> None:
        self.aborted = True


@alone
def test_who_could_not_join_is_not_waited_for_in_the_first_message(sharing: NotedSharing) -> None:
    dist.ProcessGroupGloo = Lazy
    calls = Actors(2)
    pool = pool_on(calls, sharing)
    pool.load_weights(weights(0))
    calls.actors[1].join_group = lambda *invited: None  # the port is behind a firewall
    pool.load_weights(weights(1, seed=1))
    assert responses(pool, 1) == expected(1, seed=1)
    (way,) = sharing.ways
    assert "a rollout actor could not join" in way


@alone
def test_members_that_do_not_meet_are_given_up(sharing: NotedSharing) -> None:
    dist.ProcessGroupGloo = Lazy
    calls = Actors(2)
    pool = pool_on(calls, sharing)
    for version in range(2):
        pool.load_weights(weights(version, seed=version))
    assert responses(pool, 1) == expected(1, seed=1)
    (way,) = sharing.ways
    assert "the members did not meet within 3 s" in way
