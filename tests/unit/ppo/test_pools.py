"""The pools of actors, on real actor objects in this process: deaths, rebirths, stale weights, limits."""

import threading
import time
import weakref
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from toy import gpt2, make_engine, prompt_batch

from raytrl.config.load import load_run
from raytrl.config.runs.ppo import PpoRun
from raytrl.config.sections.reward import RewardSection
from raytrl.config.sections.rollout import RolloutSection
from raytrl.errors import ActorBrokenError, RewardError, RunError, StaleAttemptError, StalledError, WeightsVersionError
from raytrl.launch.actors.generator import PoolGenerator
from raytrl.launch.actors.pool import ActorLostError, Arrivals, Pool, Request
from raytrl.launch.actors.reward import RewardActor
from raytrl.launch.actors.rollout import RolloutActor
from raytrl.launch.actors.scorer import PoolScorer, scoring_limit_s
from raytrl.launch.actors.start import started_actors
from raytrl.launch.actors.transport import Receivers, SentWeights, send
from raytrl.records.samples import Attempt, Prompt, Response, Score
from raytrl.roles.models.adapters import policy_parameters
from raytrl.roles.weights.buckets import Bucket, Weights
from raytrl.roles.weights.packed import PackedBucket, pack, unpack
from tests.ppo_files import ppo_file

ROLLOUT = RolloutSection(chunk_prompts=4)


class LocalCalls:
    """`pool.Calls` on objects; a call runs when it is waited for. `deaths` may kill an actor before a call runs."""

    def __init__(self, make: Callable[[], Any], size: int) -> None:
        self._make = make
        self.actors = [make() for _ in range(size)]
        self.deaths: Callable[[int, str], bool] = lambda actor, method: False
        self.silent: set[int] = set()
        self.ran: list[tuple[int, str]] = []
        self._calls: dict[int, tuple[int, str, tuple[Any, ...]]] = {}
        self._results: dict[int, Any] = {}
        self._lives = [0] * size
        self._number = 0

    def __len__(self) -> int:
        return len(self.actors)

    def kill(self, actor: int) -> None:
        self.actors[actor] = self._make()
        for ticket, (called, _, _) in self._calls.items():
            if called == actor:
                self._results[ticket] = ActorLostError("killed")

    def call(self, actor: int, method: str, *arguments: Any) -> int:
        self._number += 1
        self._calls[self._number] = (actor, method, arguments)
        return self._number

    def tell(self, actor: int, method: str, *arguments: Any) -> None:
        if actor not in self.silent:
            self._run(actor, method, arguments)

    def _run(self, actor: int, method: str, arguments: tuple[Any, ...]) -> Any:
        if self.deaths(actor, method):
            self.kill(actor)
            return ActorLostError("killed")
        self.ran.append((actor, method))
        try:
            return getattr(self.actors[actor], method)(*arguments)
        except Exception as error:
            return error

    def wait(self, tickets: Sequence[int], timeout_s: float) -> list[int]:
        for ticket in tickets:
            actor, method, arguments = self._calls[ticket]
            if ticket in self._results or (actor in self.silent and method != "doing"):
                continue
            self._results[ticket] = self._run(actor, method, arguments)
        ready = [ticket for ticket in tickets if ticket in self._results]
        if not ready:
            time.sleep(min(timeout_s, 0.02))
        return ready

    def drop(self, ticket: int) -> None:
        self._calls.pop(ticket, None)
        self._results.pop(ticket, None)

    def result(self, ticket: int) -> Any:
        actor, _, _ = self._calls.pop(ticket)
        found = self._results.pop(ticket)
        if isinstance(found, ActorBrokenError):  # as `RayCalls`, which has it started anew
            self.kill(actor)
            raise ActorLostError(str(found), broke=True)
        if isinstance(found, Exception):
            raise found
        return found


