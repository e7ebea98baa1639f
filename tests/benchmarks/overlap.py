"""How much of sampling hides behind learning, by lag: the real loop, pools and Ray actors; engines and learner take set times.

    python -m tests.benchmarks.overlap [UNIT_MS]

Four rollout actors with a continuous batch of 32 slots, where a decode step takes 1 + 0.02 for each response in it; 256
responses a step, of even or log-normal lengths (mean 250, cut at 1000); the learner takes U; all in units of UNIT_MS (default 1
ms). Prints seconds a step of each schedule, their ratio to lag 0, and for even lengths the ratio to the longer of sampling and
learning: the best that any schedule of lag 1 can do.
"""

import math
import random
import statistics
import sys
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import ray

from raytrl.launch.actors.base import CONCURRENCY_GROUPS, MAX_IN_FLIGHT, WORK
from raytrl.records.samples import Attempt, Prompt, Response, Score
from tests.benchmarks.scale_simulation import IdleLearner, Measured, Prompts, StandInRollout

ACTORS, SLOTS, BATCH, CHUNK, MEAN, LIMIT = 4, 32, 256, 4, 250, 1000
STEPS, WARM_UP = 9, 4  # the first ones are made by the first weights, all at once


class Batch:
    """A continuous batch: whoever has a slot gets a token in each step of it."""

    def __init__(self, unit_s: float) -> None:
        self._unit_s = unit_s
        self._changed = threading.Condition()
        self._waiting: list[list[Any]] = []  # [tokens left, done]
        threading.Thread(target=self._run, daemon=True).start()

    def make(self, lengths: Sequence[int]) -> None:
        mine = [[length, threading.Event()] for length in lengths]
        with self._changed:
            self._waiting += mine
            self._changed.notify()
        for _, done in mine:
            done.wait()

    def _run(self) -> None:
        active: list[list[Any]] = []
        clock = time.perf_counter()
        while True:
            with self._changed:
                if not active and not self._waiting:
                    self._changed.wait_for(lambda: bool(self._waiting))
                    clock = time.perf_counter()
                while self._waiting and len(active) < SLOTS:
                    active.append(self._waiting.pop(0))
            # Several tokens at a time, as many as the shortest needs, and no more than take 20 units: threads are woken less.
            cost = 1 + 0.02 * len(active)
            tokens = max(1, min(min(left for left, _ in active), int(20 / cost)))
            clock += tokens * cost * self._unit_s
            time.sleep(max(0.0, clock - time.perf_counter()))
            for each in active:
                each[0] -= tokens
                if each[0] <= 0:
                    each[1].set()
            active = [each for each in active if each[0] > 0]


class StandIn:
    """An engine that takes the time that a batch of such lengths would, and answers with whole records."""

    concurrent, num_versions = True, 1

    def __init__(self, unit_s: float, sigma: float) -> None:
        self._batch, self._sigma = Batch(unit_s), sigma

    def generate(self, prompts: Sequence[Prompt], version: int, **_: Any) -> list[Response]:
        self._batch.make([length_of(prompt, self._sigma) for prompt in prompts])
        return [Response(p.step, p.row, 0, (1, 2), "text", True, (-1.0, -1.0), version) for p in prompts]


def length_of(prompt: Prompt, sigma: float) -> int:
    draw = random.Random(f"{prompt.step}/{prompt.row}").lognormvariate(math.log(MEAN) - sigma**2 / 2, sigma)
    return round(min(LIMIT, max(8, draw)))


class Learner(IdleLearner):
    def __init__(self, update_s: float) -> None:
        self._update_s = update_s

    def update(self, experience: int) -> Mapping[str, float]:
        time.sleep(self._update_s)
        return super().update(experience)


class Scores:
    def __init__(self) -> None:
        self._found: list[Score] = []

    def submit(self, prompts: Sequence[Prompt], responses: Sequence[Response]) -> None:
        self._found += [Score(r.step, r.row, r.sample, 1.0, {}) for r in responses]

    def collect(self) -> Sequence[Score]:
        found, self._found = self._found, []
        return found


def step_s(lag: int, versions: int, sigma: float, update: float, unit_s: float) -> float:
    """Median seconds of a step."""
    from raytrl.config.sections.ppo import PpoSection
    from raytrl.config.sections.rollout import RolloutSection
    from raytrl.launch.actors.calls import RayCalls
    from raytrl.launch.actors.generator import PoolGenerator
    from raytrl.launch.actors.pool import Pool
    from raytrl.launch.session.gauges import RoleGauges
    from raytrl.loop import loop

    remote = ray.remote(concurrency_groups=CONCURRENCY_GROUPS | {WORK: MAX_IN_FLIGHT}, num_cpus=0)(StandInRollout)
    actors = [remote.remote(partial(StandIn, unit_s, sigma)) for _ in range(ACTORS)]
    ray.get([actor.doing.remote() for actor in actors], timeout=600)
    lanes = PpoSection(max_lag=lag).lanes(versions)
    groups, gauges = -(-lanes // versions), RoleGauges("overlap", "rollout")
    window = 3 * SLOTS // (2 * CHUNK) + 1
    pools = [
        Pool(RayCalls(actors[lane % groups :: groups], gauges.part()), "actors", "the benchmark", 120.0, window=window)
        for lane in range(lanes)
    ]
    generator = PoolGenerator(
        pools,
        RolloutSection(chunk_prompts=CHUNK),
        samples=1,
        attempt=Attempt("run", 1),
        send_weights=lambda weights, receivers: weights,  # type: ignore[arg-type, return-value]
        ahead=lag > 0,
        groups=groups,
    )
    reporter = Measured()
    schedule = loop.Schedule(STEPS + lag, max_lag=lag, lanes=lanes)
    loop.run(schedule, Prompts(BATCH), generator, Scores(), Learner(update * unit_s), reporter)  # type: ignore[arg-type]
    for actor in actors:
        ray.kill(actor)
    return statistics.mean(row["time/step_s"] for row in reporter.rows[WARM_UP:STEPS])


SCHEDULES: Sequence[tuple[str, int, int]] = (
    ("lag 0", 0, 1),
    ("lag 1", 1, 1),
    ("lag 2, two groups", 2, 1),
    ("lag 1, versions side by side", 1, 2),
    ("lag 2, versions side by side", 2, 3),
    ("lag 3, versions side by side", 3, 4),
)


def main() -> None:
    unit_s = (float(sys.argv[1]) if len(sys.argv) > 1 else 1.0) / 1000
    ray.init(address="local", num_cpus=2, include_dashboard=False, log_to_driver=False, logging_level="ERROR")
    of: Callable[..., float] = partial(step_s, unit_s=unit_s)
    for update in (300.0, 1200.0):
        sampling = of(0, 1, 0.0, 0.0)
        ahead = of(1, 1, 0.0, update)
        print(
            f"even lengths, U={update:g}: sampling {sampling:.3f} s, learning {update * unit_s:.3f} s, lag 1 {ahead:.3f} s: "
            f"{ahead / max(sampling, update * unit_s):.3f} of the longer",
            flush=True,
        )
    for sigma in (0.5, 1.0):
        for update in (300.0, 800.0):
            plain = None
            for name, lag, versions in SCHEDULES:
                found = of(lag, versions, sigma, update)
                plain = plain or found
                print(f"sigma {sigma}, U={update:g}, {name}: {found:.3f} s a step, {plain / found:.2f}", flush=True)


if __name__ == "__main__":
    main()
