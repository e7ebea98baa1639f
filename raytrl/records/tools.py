"""What a conversation has to do with tools and environments, as it crosses from process to process."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

Schema = Mapping[str, Any]  # of a tool, as chat templates take it
Content = str | list[dict[str, Any]]  # of a message: a text, or blocks of text

_CHARACTERS_A_TOKEN = 256


def longest_text(tokens: int) -> int:
    """Characters of a tool's answer that leave its process, so that of 100 MB little is ever looked at."""
    return tokens * _CHARACTERS_A_TOKEN


@dataclass(frozen=True, slots=True)
class Call:
    """One call that a model asks for."""

    name: str
    arguments: Mapping[str, Any]


@dataclass(frozen=True, slots=True)
class Result:
    """What came of a call."""

    content: Content
    failed: bool = False  # the model is told why


@dataclass(frozen=True, slots=True)
class Kind:
    """What a conversation may use: all tools, or these and those of one environment."""

    tools: tuple[Schema, ...]
    environment: str | None = None  # its class
    has_reward: bool = False  # it has a `get_reward`


@dataclass(frozen=True, slots=True)
class Toolbox:
    """Everything that a run's conversations may use."""

    kinds: Mapping[str | None, Kind]  # by the row's `environment`; None: all rows are of one kind
    functions: tuple[str, ...] = ()  # names of the reward sources whose function asks for `environments`

    @property
    def is_by_name(self) -> bool:
        """Whether each row says which kind it is, in its column `environment`."""
        return None not in self.kinds

    def named(self, row: Mapping[str, Any]) -> tuple[str | None, dict[str, Any]]:
        """The name of a row's kind, and the columns that `reset` is given."""
        columns = dict(row)
        return (columns.pop("environment", None) if self.is_by_name else None), columns

    @property
    def rewards(self) -> tuple[str, ...]:
        """Names of the reward sources that environments are, each once."""
        classes = [kind.environment for kind in self.kinds.values() if kind.has_reward and kind.environment]
        return tuple(dict.fromkeys(classes))

    @property
    def has_environment(self) -> bool:
        """Whether conversations begin with a `reset`."""
        return any(kind.environment is not None for kind in self.kinds.values())


@dataclass(frozen=True, slots=True)
class Scores:
    """What was asked where the environment is: by the name of the source."""

    values: Mapping[str, float | None] = field(default_factory=dict)
    problems: Mapping[str, str] = field(default_factory=dict)  # why one gave none


@dataclass(frozen=True, slots=True)
class Start:
    """What an environment needs to begin."""

    environment: str | None
    columns: Mapping[str, Any]  # of the row, with its prompt
    row_seed: int  # the same for all responses to a prompt
    seed: int  # the response's own


@dataclass(frozen=True, slots=True)
class ScoreRequest:
    """What a reward function reads of one conversation."""

    prompt: Sequence[Mapping[str, Any]]
    completion: Sequence[Mapping[str, Any]]
    completion_ids: Sequence[int]
    columns: Mapping[str, Any]
    step: int


class ConversationError(Exception):
    """An environment failed, so that nothing can be said of the response; the text is the whole reason."""

    def __init__(self, reason: str, timed_out: bool = False) -> None:
        super().__init__(reason)
        self.timed_out = timed_out
