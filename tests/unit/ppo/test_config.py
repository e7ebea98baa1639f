"""The ppo part of a run file: defaults, and errors that say what to do."""

from typing import Any

import pytest
from pydantic import ValidationError

from raytrl.config.sections.ppo import EvalSection, PpoSection
from raytrl.config.sections.rollout import RolloutSection, SamplingSection


def test_defaults_are_valid() -> None:
    assert PpoSection().prompts_per_step == 64
    assert RolloutSection().sampling == SamplingSection()
    assert EvalSection().every == 20
    assert SamplingSection(stop="###").stop == ["###"]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"batch_size": 10, "responses_per_prompt": 4, "minibatches": 1}, "multiple of responses_per_prompt"),
        ({"batch_size": 10}, "multiple of minibatches"),
        ({"kl": {"coef": 0.0, "target": 6.0}}, "0 stays 0"),
        ({"kl": {"target": 0.0}}, "greater than 0"),
        ({"kl": {"coef": -0.1}}, "greater than or equal to 0"),
        ({"gamma": 1.1}, "less than or equal to 1"),
        ({"max_lag": 9}, "less than or equal to 8"),
        ({"learning_rate": 0}, "greater than 0"),
        ({"lerning_rate": 1}, "Extra inputs"),
    ],
)
def test_refused_ppo_settings(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        PpoSection(**changes)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"top_p": 0.9}, "top_p: is refused: it changes the distribution"),
        ({"top_k": 50}, "top_k: is refused"),
        ({"temperature": 0.0}, "eval.greedy; found: 0.0; expected: more than 0"),
        ({"temperature": float("nan")}, "finite number"),
        ({"stop": ["a", ""]}, "empty string"),
        ({"max_new_tokens": 0}, "greater than 0"),
    ],
)
def test_refused_sampling(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        SamplingSection(**changes)


def test_frozen() -> None:
    with pytest.raises(ValidationError, match="frozen"):
        PpoSection().steps = 3  # type: ignore[misc]
