"""All sources together: the weighted sum, the two policies for failures, the budget."""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from raytrl.config.sections.reward import RewardSection
from raytrl.errors import ConfigError, RewardError
from raytrl.records.samples import Score
from raytrl.roles.reward.sources import RewardSources, check_dropped

FUNCTIONS = """
def length(completions, **kwargs):
    return [len(text) for text in completions]

def picky(completions, **kwargs):
    return [None if text.startswith("n") else 1.0 for text in completions]

def flaky(completions, **kwargs):
    return [float("nan") if "bad" in text else 1.0 for text in completions]

def none(completions, **kwargs):
    return [None for _ in completions]

def raises(completions, **kwargs):
    raise ValueError("no")
"""


@pytest.fixture
def sources(tmp_path: Path) -> Iterator[Callable[..., RewardSources]]:
    (tmp_path / "mine.py").write_text(FUNCTIONS)
    made: list[RewardSources] = []

    def make(weights: dict[str, float], **more: Any) -> RewardSources:
        entries = [
            {"name": name, "function": f"{tmp_path / 'mine.py'}:{name}", "weight": weight, "retries": 0}
            for name, weight in weights.items()
        ]
        made.append(RewardSources(RewardSection.model_validate({"sources": entries, **more})))
        return made[-1]

    yield make
    for one in made:
        one.close()


def test_the_score_is_the_weighted_sum_of_what_applies(sources: Any, pair: Any) -> None:
    scores = sources({"length": 0.5, "picky": -3.0}).score([pair("p", "yes", row=4, sample=1), pair("p", "no", row=5)])
    assert scores == [
        Score(7, 4, 1, 0.5 * 3 - 3.0, {"length": 3.0, "picky": 1.0}),
        Score(7, 5, 0, 0.5 * 2, {"length": 2.0, "picky": None}),
    ]


def test_a_model_and_a_function_together(classifier: Any, pair: Any) -> None:
    entries = [
        {"name": "rm", "model": classifier(), "weight": 2.0},
        {"name": "gold", "function": "raytrl.film_reviews:sentiment_reward"},
    ]
    both = RewardSources(RewardSection.model_validate({"sources": entries}), device="cpu")
    (score,) = both.score([pair("It was", " moving.")])
    both.close()
    assert score.by_source["gold"] == 1.0
    by_model = score.by_source["rm"]
    assert by_model is not None
    assert score.value == pytest.approx(2 * by_model + 1)


def test_a_failure_fails_the_run_and_names_source_row_and_value(sources: Any, pair: Any) -> None:
    pairs = [pair("p", "good", row=0), pair("p", "bad", row=1, sample=2)]
    with pytest.raises(RewardError, match=r"source 'flaky' .*step 7, row 1, sample 2: returned nan, not a finite"):
        sources({"length": 1.0, "flaky": 1.0}).score(pairs)


def test_drop_gives_none_never_zero(sources: Any, pair: Any) -> None:
    pairs = [pair("p", "good", row=0), pair("p", "bad", row=1)]
    scores = sources({"length": 1.0, "flaky": 1.0}, on_error="drop", max_dropped_fraction=0.5).score(pairs)
    assert [score.value for score in scores] == [5.0, None]
    assert scores[1].by_source == {"length": 3.0, "flaky": None}
    assert check_dropped(scores, 0.5) == 1


def test_more_dropped_than_the_budget_fails(sources: Any, pair: Any) -> None:
    pairs = [pair("p", "good", row=0), pair("p", "bad", row=1), pair("p", "bad", row=2)]
    with pytest.raises(RewardError, match=r"found: 2 of 3; expected: at most 0\.5 .*'flaky'.*row 1.*returned nan"):
        sources({"flaky": 1.0}, on_error="drop", max_dropped_fraction=0.5).score(pairs)


def test_a_source_that_raises_drops_its_whole_call(sources: Any, pair: Any) -> None:
    scores = sources({"length": 1.0, "raises": 1.0}, on_error="drop", max_dropped_fraction=1.0).score([pair("p", "x")])
    assert [score.value for score in scores] == [None]


def test_no_source_applies(sources: Any, pair: Any) -> None:
    with pytest.raises(RewardError, match="every source answered that it does not apply"):
        sources({"none": 1.0, "picky": 1.0}).score([pair("p", "yes"), pair("p", "no", row=1)])
    scores = sources({"none": 1.0}, on_error="drop", max_dropped_fraction=1.0).score([pair("p", "x")])
    assert [score.value for score in scores] == [None]


def test_a_response_paired_with_another_prompt_is_refused(sources: Any, pair: Any) -> None:
    with pytest.raises(ValueError, match="goes with another prompt"):
        sources({"length": 1.0}).score([(pair("p", "x", row=0)[0], pair("p", "x", row=1)[1])])


def test_nothing_to_score(sources: Any) -> None:
    assert sources({"length": 1.0}).score([]) == []


def test_a_source_that_cannot_load_ends_the_others(tmp_path: Path) -> None:
    entries = [
        {"name": "gold", "function": "raytrl.film_reviews:sentiment_reward"},
        {"name": "gone", "function": "nowhere.py:f"},
    ]
    with pytest.raises(ConfigError, match=r"reward\.sources\.gone"):
        RewardSources(RewardSection.model_validate({"sources": entries}))
