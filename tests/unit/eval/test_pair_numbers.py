"""Accuracies of pairs, by hand, and what results.json and its tables say beside them."""

import math
from pathlib import Path
from typing import Any

import pytest

from raytrl.config.load import load_run
from raytrl.config.runs.pairs import PairsRun
from raytrl.launch.runs.pairs import results_of
from raytrl.records.samples import Score
from raytrl.report.results import Section, sections
from raytrl.roles.reward.call import Failure
from raytrl.roles.reward.model import TooLong
from raytrl.roles.reward.pairs import compare_pairs, sides, summarize_pairs
from raytrl.roles.reward.summary import compare, summarize
from raytrl.versions import installed
from tests.runs import write_run_file

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


def _cells(section: Section, name: str) -> list[str]:
    return [row[section.head.index(name)] for row in section.cells]


@pytest.mark.parametrize(("limit", "shown"), [(None, ""), (6, " (limit)")])
def test_every_number_has_its_limit_and_how_it_was_found(limit: int | None, shown: str, tmp_path: Path) -> None:
    values: dict[str, Any] = {"kind": "eval", "name": "p", "model": {"path": "a"}, "compare": "b"}
    pairs = {"data": "x.jsonl", "category": "kind", "rows": limit, "resources": {"CPU": 1}}
    run = load_run(write_run_file(tmp_path, "p", values, {"pairs": pairs}), [], "eval").run
    assert isinstance(run, PairsRun)
    results, _ = results_of(run, {"kind": KINDS}, {"model": SCORES, "compare": [(1.0, 0.0)] * 6})
    assert {row["limit"] for row in [*results["pairs"], *results["comparison"]]} == {limit}
    assert {row["dtype"] for row in results["pairs"]} == {"float32"}
    assert [results[key]["dtype"] for key in ("model", "compare")] == ["float32"] * 2
    assert results["versions"] == installed(["transformers", "torch", "datasets"])
    first, second, compared = sections(results)
    assert _cells(first, "pairs") == [
        f"{count}{shown}" for count in (4, 4, 2, 2)
    ]  # the second: the mean of the categories
    assert [section.note for section in (first, second)] == ["float32"] * 2
    left_out = [f"{count}{shown} ({out} left out)" for count, out in ((4, 2), (2, 1), (2, 1))]
    assert _cells(compared, "pairs of both") == left_out


def test_a_comparison_of_documents_or_responses_says_what_is_left_out() -> None:
    model = {"path": "a", "engine": "vllm", "dtype": "float32", "chat": False, "cut": 0}
    row = {"task": "t", "metric": "acc", "filter": "none", "difference": 0.5, "stderr": None, "p": 1.0, "test": "x"}
    row |= {"better": 1, "worse": 0, "n": 1234, "limit": None, "left_out": 0}
    rows = [row, row | {"left_out": 3}, row | {"left_out": 3, "limit": 1237}]
    _, compared = sections({"model": model, "benchmarks": [], "comparison": rows})
    assert _cells(compared, "documents") == ["1,234", "1,234 (3 left out)", "1,234 (limit) (3 left out)"]

    summary = summarize([], []).to_json() | {"path": "a"}
    for left_out, shown in ((0, "1, 0, 0"), (2, "1, 0, 0 (2 left out)")):
        own = [Score(0, row, 0, None if row < left_out else 1.0, {}) for row in range(left_out + 1)]
        others = [Score(0, row, 0, 0.0, {}) for row in range(left_out + 1)]
        (table,) = sections({"model": summary, "comparison": compare(own, others).to_json()})
        assert ["  wins, ties, losses", shown, ""] in table.cells


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