def weights(version: int, seed: int = 0) -> Weights:
    """In several buckets."""
    return Weights.of(version, policy_parameters(gpt2(seed, width=16)).items(), torch.float32, bucket_bytes=4096)


def all_of(sent: Weights) -> tuple[int, str, int, tuple[PackedBucket, ...]]:
    """The arguments of `RolloutActor.load_weights` after the attempt."""
    packed = send(sent, Receivers(lambda *told: None, lambda *told: True, 1, False))
    return packed.version, packed.checksum, packed.num_buckets, packed.buckets


def engines(size: int) -> LocalCalls:
    return LocalCalls(lambda: RolloutActor(lambda: make_engine(gpt2(width=16), chunk=4)), size)


def pool_on(
    calls: LocalCalls,
    timeout_s: float = 5.0,
    attempt: int = 1,
    put: Callable[[PackedBucket], Any] = lambda packed: packed,
) -> PoolGenerator:
    pool = Pool(calls, "rollout actors", "worker 0", timeout_s)
    share = partial(send, put=put)
    return PoolGenerator([pool], ROLLOUT, samples=2, attempt=Attempt("run", attempt), send_weights=share)


def responses(pool: PoolGenerator, version: int, step: int = 0) -> dict[tuple[int, int], Response]:
    made = pool.generate(prompt_batch(step, range(16)), version, greedy=False)
    return {(r.row, r.sample): r for chunk in made for r in chunk}


def expected(version: int, seed: int = 0, step: int = 0) -> dict[tuple[int, int], Response]:
    pool = pool_on(engines(1))
    pool.load_weights(weights(version, seed))
    return responses(pool, version, step)


def once(*which: tuple[int, str]) -> Callable[[int, str], bool]:
    left = list(which)

    def dies(actor: int, method: str) -> bool:
        if (actor, method) in left:
            left.remove((actor, method))
            return True
        return False

    return dies


def test_a_death_in_the_middle_changes_no_response() -> None:
    calls = engines(3)
    pool = pool_on(calls)
    pool.load_weights(weights(0))
    calls.deaths = once((1, "generate"))
    assert responses(pool, 0) == expected(0)
    assert pool.num_up == 2


