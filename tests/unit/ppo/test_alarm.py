"""The alarm of log-probs that drift apart."""

from raytrl.loop.alarm import GapAlarm


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
