"""Example reward functions: plain Python in TRL's convention, named in a run file as `configs/rewards.py:brevity`.

A function is called with the keywords `prompts`, `completions`, `completion_ids` and every other column of the dataset,
each a list with one entry a response, and returns one finite number a response. `None` means "this source does not
apply to this response": it is left out of the weighted sum.
"""

from collections.abc import Sequence
from difflib import SequenceMatcher
from typing import Any


def brevity(completions: Sequence[Any], **columns: Any) -> list[float]:
    """0 for an empty completion, falling by 1 with every 20 words."""
    return [-len(_text(completion).split()) / 20 for completion in completions]


def closer_to_chosen(
    completions: Sequence[Any], chosen: Sequence[Any], rejected: Sequence[Any], **columns: Any
) -> list[float | None]:
    """How much more a completion resembles the row's preferred answer than its rejected one: -1 to 1.

    Rows of a dataset that have no preference (an empty `chosen` or `rejected`) are not judged.
    """
    return [
        _likeness(completion, good) - _likeness(completion, bad) if good and bad else None
        for completion, good, bad in zip(completions, chosen, rejected, strict=True)
    ]


def _text(completion: Any) -> str:
    """A completion is a string, or in a conversational dataset a list with one assistant message."""
    return completion if isinstance(completion, str) else str(completion[-1]["content"])


def _likeness(completion: Any, answer: Any) -> float:
    return SequenceMatcher(None, _text(completion).split(), _text(answer).split(), autojunk=False).ratio()
