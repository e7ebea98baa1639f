"""The alarms: log-probs that drift apart, samples that no longer tell of today's policy."""

from raytrl.loop.alarm import GapAlarm, StaleAlarm


def test_it_is_silent_while_the_gap_is_rounding() -> None:
    alarm = GapAlarm()
    assert [alarm.check(step, gap) for step, gap in enumerate([1e-6, 5e-6, 9e-4, 2e-7])] == [None] * 4
    alarm = GapAlarm()
    assert [alarm.check(step, gap) for step, gap in enumerate([0.01, 0.03, 0.09])] == [None] * 3


def test_it_tells_growth_once_and_again_when_it_doubles() -> None:
    alarm = GapAlarm()
    said = [alarm.check(step, gap) for step, gap in enumerate([1e-6, 0.02, 0.03, 0.05])]
    assert [text is not None for text in said] == [False, True, False, True]
    assert said[1] is not None
    assert "step 1: rollout/logprob_gap_mean is 0.02 nats a token; found 1e-06 at first" in said[1]


def test_a_batch_that_counts_as_less_than_half_is_told_and_again_when_that_halves() -> None:
    alarm = StaleAlarm()
    said = [alarm.check(step, ess, kl=0.4, max_lag=2) for step, ess in enumerate([0.98, 0.5, 0.4, 0.3, 0.25, 0.19])]
    assert [text is not None for text in said] == [False, False, True, False, False, True]
    assert said[2] is not None
    assert said[2].startswith("step 2: importance/ess is 0.4: ") and "moved 0.4 nats a response" in said[2]
    assert said[2].endswith("lower ppo.max_lag, found 2, or ppo.learning_rate")
