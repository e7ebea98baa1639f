"""The loop: order, versions, lag, evaluation and times."""

import math

from toy import LocalGenerator, LocalScorer, Log, Prompts, config, gpt2, make_engine, make_learner

from raytrl.loop.loop import Schedule, run


def test_lag_0_learns_from_current_weights_and_lag_1_from_the_previous() -> None:
    for lag, expected in ((0, [0, 1, 2, 3]), (1, [0, 0, 1, 2])):
        ppo, log = config(max_lag=lag), Log()
        generator = LocalGenerator([make_engine(gpt2(width=16))], 1)
        learner = make_learner(gpt2(width=16), ppo)
        run(Schedule(4, max_lag=lag), Prompts(16), generator, LocalScorer(), learner, log)
        assert [rollout.responses[0].policy_version for rollout in log.rollouts] == expected
        assert [rollout.responses[0].step for rollout in log.rollouts] == [0, 1, 2, 3]
        gaps = [m["rollout/logprob_gap_max"] for m in log.metrics]
        assert (max(gaps) > 1e-3) == bool(lag)


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
