"""One call of a reward source: bounded in time, retried a bounded number of times, every value checked.

What comes out for a response is a finite float, `None` (the source says that it does not apply to this response, as in
TRL), or a `Failure` with the reason. Nothing here turns a failure into a number.
"""

import math
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple, Protocol, TypeVar

from raytrl.config.sections.reward import SourceSection
from raytrl.records.samples import Prompt, PromptText, Response
from raytrl.within import NotInTimeError

_FIRST_PAUSE_S = 0.25  # before the first retry; doubles with each
_LONGEST_PAUSE_S = 8.0
MODEL_BATCH_SIZE = 32

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


class AwayError(CallError):
    """Nobody answers at present: whoever it is restarts, drains, is moved or has too much to do."""

    def __init__(self, reason: str, after_s: float = 0.0) -> None:
        """`after_s`: when to come again, if it was said."""
        super().__init__(reason)
        self.after_s = after_s


class RewardSource(Protocol):
    """Something that scores responses. `call` may raise anything; `ask` judges what comes back."""

    section: SourceSection

    def call(self, pairs: Sequence[Pair]) -> Sequence[object]:
        """One value a response, in order, or a `Failure` in its place. Ends within `section.timeout_s`, or raises."""
        ...

    def close(self) -> None:
        """Release what the source holds. It may be called twice."""
        ...


def is_whole(response: Response) -> bool:
    """Whether all of it was said. A conversation that had no room for what came next has whole messages."""
    return response.ended or (response.episode is not None and response.episode.end != "length")


def completion_of(pair: Pair) -> PromptText:
    """A response as TRL hands it to reward functions: the text, or for a chat prompt its messages, of which there are several
    where tools were called."""
    prompt, response = pair
    if response.episode is not None:
        return list(response.episode.messages)
    if isinstance(prompt.text, str):
        return response.text
    return [{"role": "assistant", "content": response.text}]


class Asked(NamedTuple):
    """What a source that is sent texts is asked about a response."""

    prompt: PromptText
    completion: PromptText
    whole: bool

    @classmethod
    def of(cls, pair: Pair) -> "Asked":
        return cls(pair[0].text, completion_of(pair), is_whole(pair[1]))


def ask(source: RewardSource, pairs: Sequence[Pair]) -> list[Outcome]:
    """The outcome of every response, in order, asking in batches and again after a failure.

    At most `retries + 1` calls a batch, each at most `timeout_s` long, with pauses of 0.25 s, 0.5 s, ... 8 s between; and those
    that found nobody there, for `outage_s` at most.
    """
    size = batch_size(source.section, len(pairs))
    outcomes: list[Outcome] = []
    for start in range(0, len(pairs), size):
        outcomes += _ask_batch(source, pairs[start : start + size])
    return outcomes


def batch_size(section: SourceSection, count: int) -> int:
    """Of so many responses, how many a call is about."""
    return section.batch_size or (MODEL_BATCH_SIZE if section.kind == "model" else max(count, 1))


def longest_call_s(section: SourceSection, count: int) -> float:
    """What `ask` takes at most for so many responses: every call and pause of it."""
    pauses = sum(_pause_s(attempt) for attempt in range(1, section.retries + 1))
    outage = section.outage_s if section.kind == "url" else 0.0
    return -(-count // batch_size(section, count)) * ((section.retries + 1) * section.timeout_s + pauses + outage)


def _pause_s(attempt: int) -> float:
    """Before a call that is made again."""
    return min(_FIRST_PAUSE_S * 2.0 ** (attempt - 1), _LONGEST_PAUSE_S)


def _ask_batch(source: RewardSource, pairs: Sequence[Pair]) -> list[Outcome]:
    attempt, absences, gives_up = 0, 0, None
    while True:
        try:
            outcomes = _ask_once(source, pairs)
        except AwayError as error:
            gives_up = gives_up or time.monotonic() + source.section.outage_s
            left = gives_up - time.monotonic()
            if left <= 0:
                return [Failure(f"{error}; and so for {source.section.outage_s:g} s (outage_s)", retry=False)] * len(
                    pairs
                )
            absences += 1
            time.sleep(min(max(error.after_s, _pause_s(absences)), left))
            continue
        attempt += 1
        if attempt > source.section.retries or not any(_may_change(outcome) for outcome in outcomes):
            return outcomes
        time.sleep(_pause_s(attempt))


def _may_change(outcome: Outcome) -> bool:
    return isinstance(outcome, Failure) and outcome.retry


def _ask_once(source: RewardSource, pairs: Sequence[Pair]) -> list[Outcome]:
    """Raises AwayError."""
    try:
        values = source.call(pairs)
    except AwayError:
        raise
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