@pytest.fixture
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nobody is waited for once the first actor is up to date."""
    monkeypatch.setattr("raytrl.launch.actors.pool._PATIENCE_S", 0.05)
    monkeypatch.setattr("raytrl.launch.actors.pool._PATIENCE", 0.0)


class Breaks:
    """An engine whose `generate` raises, as of a CUDA error, in its lives up to `lives`."""

    def __init__(self, lives: int) -> None:
        self.lives, self.born = lives, 0

    def engine(self) -> Any:
        engine = make_engine(gpt2(width=16), chunk=4)
        self.born += 1
        if self.born <= self.lives:
            engine.generate = self._raise  # type: ignore[method-assign]
        return engine

    @staticmethod
    def _raise(*_: Any, **__: Any) -> Any:
        raise RuntimeError("CUDA error: an illegal memory access was encountered")


@pytest.mark.parametrize("lives", [1, 2, 100], ids=["once", "twice", "for good"])
def test_an_engine_that_raises_is_started_anew_and_its_requests_go_to_others(lives: int) -> None:
    breaks, sound = Breaks(lives), engines(1).actors[0]
    calls = LocalCalls(lambda: RolloutActor(breaks.engine), 2)
    calls.actors[1] = sound
    pool = pool_on(calls)
    pool.load_weights(weights(0))
    for step in range(6):
        assert responses(pool, 0, step) == expected(0, step=step)
        pool.load_weights(weights(0), anew=True)
    assert pool.num_up == (1 if lives == 100 else 2)
    assert breaks.born == min(lives + 1, 3)  # three times in a row, and it is left out


def test_engines_that_all_raise_end_the_run_with_what_they_raised() -> None:
    breaks = Breaks(100)
    pool = pool_on(LocalCalls(lambda: RolloutActor(breaks.engine), 2))
    pool.load_weights(weights(0))
    gone = r"all rollout actors are gone for good; last: actor \d: generating for rows .* RuntimeError: CUDA error"
    with pytest.raises(RunError, match=gone):
        responses(pool, 0)
    assert breaks.born <= 6


def test_engines_that_cannot_be_made_are_not_tried_for_long() -> None:
    made: list[int] = []

    def engine() -> Any:
        made.append(1)
        raise ValueError("no kernel for this head size")

    pool = pool_on(LocalCalls(lambda: RolloutActor(engine), 2))
    with pytest.raises(
        RunError, match=r"no rollout actors can serve; last: actor \d: .*ValueError: no kernel for this head"
    ):
        pool.load_weights(weights(0))
    assert len(made) <= 3


@pytest.mark.usefixtures("impatient")
def test_nothing_is_kept_of_calls_that_nobody_waits_for() -> None:
    calls = engines(2)
    pool = pool_on(calls)
    pool.load_weights(weights(0))
    calls.silent = {1}
    for version in range(1, 5):  # each leaves a call that the silent actor has not answered
        pool.load_weights(weights(version))
    assert len(calls._calls) <= 1


def test_a_reborn_actor_serves_only_after_it_took_the_current_weights() -> None:
    calls = engines(2)
    pool = pool_on(calls)
    pool.load_weights(weights(0))
    pool.load_weights(weights(1, seed=1))
    calls.kill(0)
    calls.kill(1)  # both: nobody is left who could serve at once
    assert responses(pool, 1) == expected(1, seed=1)
    assert pool.num_up >= 1


@pytest.mark.usefixtures("impatient")
def test_an_actor_that_is_far_behind_is_not_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    calls = engines(2)
    pool = pool_on(calls)
    pool.load_weights(weights(0))
    calls.silent = {1}
    pool.load_weights(weights(1, seed=1))
    assert pool.num_up == 1
    assert responses(pool, 1) == expected(1, seed=1)
    monkeypatch.setattr(
        "raytrl.launch.actors.pool._PATIENCE_S", 1e6
    )  # whoever waits for it now waits until the limit passes
    pool.load_weights(weights(2))
    assert pool.num_up == 1
    calls.silent = set()
    pool.load_weights(weights(3))
    responses(pool, 3)
    pool.load_weights(weights(4))
    assert pool.num_up == 2


def test_death_while_weights_are_loaded() -> None:
    calls = engines(2)
    pool = pool_on(calls)
    calls.deaths = once((0, "load_weights"))
    pool.load_weights(weights(0))
    assert pool.num_up == 1
    assert responses(pool, 0) == expected(0)
    pool.load_weights(weights(1))
    assert pool.num_up == 2


def parts(version: int, seed: int = 0) -> list[PackedBucket]:
    *_, buckets = all_of(weights(version, seed))
    assert len(buckets) > 3
    return buckets


def test_buckets_are_loaded_as_they_come_and_never_served_half() -> None:
    """Whatever part of them arrives ahead, `load_weights` completes it; until then the actor refuses to answer."""
    attempt, prompts = Attempt("run", 1), prompt_batch(1, range(4))
    buckets = parts(1, seed=1)
    for ahead in ([0], [0, 1, 2], list(range(len(buckets))), [1, 2], [0, 2], [0, 1, 0, 1]):
        actor = RolloutActor(lambda: make_engine(gpt2(width=16), chunk=4))
        actor.load_weights(attempt, *all_of(weights(0)))
        for number in ahead:
            actor.take_bucket(attempt, 1, number, buckets[number])
        if 0 in ahead:
            for version in (0, 1):
                with pytest.raises(WeightsVersionError, match="found: None"):
                    actor.generate(attempt, prompts, version, 2, False)
        taken: list[Any] = []
        take = actor._engine.take_bucket
        actor._engine.take_bucket = lambda bucket: taken.append(bucket) or take(bucket)  # noqa: B023 (used at once)
        assert actor.load_weights(attempt, *all_of(weights(1, seed=1))) == (1, weights(1, seed=1).checksum)
        assert len(taken) == len(buckets) - {"0,2": 1, "1,2": 0, "0,1,0,1": 2}.get(
            ",".join(map(str, ahead)), len(ahead)
        )
        made = {(r.row, r.sample): r for r in actor.generate(attempt, prompts, 1, 2, False)}
        assert made == {key: r for key, r in expected(1, seed=1, step=1).items() if key[0] < 4}


def test_a_bucket_that_comes_late_changes_nothing() -> None:
    """Another learner worker's `load_weights` may overtake the one that tells of the buckets."""
    attempt, actor = Attempt("run", 1), RolloutActor(lambda: make_engine(gpt2(width=16)))
    actor.load_weights(attempt, *all_of(weights(1)))
    for number, bucket in enumerate(parts(1)):
        actor.take_bucket(attempt, 1, number, bucket)
    assert actor.generate(attempt, prompt_batch(1, [0]), 1, 1, True)


