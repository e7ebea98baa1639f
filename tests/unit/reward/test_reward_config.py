"""The `reward:` section refuses what cannot work or would do nothing."""

from typing import Any

import pytest
from pydantic import ValidationError

from raytrl.config.sections.reward import RewardSection

FUNCTION = {"name": "brevity", "function": "rewards.py:brevity"}


def test_the_documented_section_is_accepted_and_frozen() -> None:
    section = RewardSection.model_validate(
        {
            "actors": 1,
            "resources": {"CPU": 1},
            "sources": [
                {"name": "sentiment", "model": "runs/reward-reviews/model", "weight": 1.0, "label": "POSITIVE"},
                {"name": "brevity", "function": "rewards.py:brevity", "weight": 0.1},
                {"name": "judge", "url": "http://host:8000/score", "weight": -1.0},
            ],
            "on_error": "drop",
        }
    )
    assert [source.kind for source in section.sources] == ["model", "function", "url"]
    assert section.drop_budget == 0.05
    assert RewardSection.model_validate(section.model_dump()) == section  # a resolved run file loads again
    with pytest.raises(ValidationError):
        section.actors = 2


@pytest.mark.parametrize(
    ("source", "words"),
    [
        ({"name": "a", "retries": 1}, "retries: does nothing for an environment source"),
        ({"name": "a", "model": "m", "url": "http://h"}, "found: model and url; expected: exactly one"),
        ({**FUNCTION, "weight": 0}, "found: 0.0"),
        ({**FUNCTION, "weight": float("nan")}, "finite number"),
        ({**FUNCTION, "label": "POSITIVE"}, "label: does nothing for a function source"),
        ({**FUNCTION, "dtype": "float32"}, "dtype: does nothing for a function source"),
        ({"name": "a", "model": "m", "headers_env": {"Authorization": "KEY"}}, "headers_env: does nothing for a model"),
        ({"name": "a", "function": "rewards.brevity"}, "expected: file.py:name or package.module:name"),
        ({"name": "a", "url": "host:8000/score"}, "expected: http://"),
        ({**FUNCTION, "name": "a/b"}, "name"),
        ({**FUNCTION, "timeout_s": 0}, "greater than 0"),
        ({**FUNCTION, "wieght": 1}, "wieght"),
    ],
)
def test_a_wrong_source_is_refused(source: dict[str, Any], words: str) -> None:
    with pytest.raises(ValidationError, match=words):
        RewardSection.model_validate({"sources": [source]})


@pytest.mark.parametrize(
    ("section", "words"),
    [
        ({"sources": [FUNCTION, FUNCTION]}, "two sources share a name"),
        ({"sources": [FUNCTION], "max_dropped_fraction": 0.1}, "does nothing with on_error: fail"),
        ({"sources": [FUNCTION], "actors": 0}, "greater than or equal to 1"),
        ({"sources": [FUNCTION], "on_error": "zero"}, "'fail' or 'drop'"),
    ],
)
def test_a_wrong_section_is_refused(section: dict[str, Any], words: str) -> None:
    with pytest.raises(ValidationError, match=words):
        RewardSection.model_validate(section)
