"""Two models on the same documents of each task."""

import math
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from raytrl.errors import RunError
from raytrl.functions import describe_raised
from raytrl.roles.paired import paired

Row = dict[str, Any]
Aggregate = Callable[[list[Any]], float]
Key = tuple[str, str, str]  # task, metric, filter
SWAPS = "swaps of the models' answers"
_BLOCKS, _DRAWS = 200, 999  # documents are put into so many blocks for the jackknife; so many swaps
_FEWER_BLOCKS, _FEWER_DRAWS = 50, 99
_SLOW = frozenset({"bleu", "chrf", "ter"})  # of a thousand documents one such aggregate takes a third of a second


@dataclass(frozen=True)
class Column:
    """What both models reached on one metric of a task, document by document in the same order."""

    key: Key
    first: list[Any]
    second: list[Any]
    aggregate: Aggregate
    higher_is_better: bool | None  # None: the task does not say
    is_mean: bool

    def of_numbers(self) -> tuple[list[float], list[float]]:
        """Of the documents where both are finite."""
        both = [(float(a), float(b)) for a, b in zip(self.first, self.second, strict=True)]
        kept = [pair for pair in both if all(map(math.isfinite, pair))]
        return [a for a, _ in kept], [b for _, b in kept]


def compared(
    loaded: Mapping[str, Any],
    first: Mapping[str, Any],
    second: Mapping[str, Any],
    tell: Callable[[int, int], None] = lambda done, of: None,
) -> list[Row]:
    """A row for each task, or group of tasks, and metric: first minus second.

    A metric that is a mean over documents is compared by `paired`. One that is not (perplexity, F1) by its value over all:
    its error by the jackknife that leaves out a block of documents at a time (Efron 1982, chapter 3), its p by 999 random
    swaps of the two models' answers to each document; fewer of both where an aggregate is slow. A group is compared where
    it is a mean of such means: by the documents of all its tasks, weighted as it weights them.

    Args:
        loaded: the tasks and groups.
        first, second: by `measure`, of two models.
        tell: hears how many of how many comparisons are done.

    Raises:
        RunError: they were not asked about the same documents.
    """
    columns = {
        column.key: column for name, task in loaded["tasks"].items() for column in _of_task(name, task, first, second)
    }
    rows = dict[Key, Row]()
    for column in columns.values():
        tell(len(rows), len(columns))
        rows[column.key] = _row(column)
    groups = [row for group in loaded["groups"].values() for row in _of_group(group, columns, rows)]
    return [*rows.values(), *groups]


def _of_task(name: str, task: Any, first: Mapping[str, Any], second: Mapping[str, Any]) -> Iterator[Column]:
    from lm_eval.api.metrics import mean

    own, others = _by_document(first["samples"][name]), _by_document(second["samples"][name])
    _refuse_others(name, own, others)
    aggregates, directions = task.aggregation(), task.higher_is_better()
    for filtered, metric in dict.fromkeys(
        (key[0], metric) for key, sample in own.items() for metric in sample["metrics"]
    ):
        keys = [key for key in own if key[0] == filtered and metric in own[key] and metric in others[key]]
        values = [own[key][metric] for key in keys], [others[key][metric] for key in keys]
        aggregate: Aggregate = aggregates.get(metric, mean)
        is_mean = aggregate is mean and all(_is_number(value) for side in values for value in side)
        yield Column((name, metric, filtered), *values, aggregate, directions.get(metric), is_mean)


def _by_document(samples: Sequence[Mapping[str, Any]]) -> dict[tuple[str, int], Mapping[str, Any]]:
    return {(str(sample["filter"]), int(sample["doc_id"])): sample for sample in samples}


def _refuse_others(
    name: str, own: Mapping[tuple[str, int], Mapping[str, Any]], others: Mapping[tuple[str, int], Mapping[str, Any]]
) -> None:
    odd = sorted(own.keys() ^ others.keys())
    odd = odd or [key for key in own if own[key]["doc_hash"] != others[key]["doc_hash"]]
    if odd:
        raise RunError(
            f"benchmark: {name}: the two models were not asked about the same documents; found: document {odd[0][1]} differs; "
            f"expected: the same ids with the same content"
        )


def _is_number(value: Any) -> bool:
    return isinstance(value, bool | int | float | np.integer | np.floating | np.bool_)


def _row(column: Column) -> Row:
    task, metric, filtered = column.key
    row = {"task": task, "metric": metric, "filter": filtered, "is_group": False}
    if not column.is_mean:
        return row | {"n": len(column.first), "left_out": 0, "better": None, "worse": None, **_of_aggregates(column)}
    values = column.of_numbers()
    return row | {"left_out": len(column.first) - len(values[0]), **_of_means(*values, column.higher_is_better)}


