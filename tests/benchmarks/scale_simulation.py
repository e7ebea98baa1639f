"""What the controller costs as rollout actors grow: the real loop, pools, records and Ray calls; only engines sleep.

    python -m tests.benchmarks.scale_simulation 4 16 64 [--lag 0 2]

Each rollout actor is a real Ray actor (RolloutActor) whose engine sleeps for a set time a chunk and then answers with
whole records; the learner does nothing. A step would ideally take `chunks an actor x latency`: what it takes beyond
that is overhead. `--local 256` runs the same on threads instead of Ray actors: the loop's and the pools' own share,
without Ray's. One JSON object a size.
"""

import argparse
import json
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ray

from raytrl.launch.actors.base import CONCURRENCY_GROUPS, WEIGHTS, WORK
from raytrl.launch.actors.reward import RewardActor
from raytrl.launch.actors.rollout import RolloutActor
from raytrl.records.samples import Attempt, Prompt, Response, Score
from tests.thread_calls import ThreadCalls

CHUNK, CHUNKS_AN_ACTOR, TOKENS, PROMPT_TOKENS = 8, 2, 48, 64
STEPS, WARM_UP = 6, 2  # the first ones start processes


@dataclass(frozen=True)
class NoWeights:
    """What travels to the actors: a version, and nothing to load."""

    version: int
    checksum: str = "none"
    num_buckets: int = 0
    buckets: tuple[Any, ...] = ()


class SleepingEngine:
    concurrent, num_versions = False, 1

    def __init__(self, latency_s: float) -> None:
        self._latency_s = latency_s

    def generate(self, prompts: Sequence[Prompt], version: int, *, samples: int, **_: Any) -> list[Response]:
        time.sleep(self._latency_s)
        tokens, logprobs = tuple(range(TOKENS)), (-1.25,) * TOKENS
        return [
            Response(p.step, p.row, sample, tokens, "a response of some words " * 8, True, logprobs, version)
            for p in prompts
            for sample in range(samples)
        ]


class StandInRollout(RolloutActor):
    """Takes weights at once and without importing torch, so that many fit on one machine."""

    @ray.method(concurrency_group=WEIGHTS)
    def load_weights(self, attempt: Attempt, version: int, checksum: str, *rest: Any) -> tuple[int, str]:
        self.begin(attempt)
        with self._busy("loading weights", beside=True):
            self._refuse_if_old(attempt)
            self._loaded()
            return version, checksum

    def _check(self, attempt: Attempt, version: int) -> None:
        self._refuse_if_old(attempt)


class ConstantSources:
    def score(self, pairs: Sequence[tuple[Prompt, Response]]) -> list[Score]:
        return [Score(r.step, r.row, r.sample, 1.0, {"constant": 1.0}) for _, r in pairs]


class Prompts:
    def __init__(self, rows: int) -> None:
        self._rows = rows

    def next(self, step: int) -> list[Prompt]:
        return [Prompt(step, row, "a prompt", tuple(range(PROMPT_TOKENS))) for row in range(self._rows)]

    def evaluation(self, step: int) -> list[Prompt]:
        return []


class IdleLearner:
    step = 0
    ahead: Sequence[Any] = ()

    def experience(self, rollout: Any) -> int:
        return len(rollout.responses)

    def update(self, experience: int) -> Mapping[str, float]:
        self.step += 1
        return {"responses": float(experience)}

    def weights(self) -> NoWeights:
        return NoWeights(self.step)

    def any_worker(self, mine: bool) -> bool:
        return mine

    def save(self, folder: Path, ahead: Any) -> None:
        raise AssertionError

    def mean_score(self, scores: Sequence[Score]) -> float:
        return 1.0


class Measured:
    """`Reporter`: seconds of each step, and processor seconds of the controller's thread and process."""

    def __init__(self) -> None:
        self.rows: list[dict[str, float]] = []
        self._cpu = time.process_time()

    def report(self, step: int, metrics: Mapping[str, float], rollout: Any, evaluation: Any, save: Any) -> None:
        now = time.process_time()
        self.rows.append({**metrics, "cpu_s": now - self._cpu})
        self._cpu = now


