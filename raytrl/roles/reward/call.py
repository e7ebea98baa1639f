"""One call of a reward source: bounded in time, retried a bounded number of times, every value checked.

What comes out for a response is a finite float, `None` (the source says that it does not apply to this response, as in
TRL), or a `Failure` with the reason. Nothing here turns a failure into a number.
"""

import math
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol, TypeVar

from raytrl.config.sections.reward import SourceSection
from raytrl.records.samples import Prompt, PromptText, Response
from raytrl.within import NotInTimeError

_FIRST_PAUSE_S = 0.25  # before the first retry; doubles with each
_LONGEST_PAUSE_S = 8.0
_MODEL_BATCH_SIZE = 32

Pair = tuple[Prompt, Response]
Answer = TypeVar("Answer")


@dataclass(frozen=True, slots=True)
class Failure:
    """Why a source has no score for one response."""

    reason: str
    retry: bool = True  # False: asking again cannot change it


Outcome = float | None | Failure


class CallError(Exception):
    """A call failed; the text is the whole reason."""


class FinalError(CallError):
    """A call failed in a way that asking again cannot change."""


class RewardSource(Protocol):
    """Something that scores responses. `call` may raise anything; `ask` judges what comes back."""

    section: SourceSection

    def call(self, pairs: Sequence[Pair]) -> Sequence[object]:
        """One value a response, in order, or a `Failure` in its place. Ends within `section.timeout_s`, or raises."""
        ...

    def close(self) -> None:
        """Release what the source holds. It may be called twice."""
        ...


def completion_of(pair: Pair) -> PromptText:
    """A response as TRL hands it to reward functions: the text, or for a chat prompt its messages, of which there are several
    where tools were called."""
    prompt, response = pair
    if response.episode is not None:
        return list(response.episode.messages)
    if isinstance(prompt.text, str):
        return response.text
    return [{"role": "assistant", "content": response.text}]


def ask(source: RewardSource, pairs: Sequence[Pair]) -> list[Outcome]:
    """The outcome of every response, in order, asking in batches and again after a failure.

    At most `retries + 1` calls a batch, each at most `timeout_s` long, with pauses of 0.25 s, 0.5 s, ... 8 s between.
    """
    size = batch_size(source.section, len(pairs))
    outcomes: list[Outcome] = []
    for start in range(0, len(pairs), size):
        outcomes += _ask_batch(source, pairs[start : start + size])
    return outcomes


def batch_size(section: SourceSection, count: int) -> int:
    """Of so many responses, how many a call is about."""
    return section.batch_size or (_MODEL_BATCH_SIZE if section.kind == "model" else max(count, 1))


def longest_call_s(section: SourceSection, count: int) -> float:
    """What `ask` takes at most for so many responses: every call and pause of it."""
    pauses = sum(_pause_s(attempt) for attempt in range(1, section.retries + 1))
    return -(-count // batch_size(section, count)) * ((section.retries + 1) * section.timeout_s + pauses)


def _pause_s(attempt: int) -> float:
    """Before a call that is made again."""
    return min(_FIRST_PAUSE_S * 2.0 ** (attempt - 1), _LONGEST_PAUSE_S)


def _ask_batch(source: RewardSource, pairs: Sequence[Pair]) -> list[Outcome]:
    outcomes: list[Outcome] = []
    for attempt in range(source.section.retries + 1):
        if attempt:
            time.sleep(_pause_s(attempt))
        outcomes = _ask_once(source, pairs)
        if not any(isinstance(outcome, Failure) and outcome.retry for outcome in outcomes):
            break
    return outcomes


def _ask_once(source: RewardSource, pairs: Sequence[Pair]) -> list[Outcome]:
    try:
        values = source.call(pairs)
    except (CallError, NotInTimeError) as error:
        return [Failure(str(error), retry=not isinstance(error, FinalError))] * len(pairs)
    except Exception as error:
        return [Failure(f"raised {type(error).__name__}: {error}")] * len(pairs)
    if len(values) != len(pairs):
        return [Failure(f"returned {len(values)} scores for {len(pairs)} responses")] * len(pairs)
    return [check_value(value) for value in values]


def check_value(value: object) -> Outcome:
    """The value as a finite float, `None` as it is, anything else as a `Failure` that shows it."""
    if value is None or isinstance(value, Failure):
        return value
    if isinstance(value, bool) or not isinstance(value, int | float):
        return Failure(f"returned {value!r:.200} (a {type(value).__name__}), not a number")
    try:
        number = float(value)
    except OverflowError:
        return Failure("returned an integer too large for a float")
    return number if math.isfinite(number) else Failure(f"returned {number}, not a finite number")
