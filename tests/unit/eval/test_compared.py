"""Two models on the same documents: which is the better, by how much, and groups of tasks."""

import math
from types import SimpleNamespace
from typing import Any

import pytest
from lm_eval.api.group import Group
from lm_eval.api.metrics import mean
from lm_eval.config.group import AggMetricConfig

from raytrl.roles.benchmark.compared import SWAPS, compared
from raytrl.roles.paired import SIGN_TEST, paired


def task(name: str, aggregate: Any = mean, **directions: bool | None) -> Any:
    return SimpleNamespace(
        task_name=name, aggregation=lambda: dict.fromkeys(directions, aggregate), higher_is_better=lambda: directions
    )


def answers(metric: str, *values: Any) -> list[dict[str, Any]]:
    return [
        {"filter": "none", "doc_id": doc, "doc_hash": f"{doc}", "metrics": [metric], metric: value}
        for doc, value in enumerate(values)
    ]


def rows_of(tasks: list[Any], first: list[Any], second: list[Any], groups: Any = ()) -> list[dict[str, Any]]:
    names = [each.task_name for each in tasks]
    loaded = {"tasks": dict(zip(names, tasks, strict=True)), "groups": {group.name: group for group in groups}}
    sides = [{"samples": dict(zip(names, side, strict=True))} for side in (first, second)]
    return compared(loaded, *sides)


@pytest.mark.parametrize(("is_better", "counts"), [(True, (3, 1)), (False, (1, 3)), (None, (None, None))])
def test_better_is_what_the_task_says(is_better: bool | None, counts: Any) -> None:
    """And nothing is, where it says nothing."""
    (row,) = rows_of(
        [task("a", quality=is_better)], [answers("quality", 3, 4, 5, 0, 1)], [answers("quality", 1, 2, 3, 1, 1)]
    )
    assert (row["better"], row["worse"]) == counts
    assert (row["difference"], row["n"]) == (1.0, 5)


def test_what_the_task_does_not_name_is_neither() -> None:
    (row,) = rows_of([task("a")], [answers("loss", 3, 4)], [answers("loss", 1, 2)])
    assert (row["difference"], row["better"], row["worse"]) == (2.0, None, None)


def test_of_no_number_there_is_no_p() -> None:
    def spread(values: list[float]) -> float:
        return math.nan if len(set(values)) == 1 else max(values) - min(values)

    (row,) = rows_of([task("a", spread, m=True)], [answers("m", 2, 2, 2)], [answers("m", 1, 2, 3)])
    assert [row[key] for key in ("difference", "stderr", "p", "test")] == [None, None, None, ""]
    (row,) = rows_of([task("a", spread, m=True)], [answers("m", 3, 1)], [answers("m", 1, 2)])  # some swaps have none
    assert [row[key] for key in ("difference", "stderr", "p", "test")] == [1.0, None, None, ""]


