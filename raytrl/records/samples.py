"""Prompts, responses and scores, as they cross from process to process: frozen, picklable, no tensors, no models.

A response is named by (step, row, sample): `row` counts the prompts of that step's global batch, `sample` the
responses of one prompt. Nothing else identifies it, so it may be made by any rollout actor, in any order.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import groupby
from typing import Any, NamedTuple

Message = Mapping[str, Any]


PromptText = str | list[Message]


class Attempt(NamedTuple):
    """One life of a run's learner group; actors that several runs share serve the newest attempt of each."""

    run: str
    number: int  # upwards


@dataclass(frozen=True, slots=True)
class Prompt:
    """One prompt of a step's global batch."""

    step: int
    row: int
    text: PromptText  # as in the dataset: a string, or a list of chat messages
    token_ids: tuple[int, ...]  # chat template applied, truncated, no padding
    columns: Mapping[str, Any] = field(default_factory=dict)  # the dataset's other columns, for reward functions


@dataclass(frozen=True, slots=True)
class Response:
    """One sampled response; `token_ids` holds the sampled tokens, the end token included."""

    step: int
    row: int
    sample: int
    token_ids: tuple[int, ...]
    text: str  # decoded, special tokens and a stop string removed: what reward sources read
    ended: bool  # an end token or a stop string was sampled; False: cut at max_new_tokens
    sampling_logprobs: tuple[float, ...]  # the engine's own, one a token; NaN where it gave none
    policy_version: int  # updates done when it was sampled

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> "Response":
        """From what `dataclasses.asdict` made of it, through JSON."""
        tuples = {name: tuple(values[name]) for name in ("token_ids", "sampling_logprobs")}
        return cls(**{**values, **tuples})


@dataclass(frozen=True, slots=True)
class Score:
    """The weighted sum over all reward sources for one response; `None` means dropped, never zero."""

    step: int
    row: int
    sample: int
    value: float | None
    by_source: Mapping[str, float | None]


def sample_row(prompt: Prompt, response: Response, score: Score, **more: Any) -> dict[str, Any]:
    """One line of samples.jsonl; `more` comes first."""
    return {
        **more,
        "row": response.row,
        "sample": response.sample,
        "prompt": prompt.text,
        "response": response.text,
        "ended": response.ended,
        "tokens": len(response.token_ids),
        "score": score.value,
        "scores": dict(score.by_source),
    }


def chunks(prompts: Sequence[Prompt], chunk_prompts: int) -> list[list[Prompt]]:
    """Prompts grouped by `row // chunk_prompts`, in order of rows.

    A chunk is sampled as one batch by one actor. It follows from the step's rows alone, so the same prompts share a
    batch however many actors there are: the bits of a matrix product depend on what shares its batch. A learner
    worker's share should hold whole chunks.
    """
    ordered = sorted(prompts, key=lambda prompt: prompt.row)
    return [list(group) for _, group in groupby(ordered, key=lambda prompt: prompt.row // chunk_prompts)]
