"""The PPO loop. Every learner worker runs it on its share of the batch."""

import time
from collections import deque
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from itertools import count

from raytrl.errors import RunError
from raytrl.loop.ahead import Request, taken_up, without
from raytrl.loop.protocols import E, Generator, Learner, PromptSource, Reporter, Rollout, Scorer, W
from raytrl.records.metrics import DRAIN, EVAL_SCORE, PHASES, STEP_S, time_of
from raytrl.records.samples import Prompt, Response

_TRIES = 3  # more, at responses whose weights were lost


@dataclass(frozen=True)
class Schedule:
    """How long the loop runs and what is due when, all in steps; 0 is never."""

    steps: int
    checkpoint_every: int = 0
    eval_every: int = 0
    eval_greedy: bool = True
    max_lag: int = 0  # so many batches are on their way while one is learned from
    lanes: int = 1  # which make a batch at a time each; max_lag of them, or one more

    def due(self, every: int, step: int) -> bool:
        return every > 0 and (step % every == 0 or step == self.steps)

    @property
    def is_early(self) -> bool:
        """Whether a batch is sent before the one is there that is learned from: a lane is idle then."""
        return self.lanes > self.max_lag


def run(
    schedule: Schedule,
    prompts: PromptSource,
    generator: Generator[W],
    scorer: Scorer,
    learner: Learner[E, W],
    reporter: Reporter,
) -> None:
    """From `learner.step` to `schedule.steps`.

    The batch of step s is made by version max(0, s - max_lag), whatever comes first: what is on its way at a checkpoint is
    waited for and stored with it. So a resumed run repeats an unbroken one exactly, at any lag.
    """
    first, lag, steps = learner.step, schedule.max_lag, schedule.steps
    if first >= steps:
        return
    ahead: deque[Request] = deque()

    def send(step: int, questions: Sequence[Prompt]) -> Request:
        """To the step's lane, which is idle: by the newest weights."""
        lane = step % schedule.lanes
        generator.load_weights(learner.weights(), lane)
        return Request(questions, generator.generate(questions, learner.step, greedy=False, lane=lane))

    def send_next(step: int) -> None:
        if step < steps:
            with clock.phase("sync"):
                ahead.append(send(step, prompts.next(step)))

    def finish_all() -> None:
        """On all workers: nothing is on its way then."""
        with clock.phase(DRAIN if lag else "generate"):
            for request in ahead:
                request.finish()
            learner.any_worker(False)

    clock = Clock.of(schedule)
    generator.load_weights(learner.weights(), None)
    for step in range(first, min(first + lag, steps)):
        ahead.append(taken_up(learner.ahead, step, prompts.next(step), send))
    for step in range(first, steps):
        clock = Clock.of(schedule)
        if schedule.is_early:
            send_next(step + lag)
        request = ahead.popleft()
        responses = _collect(request, scorer, clock)
        for tries in count():
            lost = without(request.prompts, responses)
            if not learner.any_worker(bool(lost)):
                break
            if tries == _TRIES:
                raise RunError(
                    f"step {step}: its responses were lost {tries + 1} times, each time with all who could make them"
                )
            # Nobody has their weights any more: the newest make them, wherever there is somebody.
            finish_all()
            with clock.phase("sync"):
                generator.load_weights(learner.weights(), None, anew=True)
            again = Request(lost, generator.generate(lost, learner.step, greedy=False, lane=None))
            responses += _collect(again, scorer, clock)
        if not schedule.is_early:  # the lane of this batch is idle now
            send_next(step + lag)
        with clock.phase("score"):  # what scoring costs beyond generation
            rollout = Rollout(request.prompts, responses, scorer.collect())
        with clock.phase("experience"):
            experience = learner.experience(rollout)
        with clock.phase("update"):
            metrics = dict(learner.update(experience))
        evaluates = schedule.due(schedule.eval_every, learner.step)
        saves = schedule.due(schedule.checkpoint_every, learner.step)
        if ahead and (evaluates or saves):
            finish_all()
        evaluation = None
        if evaluates:
            with clock.phase("sync"):
                generator.load_weights(learner.weights(), None)
            with clock.phase("eval"):
                evaluation = _evaluate(prompts, generator, scorer, learner, schedule.eval_greedy)
            metrics[EVAL_SCORE] = learner.mean_score(evaluation.scores)
        made = [chunk for request in ahead for chunk in request.chunks] if saves else []
        reporter.report(
            learner.step,
            metrics | clock.metrics(),
            rollout,
            evaluation,
            partial(learner.save, ahead=made) if saves else None,
        )


def _collect(request: Request, scorer: Scorer, clock: "Clock") -> list[Response]:
    """Wait for the responses, sending each chunk to be scored as it comes."""
    responses: list[Response] = []
    with clock.phase("generate"):
        for chunk in request.chunks:
            responses.extend(chunk)
            scorer.submit(request.prompts, chunk)
    return responses


def _evaluate(
    prompts: PromptSource, generator: Generator[W], scorer: Scorer, learner: Learner[E, W], greedy: bool
) -> Rollout:
    questions = prompts.evaluation(learner.step)
    request = Request(questions, generator.generate(questions, learner.step, greedy=greedy, lane=None))
    responses = _collect(request, scorer, Clock())
    if without(questions, responses):
        raise RunError(
            f"evaluation after step {learner.step}: the rollout actors were lost, with the weights to evaluate"
        )
    return Rollout(questions, responses, scorer.collect())


@dataclass
class Clock:
    """Wall-clock seconds of one step by phase; `idle` is what no phase accounts for."""

    started: float = field(default_factory=time.perf_counter)
    phases: dict[str, float] = field(default_factory=lambda: dict.fromkeys(PHASES, 0.0))

    @classmethod
    def of(cls, schedule: Schedule) -> "Clock":
        """With the phase that only a lag brings."""
        return cls(phases=dict.fromkeys((*PHASES, DRAIN) if schedule.max_lag else PHASES, 0.0))

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        begin = time.perf_counter()
        try:
            yield
        finally:
            self.phases[name] = self.phases.get(name, 0.0) + time.perf_counter() - begin

    def metrics(self) -> dict[str, float]:
        """`time/<phase>_s`, `time/idle_s` and `time/step_s`."""
        total = time.perf_counter() - self.started
        times = {time_of(name): spent for name, spent in self.phases.items()}
        return times | {time_of("idle"): total - sum(self.phases.values()), STEP_S: total}
