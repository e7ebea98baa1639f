"""Accuracies of pairs, by hand."""

import math

import pytest

from raytrl.roles.reward.call import Failure
from raytrl.roles.reward.model import TooLong
from raytrl.roles.reward.pairs import compare_pairs, sides, summarize_pairs

LONG, ODD = TooLong("600 tokens", retry=False), Failure("returned nan")
SCORES = [(2.0, 1.0), (0.0, 1.0), (1.0, 1.0), (3.0, 1.0), (LONG, 0.0), (0.0, ODD)]
KINDS = ["a", "a", "b", "b", "b", "a"]


def test_ties_are_half_and_what_has_no_score_is_apart() -> None:
    both, a, b = summarize_pairs(SCORES, KINDS)
    assert (both["category"], a["category"], b["category"]) == (None, "a", "b")
    assert {key: both[key] for key in ("n", "right", "ties", "wrong", "too_long", "unscored")} == {
        "n": 4,
        "right": 2,
        "ties": 1,
        "wrong": 1,
        "too_long": 1,
        "unscored": 1,
    }
    assert both["accuracy"] == 2.5 / 4
    assert both["stderr"] == pytest.approx(math.sqrt((2 * 0.375**2 + 0.625**2 + 0.125**2) / 3 / 4))
    assert both["margin"] == (1 - 1 + 0 + 2) / 4
    assert (a["accuracy"], b["accuracy"], both["macro"]) == (0.5, 0.75, 0.625)
    assert both["macro_stderr"] == pytest.approx(math.hypot(a["stderr"], b["stderr"]) / 2)


def test_nothing_scored_is_none_not_zero() -> None:
    (row,) = summarize_pairs([(LONG, LONG)], None)
    assert (row["accuracy"], row["stderr"], row["margin"], row["n"]) == (None, None, None, 0)
    assert summarize_pairs([(LONG, LONG)], ["a"])[0]["macro"] is None


def test_two_models_on_the_pairs_that_both_scored() -> None:
    other = [(0.0, 1.0), (0.0, 1.0), (1.0, 0.0), (0.0, 1.0), (1.0, 0.0), (1.0, 0.0)]
    both, a, b = compare_pairs(SCORES, other, KINDS)
    assert (both["n"], both["left_out"], both["higher"], both["lower"]) == (4, 2, 2, 1)
    assert both["difference"] == (1 + 0 - 0.5 + 1) / 4
    assert (a["n"], b["n"], b["left_out"]) == (2, 2, 1)


def test_a_side_is_the_prompt_and_all_that_follows() -> None:
    assert sides({"chosen": "a", "rejected": "b"}) == [("a", {}), ("b", {})]
    assert sides({"prompt": "p ", "chosen": "a", "rejected": "b"})[1] == ("p b", {})
    row = {
        "prompt": [{"role": "user", "content": "p"}],
        "chosen": [{"from": "gpt", "value": "a"}],
        "rejected": [{"role": "assistant", "content": "b"}],
        "tools": "[]",
    }
    (first, options), _ = sides(row)
    assert first == [{"role": "user", "content": "p"}, {"role": "gpt", "content": "a"}]
    assert options == {"tools": []}