def _of_means(first: list[float], second: list[float], higher_is_better: bool | None) -> Row:
    found = paired(first, second)
    better, worse = (found.lower, found.higher) if higher_is_better is False else (found.higher, found.lower)
    return {
        "n": found.n,
        "difference": found.difference,
        "stderr": found.stderr,
        "p": found.p,
        "test": found.test,
        "better": None if higher_is_better is None else better,
        "worse": None if higher_is_better is None else worse,
    }


def _of_group(group: Any, columns: Mapping[Key, Column], rows: Mapping[Key, Row]) -> Iterator[Row]:
    times = Counter(task.task_name for task in group.get_all_tasks())  # a task may be in several of its groups
    for said in group.aggregate_metric_list or ():
        for filtered in dict.fromkeys(key[2] for key in columns if key[0] in times and key[1] == said.metric):
            mine = [columns[name, said.metric, filtered] for name in times if (name, said.metric, filtered) in columns]
            is_wanted = said.filter_list is None or filtered in said.filter_list
            if is_wanted and said.aggregation == "mean" and all(column.is_mean for column in mine):
                counts = [times[column.key[0]] for column in mine]
                row = _of_means_of_tasks(mine, [rows[column.key] for column in mine], counts, said.weight_by_size)
                yield {"task": group.name, "metric": said.metric, "filter": filtered, "is_group": True} | row


def _of_means_of_tasks(
    columns: Sequence[Column], rows: Sequence[Row], counts: Sequence[int], weight_by_size: bool
) -> Row:
    """Differences of the tasks are weighted as the group weights their values, and so are their errors: tasks share no
    documents.

    Args:
        counts: how often each task is in the group.
    """
    values = [column.of_numbers() for column in columns]
    sizes, left_out = [len(first) for first, _ in values], sum(row["left_out"] for row in rows)
    if not all(sizes):  # without one of its tasks there is no value of the group
        return {"left_out": left_out, **_of_means([], [], None)}
    shares = [count * (size if weight_by_size else 1) for count, size in zip(counts, sizes, strict=True)]
    weights = [share / sum(shares) for share in shares]
    if weight_by_size and set(counts) == {1}:
        scales = [1.0] * len(sizes)  # exactly: right and wrong stay 1 and 0
    else:  # so that the plain mean over all documents is the group's
        scales = [weight * sum(sizes) / size for weight, size in zip(weights, sizes, strict=True)]
    first, second = (
        [value * scale for pair, scale in zip(values, scales, strict=True) for value in pair[side]] for side in (0, 1)
    )
    directions = {column.higher_is_better for column in columns}
    errors = [row["stderr"] for row in rows]
    return {
        "left_out": left_out,
        **_of_means(first, second, directions.pop() if len(directions) == 1 else None),
        "stderr": None if None in errors else math.hypot(*(w * e for w, e in zip(weights, errors, strict=True))),
    }


def _of_aggregates(column: Column) -> Row:
    """Where an aggregate cannot be made of a part of the documents: the difference alone, and why."""
    aggregate, first, second = column.aggregate, column.first, column.second
    slow = getattr(aggregate, "__name__", "") in _SLOW
    row: Row = {"difference": None, "stderr": None, "p": None, "test": ""}
    try:
        difference = float(aggregate(first)) - float(aggregate(second))
        if math.isfinite(difference):
            row["difference"] = difference
            row["stderr"] = _jackknife(aggregate, first, second, _FEWER_BLOCKS if slow else _BLOCKS)
            row["p"] = _by_swaps(aggregate, first, second, difference, _FEWER_DRAWS if slow else _DRAWS)
            row["test"] = SWAPS if row["p"] is not None else ""
    except Exception as error:  # an aggregate may be somebody's own
        row["problem"] = describe_raised(error)
    return row


def _by_swaps(aggregate: Aggregate, first: list[Any], second: list[Any], difference: float, draws: int) -> float | None:
    """None where a swap has no value."""
    drawn, as_large = np.random.default_rng(0), 0
    least = abs(difference) - 1e-12 * max(1.0, abs(float(aggregate(first))))  # sums in another order
    for swaps in drawn.integers(0, 2, (draws, len(first))):
        mixed = [(b, a) if swap else (a, b) for a, b, swap in zip(first, second, swaps, strict=True)]
        found = float(aggregate([a for a, _ in mixed])) - float(aggregate([b for _, b in mixed]))
        if not math.isfinite(found):
            return None
        as_large += abs(found) >= least
    return (1 + as_large) / (1 + draws)


def _jackknife(aggregate: Aggregate, first: list[Any], second: list[Any], most: int) -> float | None:
    n = len(first)
    blocks = min(most, n)
    if blocks < 2:
        return None
    found = []
    for block in range(blocks):
        kept = [index for index in range(n) if index % blocks != block]
        found.append(float(aggregate([first[i] for i in kept])) - float(aggregate([second[i] for i in kept])))
    if not all(map(math.isfinite, found)):
        return None
    middle = math.fsum(found) / blocks
    return math.sqrt((blocks - 1) / blocks * math.fsum((value - middle) ** 2 for value in found))