def test_a_failed_bucket_is_made_up_for() -> None:
    attempt, actor = Attempt("run", 1), RolloutActor(lambda: make_engine(gpt2(width=16)))
    buckets = parts(1)
    actor.take_bucket(attempt, 1, 0, buckets[0])
    with pytest.raises(WeightsVersionError, match="checksum"):
        actor.take_bucket(attempt, 1, 1, replace(buckets[1], checksum="0" * 32))
    with pytest.raises(WeightsVersionError, match="a bucket of them failed"):
        actor._engine.finish_weights()
    actor.take_bucket(attempt, 1, 2, buckets[2])
    assert actor.load_weights(attempt, *all_of(weights(1))) == (1, weights(1).checksum)


@pytest.mark.parametrize("number", [0, 2])
def test_death_while_a_bucket_is_loaded(number: int) -> None:
    calls = engines(2)
    pool = pool_on(calls)
    pool.load_weights(weights(0))
    taken = 0

    def dies(actor: int, method: str) -> bool:
        nonlocal taken
        taken += actor == 1 and method == "take_bucket"
        return actor == 1 and method == "take_bucket" and taken == number + 1

    calls.deaths = dies
    pool.load_weights(weights(1, seed=1))
    assert pool.num_up == 2  # the reborn one took all of them
    assert responses(pool, 1, step=1) == expected(1, seed=1, step=1)


def test_the_last_versions_buckets_are_let_go_before_new_ones_are_made() -> None:
    alive: list[weakref.ref[PackedBucket]] = []

    def put(packed: PackedBucket) -> PackedBucket:
        assert sum(bucket() is not None for bucket in alive) < len(parts(0))
        alive.append(weakref.ref(packed))
        return packed

    pool = pool_on(engines(1), put=put)
    for version in range(4):
        pool.load_weights(weights(version))
    assert len(alive) == 4 * len(parts(0))


def test_two_workers_load_once() -> None:
    calls = engines(2)
    first, second = pool_on(calls), pool_on(calls)
    first.load_weights(weights(0))
    loaded = [actor._engine for actor in calls.actors]
    for engine in loaded:
        engine.begin_weights = None  # a second load would fail
    second.load_weights(weights(0))
    assert responses(second, 0) == expected(0)


def test_a_new_attempt_replaces_the_weights_of_the_old_one_and_refuses_its_requests() -> None:
    """After a resume the same version may stand for other weights, and the dead worker's calls still wait."""
    calls = engines(1)
    old, new = pool_on(calls, attempt=1), pool_on(calls, attempt=2)
    old.load_weights(weights(3, seed=1))
    waiting = old.generate(prompt_batch(3, range(4)), 3, greedy=False)
    new.load_weights(weights(3))
    with pytest.raises(StaleAttemptError):
        list(waiting)
    with pytest.raises(StaleAttemptError):
        old.load_weights(weights(4))
    assert responses(new, 3, step=3) == expected(3, step=3)


