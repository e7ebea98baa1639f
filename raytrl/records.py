"""The typed records that cross a process boundary: frozen, picklable, no tensors, no models.

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
    sampling_logprobs: tuple[float, ...]  # the engine's own, one a token
    policy_version: int  # updates done when it was sampled


@dataclass(frozen=True, slots=True)
class Score:
    """The weighted sum over all reward sources for one response; `None` means dropped, never zero."""

    step: int
    row: int
    sample: int
    value: float | None
    by_source: Mapping[str, float | None]


@dataclass(frozen=True, slots=True)
class Progress:
    """What rank 0 of a learner tells the driver on its way (and any rank, for `failure`)."""

    kind: (
        str  # phase | notice | start | step | eval | checkpoint | done | failure; earlier: of a step before this start
    )
    step: int = 0
    total_steps: int = 0
    text: str = ""  # phase: what is being done; notice: what to know; failure: rank, node and cause
    metrics: Mapping[str, float] = field(default_factory=dict)
    details: str = ""  # failure: the traceback
    final: bool = False  # failure: a restart would fail the same way
    samples: tuple[Mapping[str, Any], ...] = ()  # step: rows for samples.jsonl


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


@dataclass(frozen=True)
class Trial:
    """One trial of a sweep, as trials.json and the tables show it."""

    name: str  # its run directory is <sweep>/trials/<name>
    values: Mapping[str, Any]  # of the searched keys
    state: str = "waiting"  # waiting | running | done | over limit | stopped | failed
    cause: str = ""  # over limit, stopped, failed: why
    step: int = 0
    metrics: Mapping[str, float] = field(default_factory=dict)  # last values of the metrics that a sweep looks at
    seconds: float = 0.0  # from its first start to its end, waiting for Ray included

    @property
    def is_ended(self) -> bool:
        """Whether its part in the sweep is over; a failed trial is tried again when the sweep is started again."""
        return self.state not in ("waiting", "running")


def chunks(prompts: Sequence[Prompt], chunk_prompts: int) -> list[list[Prompt]]:
    """Prompts grouped by `row // chunk_prompts`, in order of rows.

    A chunk is sampled as one batch by one actor. It follows from the step's rows alone, so the same prompts share a
    batch however many actors there are: the bits of a matrix product depend on what shares its batch. A learner
    worker's share should hold whole chunks.
    """
    ordered = sorted(prompts, key=lambda prompt: prompt.row)
    return [list(group) for _, group in groupby(ordered, key=lambda prompt: prompt.row // chunk_prompts)]


@dataclass(frozen=True)
class PlannedRole:
    """Equal processes of a run that was only planned."""

    key: str  # of the run file, for their number
    count: int
    each: str  # resources
    nodes: Mapping[str, int]  # processes by node
    memory_gib: Mapping[str, float]  # of each, by what it is for; empty where it is not known
    device: str  # whose memory that is: GPU or RAM
    room_gib: float | None  # what is there for each; None where nobody knows
    host_gib: float  # RAM of each beside its GPU


@dataclass(frozen=True)
class Plan:
    """What would run where; nothing was started."""

    where: str
    roles: tuple[PlannedRole, ...]
    words: tuple[tuple[str, str], ...]  # (subject, sentence)
    shared: tuple[tuple[str, float, float | None], ...]  # (RAM or GPUs of a node, taken by all, there), GiB
    notes: tuple[str, ...]  # what does nothing, what is not known, what is tight
