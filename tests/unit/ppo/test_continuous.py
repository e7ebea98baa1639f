"""Continuous work: no actor idles while requests wait, and calls to an engine that can share its batch overlap."""

import threading
from collections.abc import Sequence
from concurrent.futures import Future
from itertools import islice
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from test_pools import all_of, engines
from toy import gpt2, prompt_batch

from raytrl.config.sections.rollout import RolloutSection
from raytrl.launch.actors.generator import PoolGenerator, requests_in_flight
from raytrl.launch.actors.pool import Pool, Request
from raytrl.launch.actors.rollout import RolloutActor
from raytrl.launch.actors.transport import send
from raytrl.records.samples import Attempt, Prompt, Response
from raytrl.roles.models.adapters import policy_parameters
from raytrl.roles.rollout.engine import RolloutEngine, Sampled, Turn, Wanted
from raytrl.roles.rollout.vllm.batch import ContinuousBatch
from raytrl.roles.weights.buckets import Bucket, Weights

ATTEMPT = Attempt("run", 1)


def weights(version: int) -> Weights:
    return Weights.of(version, policy_parameters(gpt2(width=16)).items(), torch.float32)


def test_what_waits_goes_to_whoever_is_done() -> None:
    calls = engines(2)
    pool = Pool(calls, "rollout actors", "worker 0", 5.0, window=1)
    pool.prepare_all("begin", ATTEMPT)
    calls.silent = {1}  # a slow one
    for place in range(6):
        pool.send(Request(f"call {place}", place, "begin", (ATTEMPT,)))
    answers = pool.answers()
    first = [request.name for request, _ in islice(answers, 5)]
    assert first == ["call 0", "call 2", "call 3", "call 4", "call 5"]
    calls.silent = set()
    assert [request.name for request, _ in answers] == ["call 1"]


def test_chunks_come_whole_in_any_order() -> None:
    calls = engines(3)
    rollout = RolloutSection(engine="vllm", chunk_prompts=4)
    pool = PoolGenerator(
        [Pool(calls, "rollout actors", "w", 5.0, window=2)], rollout, samples=2, attempt=ATTEMPT, send_weights=send
    )
    pool.load_weights(weights(0))
    made = list(pool.generate(prompt_batch(0, range(14)), 0, greedy=False))
    assert sum(method == "generate" for _, method in calls.ran) == 4
    rows = sorted([(r.row, r.sample) for r in chunk] for chunk in made)
    assert rows == [[(row, s) for row in range(k, min(k + 4, 14)) for s in range(2)] for k in (0, 4, 8, 12)]


class Fickle:
    """An engine that answers something unknown, as after an error inside of it."""

    def add_request(self, name: str, prompt: Any, params: Any, lora_request: Any) -> None: ...

    def step(self) -> list[Any]:
        return [SimpleNamespace(request_id="nobody's", finished=True)]


def test_no_future_stays_open_when_the_engines_thread_ends() -> None:
    batch = ContinuousBatch(Fickle)
    first = batch.submit([1], None)
    with pytest.raises(KeyError, match="nobody's"):
        first.result(timeout=10)
    with pytest.raises(KeyError, match="nobody's"):
        batch.submit([1], None).result(timeout=10)
    with pytest.raises(KeyError, match="nobody's"):
        batch.call(lambda engine: engine)
    batch.close()


class Failing(Fickle):
    """An engine whose step fails, and which then cannot let go of its requests either."""

    def step(self) -> list[Any]:
        raise RuntimeError("CUDA error")

    def abort_request(self, names: list[str]) -> None:
        raise RuntimeError("CUDA error again")


def test_a_failed_step_is_told_though_the_engine_cannot_clean_up() -> None:
    batch = ContinuousBatch(Failing)
    with pytest.raises(RuntimeError, match=r"^CUDA error$"):
        batch.submit([1], None).result(timeout=10)
    with pytest.raises(RuntimeError, match="CUDA error"):
        batch.submit([1], None).result(timeout=10)


def test_how_much_an_actor_has_at_a_time() -> None:
    assert requests_in_flight(RolloutSection(engine="transformers"), 4) == 2
    # 128 responses at a time are 4 chunks of 8 prompts with 4 responses each; half as many again, and one.
    assert requests_in_flight(RolloutSection(engine="vllm"), 4) == 7
    assert requests_in_flight(RolloutSection(engine="vllm", engine_args={"max_num_seqs": 16}), 4) == 2
    assert requests_in_flight(RolloutSection(engine="vllm", chunk_prompts=2), 1) == 97


class Meeting(RolloutEngine):
    """Answers once three calls are in it at the same time."""

    concurrent = True

    def __init__(self) -> None:
        super().__init__()
        self.barrier, self.inside = threading.Barrier(3), 0

    def _begin(self) -> None:
        assert self.inside == 0

    def _take(self, bucket: Bucket) -> str:
        return bucket.checksum

    def _finish(self, version: int) -> None:
        assert self.inside == 0

    def _generate(
        self, prompts: Sequence[Prompt], version: int, samples: int, greedy: bool, wanted: Wanted
    ) -> list[Response]:
        self.inside += 1
        self.barrier.wait(timeout=10)
        self.inside -= 1
        return []

    def submit(self, turns: Sequence[Turn], version: int, greedy: bool, wanted: Wanted) -> "list[Future[Sampled]]":
        return []

    def _logprobs(self, prompts: Sequence[Prompt], responses: Sequence[Response], version: int) -> list[float]:
        return []


def test_calls_share_a_batch_and_weights_wait_for_them() -> None:
    actor = RolloutActor(Meeting)
    actor.load_weights(ATTEMPT, *all_of(weights(0)))

    def generate(version: int) -> None:
        actor.generate(ATTEMPT, prompt_batch(0, [0]), version, 1, False)

    threads = [threading.Thread(target=generate, args=(0,)) for _ in range(2)]
    for thread in threads:
        thread.start()
    while actor.doing() == "nothing":
        pass
    update: Any = threading.Thread(target=actor.load_weights, args=(ATTEMPT, *all_of(weights(1))))
    assert "generating for rows 0 to 0 of step 0" in actor.doing()
    generate(0)  # the third: now all three end
    update.start()
    for thread in [*threads, update]:
        thread.join(timeout=10)
        assert not thread.is_alive()
    assert actor.doing() == "nothing"
