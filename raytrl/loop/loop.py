"""The PPO loop. Every learner worker runs it on its share of the batch."""

import time
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field

from raytrl.loop.protocols import E, Generator, Learner, PromptSource, Reporter, Rollout, Scorer, W
from raytrl.records.metrics import EVAL_SCORE, PHASES, STEP_S, time_of
from raytrl.records.samples import Prompt, Response


@dataclass(frozen=True)
class Schedule:
    """How long the loop runs and what is due when, all in steps; 0 is never."""

    steps: int
    checkpoint_every: int = 0
    eval_every: int = 0
    eval_greedy: bool = True
    max_lag: int = 0  # 1: the next batch is generated while this one is learned from

    def due(self, every: int, step: int) -> bool:
        return every > 0 and (step % every == 0 or step == self.steps)


def run(
    schedule: Schedule,
    prompts: PromptSource,
    generator: Generator[W],
    scorer: Scorer,
    learner: Learner[E, W],
    reporter: Reporter,
) -> None:
    """From `learner.step` to `schedule.steps`.

    With `max_lag` 0 a resumed run repeats an unbroken one exactly. With 1 the batch in flight at a checkpoint is not
    part of it: the first batch after a resume is made by newer weights than it would have been.
    """
    if learner.step >= schedule.steps:
        return
    generator.load_weights(learner.weights())
    ahead: _Request | None = None
    for step in range(learner.step, schedule.steps):
        clock = Clock()
        request = ahead or _Request.send(generator, prompts.next(step), learner.step)
        rollout = _collect(request, scorer, clock)
        with clock.phase("experience"):
            experience = learner.experience(rollout)
        more = step + 1 < schedule.steps
        ahead = _Request.send(generator, prompts.next(step + 1), learner.step) if schedule.max_lag and more else None
        with clock.phase("update"):
            metrics = dict(learner.update(experience))
        if ahead is not None:
            # All of it, before the weights move: no actor ever has to serve two versions.
            with clock.phase("generate"):
                ahead = ahead.finished()
        with clock.phase("sync"):
            generator.load_weights(learner.weights())
        evaluation = None
        if schedule.due(schedule.eval_every, learner.step):
            with clock.phase("eval"):
                evaluation = _evaluate(prompts, generator, scorer, learner, schedule.eval_greedy)
            metrics[EVAL_SCORE] = learner.mean_score(evaluation.scores)
        save = learner.save if schedule.due(schedule.checkpoint_every, learner.step) else None
        reporter.report(learner.step, metrics | clock.metrics(), rollout, evaluation, save)


@dataclass(frozen=True)
class _Request:
    prompts: Sequence[Prompt]
    chunks: Iterable[Sequence[Response]]

    @classmethod
    def send(cls, generator: Generator[W], prompts: Sequence[Prompt], version: int) -> "_Request":
        return cls(prompts, generator.generate(prompts, version, greedy=False))

    def finished(self) -> "_Request":
        return _Request(self.prompts, list(self.chunks))


def _collect(request: _Request, scorer: Scorer, clock: "Clock") -> Rollout:
    """Wait for the responses, sending each chunk to be scored as it comes."""
    responses: list[Response] = []
    with clock.phase("generate"):
        for chunk in request.chunks:
            responses.extend(chunk)
            scorer.submit(request.prompts, chunk)
    with clock.phase("score"):  # what scoring costs beyond generation
        scores = scorer.collect()
    return Rollout(request.prompts, responses, scores)


def _evaluate(
    prompts: PromptSource, generator: Generator[W], scorer: Scorer, learner: Learner[E, W], greedy: bool
) -> Rollout:
    questions = prompts.evaluation(learner.step)
    request = _Request(questions, generator.generate(questions, learner.step, greedy=greedy))
    return _collect(request, scorer, Clock())


@dataclass
class Clock:
    """Wall-clock seconds of one step by phase; `idle` is what no phase accounts for."""

    started: float = field(default_factory=time.perf_counter)
    phases: dict[str, float] = field(default_factory=lambda: dict.fromkeys(PHASES, 0.0))

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
