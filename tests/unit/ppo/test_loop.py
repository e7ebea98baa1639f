"""The loop: order, versions, lag, evaluation and times."""

import math
from pathlib import Path
from typing import Any

import pytest
from test_learner import parameters
from toy import LocalGenerator, LocalScorer, Log, Prompts, config, gpt2, make_engine, make_learner

from raytrl.errors import RunError
from raytrl.loop.loop import Schedule, run
from raytrl.loop.protocols import Rollout
from raytrl.records.samples import Response
from raytrl.roles.learner.learner import PpoLearner
from raytrl.roles.weights.buckets import checksum

STEPS = 8


def by_hand(lag: int) -> tuple[PpoLearner, list[dict[str, float]]]:
    """The same without a loop: an engine for each version there was."""
    learner, scorer, engines, found = make_learner(gpt2(width=16), config(max_lag=lag)), LocalScorer(), {}, []
    for step in range(STEPS):
        engines[step] = make_engine(gpt2(width=16))
        engines[step].load_weights(learner.weights())
        version, prompts = max(0, step - lag), Prompts(16).next(step)
        responses = [
            r for rows in (prompts[:8], prompts[8:]) for r in engines[version].generate(rows, version, samples=1)
        ]
        scorer.submit(prompts, responses)
        found.append(dict(learner.update(learner.experience(Rollout(prompts, responses, scorer.collect())))))
    return learner, found


def looped(lag: int, engines: int, versions: int, log: Log, steps: int = STEPS, **schedule: int) -> PpoLearner:
    """From the checkpoint of `log`'s folder where that has one."""
    learner = make_learner(gpt2(width=16), config(max_lag=lag))
    stored = sorted(log.folder.iterdir(), key=lambda path: int(path.name)) if log.folder and log.folder.is_dir() else []
    if stored:
        learner.load(stored[-1])
    samplers = [make_engine(gpt2(width=16), num_versions=versions) for _ in range(engines)]
    lanes = config(max_lag=lag).lanes(versions)
    generator = LocalGenerator(samplers, 1, lanes=lanes)
    run(Schedule(steps, max_lag=lag, lanes=lanes, **schedule), Prompts(16), generator, LocalScorer(), learner, log)
    return learner


@pytest.mark.parametrize(
    ("lag", "engines", "versions"),
    [
        *((0, 1, 1), (1, 1, 1), (1, 3, 1), (1, 1, 2), (2, 2, 1), (2, 1, 2), (2, 1, 3)),
        *((3, 3, 1), (3, 1, 3), (3, 2, 2), (3, 3, 2), (3, 2, 4), (8, 1, 9)),
    ],
)
def test_the_batch_of_a_step_is_made_by_the_version_that_its_number_says(lag: int, engines: int, versions: int) -> None:
    expected, metrics = by_hand(lag)
    log = Log()
    learner = looped(lag, engines, versions, log)
    assert [rollout.responses[0].policy_version for rollout in log.rollouts] == [max(0, s - lag) for s in range(STEPS)]
    assert [rollout.responses[0].step for rollout in log.rollouts] == list(range(STEPS))
    assert checksum(parameters(learner)) == checksum(parameters(expected))
    found = [{key: value for key, value in row.items() if key in metrics[0]} for row in log.metrics]
    assert found == metrics
    assert (max(m["rollout/logprob_gap_max"] for m in log.metrics) > 1e-3) == (lag > 0)


@pytest.mark.parametrize(("lag", "versions"), [(1, 1), (1, 2), (2, 1), (2, 3), (3, 2)])
def test_a_run_that_was_cut_at_any_step_goes_on_exactly(lag: int, versions: int, tmp_path: Path) -> None:
    """With evaluations on the way, which wait for what is sampled ahead and load all engines with newer weights."""
    unbroken = looped(lag, lag, versions, Log(), eval_every=3)
    for cut in range(1, min(2 * lag + 2, STEPS - 1) + 1):
        folder, log = tmp_path / str(cut), Log(tmp_path / str(cut))
        with pytest.raises(KeyboardInterrupt):
            looped(lag, lag, versions, CutLog(folder, cut), checkpoint_every=1)
        assert max(int(path.name) for path in folder.iterdir()) == cut
        resumed = looped(lag, lag, versions, log, eval_every=3)
        assert [r.responses[0].policy_version for r in log.rollouts] == [max(0, s - lag) for s in range(cut, STEPS)]
        assert checksum(parameters(resumed)) == checksum(parameters(unbroken))