def test_a_large_group_of_right_and_wrong_keeps_the_exact_test(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever the sizes of its tasks divide to."""
    sizes = next((size, 14042 - size) for size in range(1, 300) if size / 14042 * 14042 / size != 1)
    tasks = [task("a", acc=True), task("b", acc=True)]
    group = Group("both", aggregate_metric_list=[AggMetricConfig("acc")])
    monkeypatch.setattr(group, "get_all_tasks", lambda: tasks)
    sides = [[answers("acc", *([value] * size)) for size in sizes] for value in (1, 0)]
    *_, row = rows_of(tasks, *sides, [group])
    assert (row["test"], row["n"], row["better"]) == (SIGN_TEST, 14042, 14042)


@pytest.mark.parametrize("weight_by_size", [True, False])
def test_a_group_without_a_value_of_a_task_has_none(monkeypatch: pytest.MonkeyPatch, weight_by_size: bool) -> None:
    tasks = [task("a", acc=True), task("b", acc=True)]
    group = Group("both", aggregate_metric_list=[AggMetricConfig("acc", None, "mean", weight_by_size)])
    monkeypatch.setattr(group, "get_all_tasks", lambda: tasks)
    first = [answers("acc", 1, 0, 1), answers("acc", math.nan, math.nan)]
    one, two, row = rows_of(tasks, first, [answers("acc", 0, 0, 1), answers("acc", 1, 0)], [group])
    assert one["difference"] == pytest.approx(1 / 3) and two["difference"] is None
    assert (row["difference"], row["stderr"], row["p"], row["left_out"]) == (None, None, None, 2)


def test_a_task_that_is_twice_in_a_group_weighs_twice_and_is_no_more_documents(monkeypatch: pytest.MonkeyPatch) -> None:
    tasks = [task("a", acc=True), task("b", acc=True)]
    group = Group("both", aggregate_metric_list=[AggMetricConfig("acc", None, "mean", False)])
    monkeypatch.setattr(group, "get_all_tasks", lambda: [*tasks, tasks[0]])
    first, second = (
        [answers("acc", 1, 1, 0, 1), answers("acc", 1, 0)],
        [answers("acc", 0, 1, 0, 0), answers("acc", 0, 1)],
    )
    one, two, row = rows_of(tasks, first, second, [group])
    assert row["difference"] == pytest.approx((2 * one["difference"] + two["difference"]) / 3)
    assert row["stderr"] == pytest.approx(math.hypot(2 * one["stderr"], two["stderr"]) / 3)
    assert row["n"] == 6


def grouped(monkeypatch: pytest.MonkeyPatch, weight_by_size: bool) -> list[dict[str, Any]]:
    tasks = [task("a", acc=True), task("b", acc=True)]
    group = Group("both", aggregate_metric_list=[AggMetricConfig("acc", None, "mean", weight_by_size)])
    monkeypatch.setattr(group, "get_all_tasks", lambda: tasks)
    first = [answers("acc", 1, 1, 1, 0, 1, 1), answers("acc", 1, 0)]
    second = [answers("acc", 0, 0, 1, 0, 1, 0), answers("acc", 0, 1)]
    return rows_of(tasks, first, second, [group])


def test_a_group_weighted_by_size_is_all_its_documents(monkeypatch: pytest.MonkeyPatch) -> None:
    *_, row = grouped(monkeypatch, True)
    expected = paired([1, 1, 1, 0, 1, 1, 1, 0], [0, 0, 1, 0, 1, 0, 0, 1])
    assert (row["task"], row["is_group"], row["n"], row["test"]) == ("both", True, 8, SIGN_TEST)
    assert (row["difference"], row["p"], row["better"], row["worse"]) == (expected.difference, expected.p, 4, 1)


def test_a_group_of_equal_tasks_is_the_mean_of_their_differences(monkeypatch: pytest.MonkeyPatch) -> None:
    one, two, row = grouped(monkeypatch, False)
    assert row["difference"] == pytest.approx((one["difference"] + two["difference"]) / 2)
    assert row["stderr"] == pytest.approx(math.hypot(one["stderr"], two["stderr"]) / 2)
    assert 0 < row["p"] < 1 and row["n"] == 8


def test_an_aggregate_that_cannot_take_a_part_says_so() -> None:
    def all_of_them(values: list[Any]) -> float:
        if len(values) != 4:
            raise LookupError("four, please")
        return float(sum(values))

    (row,) = rows_of([task("a", all_of_them, own=True)], [answers("own", 1, 2, 3, 4)], [answers("own", 1, 2, 3, 3)])
    assert (row["difference"], row["stderr"], row["p"], row["test"]) == (1.0, None, None, "")
    assert row["problem"].startswith("LookupError: four, please (test_compared.py:")


def test_slow_aggregates_are_made_less_often() -> None:
    calls = {"bleu": 0, "median": 0}

    def of(name: str) -> Any:
        def aggregate(values: list[Any]) -> float:
            calls[name] += 1
            return sorted(values)[len(values) // 2]

        aggregate.__name__ = name
        return aggregate

    for name in calls:
        (row,) = rows_of([task("a", of(name), m=True)], [answers("m", *range(300))], [answers("m", *range(5, 305))])
        assert row["test"] == SWAPS and row["difference"] == -5
    assert 200 < calls["bleu"] < 400 < 2000 < calls["median"]