def test_what_a_dead_learner_asked_for_is_not_sampled_on(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its successor's weights would wait for the whole of it."""
    model = gpt2(width=16)
    actor = RolloutActor(lambda: make_engine(model, chunk=4))
    actor.load_weights(Attempt("run", 1), *all_of(weights(0)))
    passes, forward = [], model.forward

    def counted(*given: Any, **named: Any) -> Any:
        passes.append(1)
        if len(passes) == 2:
            actor.begin(Attempt("run", 2))  # in a thread of its own, in a run
        return forward(*given, **named)

    monkeypatch.setattr(model, "forward", counted)
    with pytest.raises(StaleAttemptError):
        actor.generate(Attempt("run", 1), prompt_batch(0, range(8)), 0, 1, False)
    assert len(passes) == 2


class Workers:
    """Two workers of a learner, one after the other: what the first has found, the second is told."""

    def __init__(self) -> None:
        self.rank = 0
        self.sent: list[SentWeights] = []
        self.up: list[frozenset[int]] = []

    def send(self, sent: Weights, receivers: Receivers) -> SentWeights:
        if self.rank == 0:
            self.sent.append(send(sent, receivers))
        return self.sent[-1]

    def from_rank_zero(self, value: frozenset[int]) -> frozenset[int]:
        if self.rank == 0:
            self.up.append(value)
        return self.up[-1]


def test_one_worker_asks_for_all() -> None:
    calls = engines(3)
    team: Any = Workers()
    pools = []
    for _ in range(2):
        pool = Pool(calls, "rollout actors", "a worker", 5.0)
        attempt = Attempt("run", 1)
        pools.append(PoolGenerator([pool], ROLLOUT, samples=2, attempt=attempt, send_weights=team.send, team=team))
    for version in range(3):
        calls.deaths = once((1, "load_weights")) if version == 2 else lambda actor, method: False
        for team.rank, generator in enumerate(pools):
            calls.ran.clear()
            generator.load_weights(weights(version, seed=version))
            asked = [actor for actor, method in calls.ran if method == "load_weights"]
            assert asked == ([] if team.rank else [0, 2] if version == 2 else [0, 1, 2])
        calls.ran.clear()
        assert responses(pools[1], version) == expected(version, seed=version)
        assert pools[1].num_up >= 2
    # The one that was down is brought up to date by whoever needs it.
    pools[1]._lanes[0]._next_try = {1: 0.0}
    responses(pools[1], 2)
    assert pools[1].num_up == 3
    assert [actor for actor, method in calls.ran if method == "load_weights"] == [1]


def test_corrupt_weights_are_refused() -> None:
    def flipped(bucket: PackedBucket) -> PackedBucket:
        changed = {name: replace(tensor, data=tensor.data ^ 1) for name, tensor in bucket.tensors.items()}
        return replace(bucket, tensors=changed)

    pool = pool_on(engines(1), put=flipped)
    with pytest.raises(WeightsVersionError, match="not what the learner sent; found checksum"):
        pool.load_weights(weights(0))
    with pytest.raises(WeightsVersionError, match="asked for responses of version 0"):
        pool.generate(prompt_batch(0, range(4)), 0, greedy=False)


def test_an_actor_must_prove_what_it_holds() -> None:
    calls = engines(2)
    calls.actors[1].load_weights = lambda attempt, version, checksum, *rest: (version - 1, checksum)
    with pytest.raises(WeightsVersionError, match=r"actor 1 .*is not up to date.*found: \(4, .*expected: \(5, "):
        pool_on(calls).load_weights(weights(5))


def test_weights_of_an_earlier_attempt_do_not_serve_a_new_one() -> None:
    actor = RolloutActor(lambda: make_engine(gpt2(width=16)))
    actor.load_weights(Attempt("run", 1), *all_of(weights(3)))
    assert len(actor.generate(Attempt("run", 1), prompt_batch(3, [0]), 3, 1, True)) == 1
    with pytest.raises(WeightsVersionError, match="asked for attempt 2, version 3"):
        actor.generate(Attempt("run", 2), prompt_batch(3, [0]), 3, 1, True)


@pytest.mark.parametrize(
    ("settings", "longest"),
    [
        ({}, 20.0),  # a call and no other: 8 responses are fewer than the 32 of a model's call
        ({"batch_size": 2}, 4 * 20.0),
        ({"retries": 2}, 3 * 20.0 + 0.25 + 0.5),
        ({"rows": 32}, 2 * 20.0),  # 64 responses: two calls of 32, whoever set no batch_size
        ({"actors": 2, "batch": 64}, 4 * 20.0),  # 32 prompts in 8 chunks of 4 over 2 actors: one may have 4
    ],
)
def test_the_limit_of_scores_is_beyond_all_that_its_actor_may_have_to_do(
    tmp_path: Path, settings: dict[str, Any], longest: float
) -> None:
    source = {"name": "judge", "model": "/a/judge", "timeout_s": 20, "retries": settings.get("retries", 0)}
    if "batch_size" in settings:
        source["batch_size"] = settings["batch_size"]
    rows = settings.get("rows", 4)
    file = ppo_file(
        tmp_path,
        "run",
        ppo={"batch_size": settings.get("batch", 2 * rows), "responses_per_prompt": 2, "minibatches": 1},
        learner={"workers": 1},
        rollout={"chunk_prompts": rows, "timeout_s": 600},
        reward={"actors": settings.get("actors", 1), "sources": [source]},
    )
    run = load_run(file, [], "ppo").run
    assert isinstance(run, PpoRun)
    assert scoring_limit_s(run) == 600 + longest


def test_a_silent_actor_is_named_with_what_it_does() -> None:
    calls = engines(2)
    pool = pool_on(calls, timeout_s=0.2)
    pool.load_weights(weights(0))
    calls.silent = {1}
    with pytest.raises(StalledError, match=r"worker 0 has waited 0\.2 s .*rows 4 to 7 of step 0.*actor 1: nothing"):
        responses(pool, 0)


def test_who_waits_within_the_limit_is_not_idle(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("raytrl.launch.actors.pool._BEAT_S", 0.05)
    calls, beats = engines(1), []
    pool = Pool(calls, "rollout actors", "worker 0", 0.5, beat=lambda: beats.append(1))
    pool.prepare_all("begin", Attempt("run", 1))
    monkeypatch.setattr(calls, "wait", Arrivals().wait)  # nothing arrives
    beats.clear()
    pool.send(Request("a request", 0, "generate", ()))
    with pytest.raises(StalledError, match=r"waited 0\.5 s"):
        list(pool.answers())
    assert 2 <= len(beats) <= 11
    beats.clear()
    assert not pool.all_answer(True, "has_received", timeout_s=0.3)
    assert 1 <= len(beats) <= 7


def test_a_request_that_kills_every_actor_ends_the_run() -> None:
    calls = engines(2)
    pool = pool_on(calls, timeout_s=30.0)
    pool.load_weights(weights(0))
    calls.deaths = lambda actor, method: method == "generate"
    with pytest.raises(RunError, match="may be what ends them"):
        responses(pool, 0)


def test_all_gone_for_good() -> None:
    class Gone(LocalCalls):
        def result(self, ticket: int) -> Any:
            raise ActorLostError("no such actor", final=True)

    pool = Pool(Gone(lambda: RolloutActor(lambda: make_engine(gpt2())), 2), "rollout actors", "worker 0", 5.0)
    with pytest.raises(RunError, match="all rollout actors are gone for good; last: actor 1: no such actor"):
        pool.prepare_all("load_weights", 1, None)


def test_greedy_asks_for_one_response_and_sends_no_columns() -> None:
    calls = engines(1)
    pool = pool_on(calls)
    pool.load_weights(weights(0))
    seen: list[Prompt] = []
    generate = calls.actors[0].generate
    calls.actors[0].generate = lambda attempt, prompts, *rest: seen.extend(prompts) or generate(attempt, prompts, *rest)
    prompts = [Prompt(0, 0, "1", (1,), {"answer": "secret"})]
    (chunk,) = pool.generate(prompts, 0, greedy=True)
    assert len(chunk) == 1
    assert [prompt.columns for prompt in seen] == [{}]


def test_weights_survive_the_journey_as_bytes() -> None:
    for dtype in (torch.float32, torch.bfloat16):
        tensors = {"a": torch.randn(3, 2).to(dtype), "empty": torch.empty(0, 4, dtype=dtype)}
        sent = Bucket.of(tensors)
        arrived = unpack(pack(sent))
        assert arrived.checksum == sent.checksum == Bucket.of(arrived.tensors).checksum
        assert all(torch.equal(arrived.tensors[name], tensors[name]) for name in tensors)


class FirstTokens:
    """Stands for `RewardSources`: the score is the first token; rows named are dropped, or raise."""

    def __init__(self, dropped: Sequence[int] = (), raises: bool = False) -> None:
        self.dropped, self.raises = dropped, raises

    def score(self, pairs: Sequence[tuple[Prompt, Response]]) -> list[Score]:
        if self.raises:
            raise RewardError("source 'a' raised ValueError")
        values = [None if r.row in self.dropped else float(r.token_ids[0]) for _, r in pairs]
        return [Score(r.step, r.row, r.sample, v, {"a": v}) for (_, r), v in zip(pairs, values, strict=True)]


def reward_pool(calls: LocalCalls, **section: Any) -> PoolScorer:
    sources = [{"name": "a", "function": "a.py:a"}]
    return PoolScorer(
        Pool(calls, "reward actors", "worker 0", 5.0),
        RewardSection(sources=sources, **section),
        attempt=Attempt("run", 1),
        rollout=RolloutSection(start_timeout_s=5.0),
        gather=list,
    )


def answered(rows: Sequence[int]) -> list[Response]:
    return [Response(0, row, 0, (row,), "", True, (0.0,), 0) for row in rows]


def test_scores_survive_a_reward_actor() -> None:
    calls = LocalCalls(lambda: RewardActor(lambda: FirstTokens()), 2)  # type: ignore[arg-type, return-value]
    scorer, prompts = reward_pool(calls), prompt_batch(0, range(8))
    calls.deaths = once((1, "score"))
    for start in (0, 4):
        scorer.submit(prompts, answered(range(start, start + 4)))
    assert sorted((score.row, score.value) for score in scorer.collect()) == [(row, float(row)) for row in range(8)]
    assert list(scorer.collect()) == []


def test_drops_are_judged_over_the_whole_batch() -> None:
    calls = LocalCalls(lambda: RewardActor(lambda: FirstTokens(dropped=[0, 1])), 1)  # type: ignore[arg-type, return-value]
    prompts = prompt_batch(0, range(8))
    for fraction, passes in ((0.25, True), (0.2, False)):
        scorer = reward_pool(calls, on_error="drop", max_dropped_fraction=fraction)
        for start in (0, 4):
            scorer.submit(prompts, answered(range(start, start + 4)))
        if passes:
            assert sum(score.value is None for score in scorer.collect()) == 2
        else:
            with pytest.raises(RewardError, match="found: 2 of 8"):
                scorer.collect()


def test_a_failing_source_fails_with_its_own_error() -> None:
    calls = LocalCalls(lambda: RewardActor(lambda: FirstTokens(raises=True)), 2)  # type: ignore[arg-type, return-value]
    scorer = reward_pool(calls)
    scorer.submit(prompt_batch(0, range(4)), answered(range(4)))
    with pytest.raises(RewardError, match="source 'a' raised ValueError"):
        scorer.collect()


def test_requests_are_not_lost_while_none_is_up() -> None:
    calls = engines(1)
    pool = Pool(calls, "rollout actors", "worker 0", 5.0)
    pool.prepare_all("begin", Attempt("run", 1))
    calls.kill(0)
    for place in range(3):
        pool.send(Request(f"call {place}", place, "doing", ()))
    assert sorted(request.name for request, _ in pool.answers()) == ["call 0", "call 1", "call 2"]


def test_runs_that_share_reward_actors_do_not_refuse_each_other() -> None:
    calls = LocalCalls(lambda: RewardActor(lambda: FirstTokens()), 1)  # type: ignore[arg-type, return-value]
    actor = calls.actors[0]
    prompt, response = prompt_batch(0, [0])[0], answered([0])[0]
    for run, number in (("one", 5), ("two", 3)):
        actor.prepare(Attempt(run, number))
    for run, number in (("one", 5), ("two", 3)):
        assert len(actor.score(Attempt(run, number), [(prompt, response)])) == 1
    actor.begin(Attempt("two", 4))
    with pytest.raises(StaleAttemptError, match="two: request of attempt 3; this actor serves 4"):
        actor.score(Attempt("two", 3), [(prompt, response)])
    assert len(actor.score(Attempt("one", 5), [(prompt, response)])) == 1


def test_arrivals_are_told_once_and_wake_who_waits() -> None:
    arrivals = Arrivals()
    arrivals.add("a")
    arrivals.add("nobody's")
    assert arrivals.wait({"a", "b"}, 5.0) == ["a"]
    assert arrivals.wait({"a", "nobody's"}, 0.01) == []  # told, or of no interest when it came
    threading.Timer(0.05, arrivals.add, ["b"]).start()
    assert arrivals.wait({"b"}, 30.0) == ["b"]


@pytest.mark.parametrize(
    ("gpu", "loading"), [(0, ["rollout", "reward"]), (1, ["rollout", "reward"]), (0.5, ["reward"])]
)
def test_on_a_shared_gpu_the_engine_loads_last(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, gpu: float, loading: list[str]
) -> None:
    """vLLM measures what is left, and what others take meanwhile it counts as its own."""
    roles, loaded = iter(["rollout", "reward"]), []

    def make(*_: Any) -> Any:
        role = next(roles)
        return SimpleNamespace(start=SimpleNamespace(remote=lambda: loaded.append(role)))

    monkeypatch.setattr("raytrl.launch.actors.start._make", make)
    resources: dict[str, Any] = {"CPU": 1} | ({"GPU": gpu} if gpu else {})
    run = load_run(ppo_file(tmp_path, "run", rollout={"actors": 1, "resources": resources}), [], "ppo").run
    assert isinstance(run, PpoRun)
    group: Any = SimpleNamespace(bundle_count=2)
    with started_actors(run, object, object, group):
        assert loaded == loading


def test_who_asks_for_the_reward_actors_waits_until_they_have_loaded() -> None:
    loaded = []
    calls = LocalCalls(lambda: RewardActor(lambda: loaded.append(1) or SimpleNamespace()), 2)  # type: ignore[func-returns-value]
    reward = RewardSection(sources=[{"name": "length", "function": "len.py:length"}])
    pool = Pool(calls, "reward actors", "worker 0", 5.0)
    scorer = PoolScorer(
        pool,
        reward,
        attempt=Attempt("run", 1),
        rollout=RolloutSection(start_timeout_s=5.0),
        gather=lambda scores: scores,
    )
    scorer.start()
    assert loaded == [1, 1]
    scorer.start()
    assert calls.ran == [(0, "prepare"), (1, "prepare")]