def ray_calls(kind: type, count: int, role: str, make: Callable[[], Any]) -> Any:
    from raytrl.launch.actors.calls import RayCalls
    from raytrl.launch.session.gauges import RoleGauges

    remote = ray.remote(concurrency_groups=CONCURRENCY_GROUPS | {WORK: 1}, num_cpus=0)(kind)
    actors = [remote.remote(make) for _ in range(count)]
    ray.get([actor.doing.remote() for actor in actors], timeout=600)
    return RayCalls(actors, RoleGauges("scale", role).part())


def thread_calls(kind: type, count: int, role: str, make: Callable[[], Any]) -> ThreadCalls:
    return ThreadCalls([kind(make) for _ in range(count)])


def measure(
    actors: int, latency_s: float, calls: Callable[[type, int, str, Callable[[], Any]], Any], lag: int = 0
) -> dict[str, Any]:
    """One size; medians over the steps after the warm-up. With a lag the actors are dealt to as many lanes, and a step is still
    a batch of them all: of half of them twice as long, in turns."""
    from statistics import median

    from raytrl.config.sections.reward import RewardSection
    from raytrl.config.sections.rollout import RolloutSection
    from raytrl.launch.actors.generator import PoolGenerator
    from raytrl.launch.actors.pool import Pool
    from raytrl.launch.actors.scorer import PoolScorer
    from raytrl.loop import loop

    lanes = max(1, lag)
    pools = [
        Pool(
            calls(StandInRollout, actors // lanes, "rollout", lambda: SleepingEngine(latency_s)),
            "rollout actors",
            "the simulation",
            120.0,
        )
        for _ in range(lanes)
    ]
    rewards = calls(RewardActor, max(1, actors // 16), "reward", ConstantSources)
    section = RewardSection.model_validate({"sources": [{"name": "constant", "function": "x.py:y"}]})
    generator = PoolGenerator(
        pools,
        RolloutSection(chunk_prompts=CHUNK),
        samples=1,
        attempt=Attempt("run", 1),
        send_weights=lambda weights, receivers: weights,  # type: ignore[arg-type, return-value]
        ahead=lag > 0,
        groups=lanes,
    )
    scorer = PoolScorer(
        Pool(rewards, "reward actors", "the simulation", 120.0),
        section,
        attempt=Attempt("run", 1),
        rollout=RolloutSection(start_timeout_s=120.0),
        gather=lambda scores: scores,
    )
    reporter, rows = Measured(), actors * CHUNKS_AN_ACTOR * CHUNK
    schedule = loop.Schedule(STEPS, max_lag=lag, lanes=lanes)
    loop.run(schedule, Prompts(rows), generator, scorer, IdleLearner(), reporter)  # type: ignore[arg-type]
    steps = reporter.rows[WARM_UP:]
    overhead = median(row["time/step_s"] for row in steps) - CHUNKS_AN_ACTOR * latency_s
    cpu = median(row["cpu_s"] for row in steps)
    phases = {name: round(median(row[f"time/{name}_s"] for row in steps), 4) for name in loop.PHASES}
    return {
        "actors": actors,
        "lag": lag,
        "responses_a_step": rows,
        "ideal_s": CHUNKS_AN_ACTOR * latency_s,
        "overhead_s": round(overhead, 4),
        "overhead_ms_a_response": round(overhead / rows * 1e3, 4),
        "controller_cpu_s": round(cpu, 4),
        "controller_cpu_ms_a_response": round(cpu / rows * 1e3, 4),
        **phases,
    }


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("sizes", type=int, nargs="*")
    parser.add_argument("--local", type=int, nargs="*", default=[])
    parser.add_argument("--latency", type=float, default=2.0, help="seconds a chunk")
    parser.add_argument("--lag", type=int, nargs="*", default=[0], help="ppo.max_lag; several: one after the other")
    given = parser.parse_args()
    for size in given.local:
        for lag in given.lag:
            print(json.dumps({"calls": "threads", **measure(size, given.latency, thread_calls, lag)}), flush=True)
    for size in given.sizes:
        for lag in given.lag:
            ray.init(address="local", num_cpus=2, include_dashboard=False, log_to_driver=False, logging_level="ERROR")
            print(json.dumps({"calls": "ray", **measure(size, given.latency, ray_calls, lag)}), flush=True)
            ray.shutdown()


if __name__ == "__main__":
    main()