class CutLog(Log):
    def __init__(self, folder: Path, cut: int) -> None:
        super().__init__(folder)
        self._cut = cut

    def report(self, step: int, *more: Any) -> None:
        super().report(step, *more)
        if step == self._cut:
            raise KeyboardInterrupt


def test_no_more_is_on_its_way_than_the_lag_says() -> None:
    """Batch s + k is asked for once batch s is there, in its lane, by version s; nothing is asked for beyond the end."""
    engines = [make_engine(gpt2(width=16)) for _ in range(3)]
    generator, learner = LocalGenerator(engines, 1, lanes=3), make_learner(gpt2(width=16), config(max_lag=3))
    run(Schedule(6, max_lag=3, lanes=3), Prompts(16), generator, LocalScorer(), learner, Log())
    assert generator.asked == [(max(0, step - 3), step % 3, [step]) for step in range(6)]


class Forgetful(LocalGenerator):
    """Loses the weights of a step's lane before any, or all but the first chunk, of its batch is made."""

    def __init__(self, engines: Any, *, at: int, kept: int, **how: Any) -> None:
        super().__init__(engines, 1, **how)
        self.at, self.kept, self.is_lost, self.anew = at, kept, False, 0

    def generate(self, prompts: Any, version: int, **how: Any) -> list[list[Response]]:
        found = super().generate(prompts, version, **how)
        if not self.is_lost and prompts[0].step == self.at:
            self.is_lost = True
            return found[: self.kept]
        return found

    def load_weights(self, weights: Any, lane: int | None = None, *, anew: bool = False) -> None:
        self.anew += anew
        super().load_weights(weights, lane, anew=anew)


@pytest.mark.parametrize("kept", [0, 1])
@pytest.mark.parametrize("lag", [0, 1, 2])
def test_what_nobody_can_make_any_more_is_made_by_the_newest_weights(lag: int, kept: int) -> None:
    engines = [make_engine(gpt2(width=16)) for _ in range(max(1, lag))]
    generator, log = Forgetful(engines, at=4, kept=kept, lanes=max(1, lag)), Log()
    learner = make_learner(gpt2(width=16), config(max_lag=lag))
    run(Schedule(STEPS, max_lag=lag, lanes=max(1, lag)), Prompts(16), generator, LocalScorer(), learner, log)
    assert generator.is_lost and generator.anew == 1
    versions = [sorted({response.policy_version for response in rollout.responses}) for rollout in log.rollouts]
    as_planned = [[max(0, step - lag)] for step in range(STEPS)]
    assert versions == [*as_planned[:4], sorted({4, *(as_planned[4] if kept else [])}), *as_planned[5:]]
    newer = [metrics["rollout/redone_newer"] for metrics in log.metrics] if lag else [0.0] * STEPS
    assert newer == [0.0] * 4 + [float(16 - 8 * kept) if lag else 0.0] + [0.0] * 3


def test_a_run_whose_responses_are_lost_each_time_fails() -> None:
    class Hopeless(LocalGenerator):
        def generate(self, prompts: Any, version: int, **how: Any) -> list[list[Response]]:
            return []

    generator = Hopeless([make_engine(gpt2(width=16))], 1)
    with pytest.raises(RunError, match="step 0: its responses were lost 4 times"):
        run(Schedule(2), Prompts(16), generator, LocalScorer(), make_learner(gpt2(width=16), config()), Log())


def test_evaluation_and_checkpoints_when_due_and_at_the_end(tmp_path) -> None:  # type: ignore[no-untyped-def]
    log = Log(tmp_path)
    generator = LocalGenerator([make_engine(gpt2(width=16))], 1)
    learner = make_learner(gpt2(width=16), config(steps=5))
    run(Schedule(5, checkpoint_every=3, eval_every=2), Prompts(16), generator, LocalScorer(), learner, log)
    assert ["eval/score" in m for m in log.metrics] == [False, True, False, True, True]
    assert [found is not None for found in log.evaluations] == [False, True, False, True, True]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["3", "5"]
    run(Schedule(5), Prompts(16), generator, LocalScorer(), learner, log)
    assert len(log.metrics) == 5  # nothing left to do


def test_times_add_up() -> None:
    log = Log()
    generator = LocalGenerator([make_engine(gpt2(width=16))], 1)
    run(Schedule(1), Prompts(16), generator, LocalScorer(), make_learner(gpt2(width=16), config()), log)
    times = {name: value for name, value in log.metrics[0].items() if name.startswith("time/")}
    phases = {f"time/{phase}_s" for phase in ("generate", "score", "experience", "update", "sync", "idle", "step")}
    assert times.keys() == phases
    assert math.isclose(sum(times.values()), 2 * times["time/step_s"], abs_tol=1e-6)
