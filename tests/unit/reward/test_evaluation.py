"""Evaluation summaries, by hand-made numbers."""

import json
from typing import Any

import pytest

from raytrl.records.samples import Score
from raytrl.roles.reward.summary import compare, spread, summarize


def _scores(*values: float | None) -> list[Score]:
    return [Score(0, row, 0, value, {"a": value, "b": None}) for row, value in enumerate(values)]


def test_a_summary(pair: Any) -> None:
    responses = [pair("p", "x", row=row, ended=row != 1)[1] for row in range(4)]
    summary = summarize(responses, _scores(1.0, 2.0, None, 6.0), [0.5, 1.5, 0.0, 2.0])
    assert summary.score is not None
    assert (summary.score.mean, summary.score.min, summary.score.max) == (3.0, 1.0, 6.0)
    assert summary.score.std == pytest.approx(7**0.5)
    assert summary.by_source == {"a": summary.score, "b": None}
    assert (summary.responses, summary.dropped, summary.end_token_share, summary.kl_mean) == (4, 1, 0.75, 1.0)
    assert summary.response_tokens is not None
    assert summary.response_tokens.mean == 3.0
    assert json.loads(json.dumps(summary.to_json()))["by_source"]["a"]["count"] == 3


def test_nothing_is_none_not_zero() -> None:
    summary = summarize([], [])
    assert (summary.score, summary.end_token_share, summary.kl_mean, summary.response_tokens) == (None,) * 4


def test_ties_count_half_and_dropped_pairs_are_left_out() -> None:
    result = compare(_scores(3.0, 1.0, 0.0, None, 2.0), _scores(1.0, 1.0, 5.0, 1.0, None))
    assert (result.wins, result.ties, result.losses, result.left_out) == (1, 1, 1, 2)
    assert result.win_rate == 0.5
    assert result.margin is not None
    assert result.margin.mean == -1.0
    json.dumps(result.to_json())


def test_pairs_are_matched_by_name_not_by_place() -> None:
    one = _scores(1.0, 2.0, 3.0)
    assert compare(one, _scores(0.0, 1.0, 2.0)[::-1]).win_rate == 1.0
    assert compare(one, one[::-1]).win_rate == 0.5


def test_different_samples_are_refused(pair: Any) -> None:
    with pytest.raises(ValueError, match=r"differing first in \[\(1, 0\)\]"):
        compare(_scores(1.0, 2.0), _scores(1.0))
    with pytest.raises(ValueError, match="repeated"):
        compare(_scores(1.0), _scores(1.0) * 2)
    with pytest.raises(ValueError, match="one KL a response"):
        summarize([pair("p", "x")[1]], _scores(1.0), [])


def test_spread() -> None:
    assert spread([]) is None
    single = spread([2.0])
    assert single is not None
    assert single.std == 0.0
    with pytest.raises(ValueError, match="found: nan at position 1"):
        spread([1.0, float("nan")])
