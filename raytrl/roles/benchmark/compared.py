"""Two models on the same documents of each task."""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from raytrl.errors import RunError
from raytrl.roles.paired import paired

Row = dict[str, Any]
Aggregate = Callable[[list[Any]], float]
SWAPS = "swaps of the models' answers"
_BLOCKS = 200  # that documents are put into for the jackknife
_DRAWS = 999


def compared(loaded: Mapping[str, Any], first: Mapping[str, Any], second: Mapping[str, Any]) -> list[Row]:
    """A row for each task and metric: first minus second.

    A metric that is a mean over documents is compared by `paired`. One that is not (perplexity, F1) by its value over all:
    its error by the jackknife that leaves out a block of documents at a time (Efron 1982, chapter 3), its p by 999 random
    swaps of the two models' answers to each document.

    Args:
        loaded: the tasks.
        first, second: by `measure`, of two models.

    Raises:
        RunError: they were not asked about the same documents.
    """
    return [row for name, task in loaded["tasks"].items() for row in _of_task(name, task, first, second)]


def _of_task(name: str, task: Any, first: Mapping[str, Any], second: Mapping[str, Any]) -> Iterator[Row]:
    from lm_eval.api.metrics import mean

    own, others = _by_document(first["samples"][name]), _by_document(second["samples"][name])
    _refuse_others(name, own, others)
    columns = dict.fromkeys((key[0], metric) for key, sample in own.items() for metric in sample["metrics"])
    for filtered, metric in columns:
        keys = [key for key in own if key[0] == filtered and metric in own[key] and metric in others[key]]
        values = [own[key][metric] for key in keys], [others[key][metric] for key in keys]
        aggregate: Aggregate = task.aggregation().get(metric, mean)
        is_better = bool(task.higher_is_better().get(metric, True))
        row = {"task": name, "metric": metric, "filter": filtered, "left_out": 0}
        if aggregate is mean and all(_is_number(value) for side in values for value in side):
            finite = [pair for pair in zip(*values, strict=True) if all(map(math.isfinite, map(float, pair)))]
            found = paired([float(pair[0]) for pair in finite], [float(pair[1]) for pair in finite])
            better, worse = (found.higher, found.lower) if is_better else (found.lower, found.higher)
            numbers = {"n": found.n, "difference": found.difference, "stderr": found.stderr, "p": found.p}
            row["left_out"] = len(keys) - len(finite)
            yield row | numbers | {"test": found.test, "better": better, "worse": worse}
        else:
            yield row | {"n": len(keys), **_of_aggregates(aggregate, *values), "better": None, "worse": None}


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


def _of_aggregates(aggregate: Aggregate, first: list[Any], second: list[Any]) -> Row:
    n = len(first)
    try:
        difference = float(aggregate(first)) - float(aggregate(second))
        stderr = _jackknife(aggregate, first, second)
        drawn, as_large = np.random.default_rng(0), 0
        for swaps in drawn.integers(0, 2, (_DRAWS, n)):
            mixed = [(b, a) if swap else (a, b) for a, b, swap in zip(first, second, swaps, strict=True)]
            found = float(aggregate([a for a, _ in mixed])) - float(aggregate([b for _, b in mixed]))
            as_large += abs(found) >= abs(difference) * (1 - 1e-12)
    except (ArithmeticError, TypeError, ValueError):  # an aggregate of somebody's own
        return {"difference": None, "stderr": None, "p": None, "test": ""}
    numbers = (difference, stderr, (1 + as_large) / (1 + _DRAWS))
    known = [value if value is not None and math.isfinite(value) else None for value in numbers]
    return {"difference": known[0], "stderr": known[1], "p": known[2], "test": SWAPS}


def _jackknife(aggregate: Aggregate, first: list[Any], second: list[Any]) -> float | None:
    n = len(first)
    blocks = min(_BLOCKS, n)
    if blocks < 2:
        return None
    found = []
    for block in range(blocks):
        kept = [index for index in range(n) if index % blocks != block]
        found.append(float(aggregate([first[i] for i in kept])) - float(aggregate([second[i] for i in kept])))
    middle = math.fsum(found) / blocks
    return math.sqrt((blocks - 1) / blocks * math.fsum((value - middle) ** 2 for value in found))
