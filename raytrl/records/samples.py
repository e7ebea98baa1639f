"""Prompts, responses and scores, as they cross from process to process: frozen, picklable, no tensors, no models.

A response is named by (step, row, sample): `row` counts the prompts of that step's global batch, `sample` the
responses of one prompt. Nothing else identifies it, so it may be made by any rollout actor, in any order.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import groupby
from typing import Any, Literal, NamedTuple

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
    token_ids: tuple[int, ...]  # chat template applied, truncated, no padding; none of a conversation with tools
    columns: Mapping[str, Any] = field(default_factory=dict)  # the dataset's other ones, for reward functions and reset


# ended: by a turn without a call. length: within a turn. budget: there was no room for what came back. turns: max_turns calls
# were answered, and it asked for more. failed: an environment did, so that nothing can be said of the response.
End = Literal["ended", "length", "budget", "turns", "failed"]


@dataclass(frozen=True, slots=True)
class Episode:
    """What a response is beside its tokens where it is a conversation with tools or an environment."""

    prompt: Sequence[Message]  # with what `reset` said
    prompt_token_ids: tuple[int, ...]
    messages: Sequence[Message]  # from the first assistant message on, as TRL hands them to reward functions
    sampled: tuple[tuple[int, int], ...]  # [first, last) of the response's tokens that the policy sampled, a turn each
    end: End
    scores: Mapping[str, float | None] = field(default_factory=dict)  # of what is asked where the environment is
    problems: Mapping[str, str] = field(default_factory=dict)  # why one of these gave no score
    calls: int = 0
    failed_calls: int = 0  # raised, unknown, or with arguments that do not fit: the model was told
    split_tokens: int = 0  # special tokens in what tools said, which were taken apart
    failure: str = ""  # why it failed
    timed_out: bool = False  # a failure by the clock: another machine may not see it


@dataclass(frozen=True, slots=True)
class Response:
    """One sampled response; `token_ids` holds the sampled tokens, the end token included, and between the turns of a
    conversation what tools said."""

    step: int
    row: int
    sample: int
    token_ids: tuple[int, ...]
    text: str  # decoded, special tokens and a stop string removed: what reward sources read
    ended: bool  # an end token or a stop string was sampled; False: cut at max_new_tokens
    sampling_logprobs: tuple[float, ...]  # the engine's own, one a sampled token; NaN where it gave none
    policy_version: int  # updates done when it was sampled
    episode: Episode | None = None

    @property
    def sampled(self) -> tuple[tuple[int, int], ...]:
        """[first, last) of the tokens that the policy sampled."""
        return ((0, len(self.token_ids)),) if self.episode is None else self.episode.sampled

    @property
    def num_sampled(self) -> int:
        """Tokens that the policy sampled: all that is ever counted or trained."""
        return len(self.sampling_logprobs)

    @property
    def failed(self) -> bool:
        """Whether nothing can be said of it, as its environment failed."""
        return self.episode is not None and self.episode.end == "failed"

    def prompt_of(self, prompt: Prompt) -> Prompt:
        """The prompt as it was in the end: an environment may add to it."""
        if self.episode is None:
            return prompt
        return replace(prompt, text=list(self.episode.prompt), token_ids=self.episode.prompt_token_ids)

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> "Response":
        """From what `dataclasses.asdict` made of it, through JSON."""
        tuples = {name: tuple(values[name]) for name in ("token_ids", "sampling_logprobs")}
        episode = values["episode"]
        if episode is not None:
            spans = tuple((first, last) for first, last in episode["sampled"])
            episode = Episode(**{**episode, "prompt_token_ids": tuple(episode["prompt_token_ids"]), "sampled": spans})
        return cls(**{**values, **tuples, "episode": episode})


@dataclass(frozen=True, slots=True)
class Score:
    """The weighted sum over all reward sources for one response; `None` means dropped, never zero."""

    step: int
    row: int
    sample: int
    value: float | None
    by_source: Mapping[str, float | None]
    of_failed: bool = False  # there is nothing to score: its conversation failed


def sample_row(prompt: Prompt, response: Response, score: Score, **more: Any) -> dict[str, Any]:
    """One line of samples.jsonl; `more` comes first."""
    episode = response.episode
    return {
        **more,
        "row": response.row,
        "sample": response.sample,
        "prompt": response.prompt_of(prompt).text,
        "response": response.text,
        **({} if episode is None else {"messages": list(episode.messages), "end": episode.end}),
        **({} if episode is None or not response.failed else {"failure": episode.failure}),
        "ended": response.ended,
        "tokens": response.num_sampled,
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
