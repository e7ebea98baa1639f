"""The `reward:` section of a PPO or eval run file: which sources score a response, and what a failed score does."""

import re
from typing import Annotated, Literal, Self

from pydantic import Field, field_validator, model_validator

from raytrl.config.sections.base import ProcessSection, Section

DEFAULT_MAX_DROPPED_FRACTION = 0.05

_FUNCTION = re.compile(r"(?P<place>.+\.py|[A-Za-z_]\w*(\.[A-Za-z_]\w*)*):(?P<name>[A-Za-z_]\w*)")

# Keys that only one kind of source reads, with the value that means "not given".
_ONLY_FOR: dict[str, tuple[str, object]] = {
    "label": ("model", None),
    "dtype": ("model", "auto"),
    "trust_remote_code": ("model", False),
    "headers_env": ("url", {}),
    "send_ended": ("url", True),
    "outage_s": ("url", 300.0),
}


class SourceSection(Section):
    """One reward source: exactly one of `model`, `function` and `url`."""

    name: Annotated[str, Field(pattern=r"^[A-Za-z0-9_.-]+$")]
    """What its scores are called in samples and results."""
    weight: float = 1.0
    """Of this source's score in the sum of all; negative: a penalty."""
    model: str | None = None
    """A sequence classifier: Hugging Face id or local folder. null: the source is something else."""
    function: str | None = None
    """file.py:name or package.module:name of a function as TRL's trainers take it. null: the source is something else."""
    url: str | None = None
    """An address that is POSTed {prompts, completions, ended} and answers {scores}: `raytrl serve` of a reward model, or any
    other. null: the source is something else."""
    label: str | int | None = None
    """Of a model: which output is the score, by name or index. null: its only one."""
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    """Of a model: what it computes in. auto: bfloat16 on a GPU, float32 on a CPU."""
    trust_remote_code: bool = False
    """Of a model: whether Python code that comes with it may run."""
    headers_env: dict[str, str] = Field(default_factory=dict)
    """Of a url: header → the environment variable of the reward actors that holds its value."""
    send_ended: bool = True
    """Of a url: whether it is told which responses ended by themselves (ended, true or false for each). false: of a server that
    refuses a key that it does not know; it cannot tell a cut response then."""
    outage_s: Annotated[float, Field(ge=0)] = 300.0
    """Of a url: seconds to wait for a server that says 429 or 503, or that has answered before and is gone; such calls are no
    retries."""
    batch_size: Annotated[int, Field(ge=1)] | None = None
    """Responses a call. null: 32 for a model, all at once for a function or url."""
    timeout_s: Annotated[float, Field(gt=0)] = 120.0
    """Seconds that one call may take."""
    retries: Annotated[int, Field(ge=0)] = 2
    """How often a call that failed is made again."""

    @property
    def kind(self) -> Literal["model", "function", "url", "environment"]:
        """Which of these this source is; environment: the `get_reward` of a class of this name."""
        if self.model is not None:
            return "model"
        if self.function is not None:
            return "function"
        return "url" if self.url is not None else "environment"

    @field_validator("weight")
    @classmethod
    def _check_weight(cls, weight: float) -> float:
        if weight == 0:
            raise ValueError(
                f"makes the source do nothing or everything; found: {weight}; expected: a finite number other than 0; to "
                f"turn a source off, remove it"
            )
        return weight

    @field_validator("label", mode="before")
    @classmethod
    def _check_label(cls, label: object) -> object:
        if isinstance(label, bool):  # or it would be the number of an output, 1 or 0
            raise ValueError(f'found: {label}; expected: a number, or a name: "{str(label).lower()}" in quotes')
        return label

    @field_validator("function")
    @classmethod
    def _check_function(cls, function: str | None) -> str | None:
        if function is not None and not _FUNCTION.fullmatch(function):
            raise ValueError(f"no reward function; found: {function!r}; expected: file.py:name or package.module:name")
        return function

    @field_validator("url")
    @classmethod
    def _check_url(cls, url: str | None) -> str | None:
        if url is not None and not re.match(r"https?://[^/\s]", url):
            raise ValueError(f"no address to POST to; found: {url!r}; expected: http://... or https://...")
        return url

    @model_validator(mode="after")
    def _check_kind(self) -> Self:
        given = [key for key in ("model", "function", "url") if getattr(self, key) is not None]
        if len(given) > 1:
            raise ValueError(
                f"source {self.name!r}; found: {' and '.join(given)}; expected: exactly "
                f"one of model, function, url; for two kinds of score write two sources"
            )
        article = "an" if self.kind == "environment" else "a"
        idle = [(key, kind) for key, (kind, nothing) in _ONLY_FOR.items() if getattr(self, key) != nothing]
        if self.kind == "environment":  # it is asked where the environment is, once, under rollout.tool_timeout_s
            plain = type(self).model_fields
            others = [key for key in ("batch_size", "timeout_s", "retries") if getattr(self, key) != plain[key].default]
            idle += [(key, "model, function or url") for key in others]
        for key, kind in idle:
            if kind != self.kind:
                raise ValueError(
                    f"{key}: does nothing for {article} {self.kind} source; found: {getattr(self, key)!r} in source "
                    f"{self.name!r}; expected: a {kind} source, or no {key}"
                )
        return self


class RewardSection(ProcessSection):
    """The reward actors and the sources that each of them holds."""

    sources: tuple[SourceSection, ...] = ()
    """What scores a response: models, functions and urls; the reward is the weighted sum of their scores. The get_reward of a
    class of rollout.environment is one of its own accord, with weight 1; a source of the class' name that is none of the three
    gives it another."""
    actors: Annotated[int, Field(ge=1)] = 1
    """How many, each with all sources."""
    resources: dict[str, Annotated[float, Field(ge=0)]] = Field(default_factory=lambda: {"CPU": 1.0})
    """What each actor takes, by Ray's names: CPU, GPU or a cluster's own. Amounts may be 0, where a url does the work."""
    on_error: Literal["fail", "drop"] = "fail"
    """What becomes of a response that a source failed to score. fail: the run fails; drop: it is left out and counted."""
    max_dropped_fraction: Annotated[float, Field(ge=0, le=1)] | None = None
    """With on_error: drop, the largest part of a step's responses that may be dropped before the run fails. null: 0.05."""

    @property
    def drop_budget(self) -> float:
        """Largest fraction of a batch that may be dropped; 0 under `on_error: fail`."""
        if self.on_error == "fail":
            return 0.0
        return DEFAULT_MAX_DROPPED_FRACTION if self.max_dropped_fraction is None else self.max_dropped_fraction

    @field_validator("sources")
    @classmethod
    def _check_names(cls, sources: tuple[SourceSection, ...]) -> tuple[SourceSection, ...]:
        names = [source.name for source in sources]
        twice = sorted({name for name in names if names.count(name) > 1})
        if twice:
            raise ValueError(
                f"two sources share a name; found: {twice} more than once; expected: unique names; rename one"
            )
        return sources

    @model_validator(mode="after")
    def _check_gpus(self) -> Self:
        if self.gpus > 1 and all(source.kind != "function" for source in self.sources):
            raise ValueError(
                f"resources.GPU: a reward model computes on one GPU; found: {self.gpus:g}; expected: at most 1, and more actors"
            )
        return self

    @model_validator(mode="after")
    def _check_budget(self) -> Self:
        if self.on_error == "fail" and self.max_dropped_fraction is not None:
            raise ValueError(
                f"max_dropped_fraction: does nothing with on_error: fail; found: {self.max_dropped_fraction}; "
                f"expected: on_error: drop, or no max_dropped_fraction"
            )
        return self
