"""Pairs of which one side is the better: what a reward model scores both, how often it agrees, and one model against another."""

import json
import math
from collections.abc import Mapping, Sequence
from typing import Any

from raytrl.records.samples import PromptText
from raytrl.roles.models.rendering import as_messages
from raytrl.roles.paired import paired
from raytrl.roles.reward.call import Failure, Outcome, check_value
from raytrl.roles.reward.model import ModelSource, TooLong

Row = Mapping[str, Any]  # chosen, rejected, perhaps prompt, tools, chat_template_kwargs
Scores = tuple[Outcome, Outcome]  # of chosen and rejected
ALL = None  # the category that every row is in


class PairScorer:
    """A reward model that reads pairs as TRL's RewardTrainer does: each side whole, with its end."""

    def __init__(self, source: ModelSource, batch_size: int) -> None:
        """
        Args:
            batch_size: texts of a forward pass.
        """
        self._source, self._batch_size = source, batch_size

    def close(self) -> None:
        self._source.close()

    def answer(self, method: str, number: int, requests: Sequence[Row]) -> list[Scores]:
        """The scores of both sides of each row; where one has none, why."""
        ids = [self._source.whole_ids(text, options) for row in requests for text, options in sides(row)]
        order = sorted(range(len(ids)), key=lambda index: _length(ids[index]))  # texts of like length are padded least
        outcomes: dict[int, Outcome] = {}
        for start in range(0, len(order), self._batch_size):
            places = order[start : start + self._batch_size]
            values = self._source.scores([ids[place] for place in places])
            outcomes |= {place: check_value(value) for place, value in zip(places, values, strict=True)}
        return [(outcomes[2 * row], outcomes[2 * row + 1]) for row in range(len(requests))]


def _length(ids: list[int] | Failure) -> int:
    return 0 if isinstance(ids, Failure) else len(ids)


def sides(row: Row) -> list[tuple[PromptText, dict[str, Any]]]:
    """Chosen and rejected with the prompt before them, and what the chat template is given beside each."""
    tools = row.get("tools")
    options = {} if tools is None else {"tools": json.loads(tools) if isinstance(tools, str) else tools}
    options |= row.get("chat_template_kwargs") or {}
    prompt = row.get("prompt")
    if isinstance(row["chosen"], str):
        return [((prompt or "") + row[side], {}) for side in ("chosen", "rejected")]
    before = [] if prompt is None else as_messages(prompt)
    return [([*before, *as_messages(row[side])], options) for side in ("chosen", "rejected")]


def credit(scores: Scores) -> float | None:
    """1 where the chosen side has the higher score, half for a tie, 0 else; None where one side has none."""
    chosen, rejected = scores
    if not isinstance(chosen, float) or not isinstance(rejected, float):
        return None
    return 1.0 if chosen > rejected else 0.5 if chosen == rejected else 0.0


def summarize_pairs(scores: Sequence[Scores], categories: Sequence[str] | None) -> list[dict[str, Any]]:
    """A row for all pairs, the mean over them (micro), then one for each category, in the order of their names.

    Where there are categories, the first row has their unweighted mean, too (`macro`, `macro_stderr`).
    """
    rows = [{"category": ALL, **_summary(scores)}]
    if categories is not None:
        names = sorted(set(categories))
        parts = [_summary([each for each, of in zip(scores, categories, strict=True) if of == name]) for name in names]
        rows[0] |= _macro(parts)
        rows += [{"category": name, **part} for name, part in zip(names, parts, strict=True)]
    return rows


def _summary(scores: Sequence[Scores]) -> dict[str, Any]:
    earned = [found for each in scores if (found := credit(each)) is not None]
    margins = [a - b for a, b in scores if isinstance(a, float) and isinstance(b, float)]
    too_long = sum(any(isinstance(side, TooLong) for side in each) for each in scores)
    mean = math.fsum(earned) / len(earned) if earned else None
    return {
        "n": len(earned),
        "accuracy": mean,
        "stderr": _stderr(earned),
        "right": earned.count(1.0),
        "ties": earned.count(0.5),
        "wrong": earned.count(0.0),
        "margin": math.fsum(margins) / len(margins) if margins else None,
        "too_long": too_long,
        "unscored": len(scores) - len(earned) - too_long,
    }


def _stderr(values: Sequence[float]) -> float | None:
    """Of their mean; None for fewer than two."""
    if len(values) < 2:
        return None
    mean = math.fsum(values) / len(values)
    return math.sqrt(math.fsum((value - mean) ** 2 for value in values) / (len(values) - 1) / len(values))


def _macro(parts: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    known = [part for part in parts if part["accuracy"] is not None]
    errors = [part["stderr"] for part in known]
    if not known:
        return {"macro": None, "macro_stderr": None}
    spread = None if None in errors else math.sqrt(math.fsum(error**2 for error in errors)) / len(known)
    return {"macro": math.fsum(part["accuracy"] for part in known) / len(known), "macro_stderr": spread}


def compare_pairs(
    first: Sequence[Scores], second: Sequence[Scores], categories: Sequence[str] | None
) -> list[dict[str, Any]]:
    """First minus second, over the pairs that both have scored: a row for all pairs, then one for each category."""
    earned = [(credit(a), credit(b)) for a, b in zip(first, second, strict=True)]
    rows = [{"category": ALL, **_compared(earned)}]
    for name in sorted(set(categories or ())):
        part = [each for each, of in zip(earned, categories or (), strict=True) if of == name]
        rows.append({"category": name, **_compared(part)})
    return rows


def _compared(earned: Sequence[tuple[float | None, float | None]]) -> dict[str, Any]:
    both = [(a, b) for a, b in earned if a is not None and b is not None]
    found = paired([a for a, _ in both], [b for _, b in both]).to_json()
    return {**found, "left_out": len(earned) - len(both)}
