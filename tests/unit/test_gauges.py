"""Which of a run's numbers become gauges; that Ray exports them is tested over several nodes (tests/ray)."""

import pytest

from raytrl.launch.session.gauges import GAUGES, StepGauges
from raytrl.records.progress import Progress


class Recorded:
    """Stands in for the gauges of a process, which need a Ray that runs."""

    def __init__(self) -> None:
        self.values: dict[tuple[str, ...], float] = {}

    def set(self, name: str, value: float, **tags: str) -> None:
        assert set(tags) == set(GAUGES[name][1]), name
        self.values[name.removeprefix("raytrl_"), *tags.values()] = value


def shown(gauges: StepGauges, *events: Progress) -> dict[tuple[str, ...], float]:
    recorded = Recorded()
    gauges._gauges = recorded  # type: ignore[assignment]
    for event in events:
        gauges.take(event)
    return recorded.values


def test_sft_counts_the_tokens_of_the_trainer_and_the_starts() -> None:
    values = shown(
        StepGauges("a", None),
        Progress("start", 0, 8),
        Progress("step", 1, 8, metrics={"loss": 3.0, "num_tokens": 100.0, "time/step_s": 0.5}),
        Progress("start", 0, 8),
        Progress("step", 1, 8, metrics={"loss": 3.0, "num_tokens": 100.0, "time/step_s": 0.5}),
        Progress("step", 3, 8, metrics={"loss": 2.0, "num_tokens": 300.0, "time/step_s": 0.5}),
    )
    assert values == {
        ("step",): 3,
        ("total_steps",): 8,
        ("restarts", "learner"): 1,
        ("loss",): 2.0,
        ("step_seconds",): 0.5,
        ("tokens_per_second",): pytest.approx(100 / 0.5),
    }


def test_ppo_shows_score_kl_and_phases() -> None:
    metrics = {
        "objective/scores_raw": 0.5,
        "objective/kl": 2.0,
        "response/length": 10.0,
        "time/step_s": 4.0,
        "time/generate_s": 3.0,
        "time/idle_s": 1.0,
    }
    assert shown(StepGauges("a", 16), Progress("step", 7, 20, metrics=metrics)) == {
        ("step",): 7,
        ("total_steps",): 20,
        ("step_seconds",): 4.0,
        ("score",): 0.5,
        ("kl",): 2.0,
        ("phase_seconds", "generate"): 3.0,
        ("phase_seconds", "idle"): 1.0,
        ("tokens_per_second",): 40.0,
    }
