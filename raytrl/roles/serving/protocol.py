"""Requests of OpenAI's API, as far as a policy on transformers answers them."""

from collections.abc import Mapping, Sequence
from typing import Annotated, Any, Literal, TypeVar

from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator

from raytrl.roles.serving.answers import RefusalError
from raytrl.roles.serving.requests import json_of, of_form
from raytrl.roles.serving.sampling import Sampling

_MAX_STOPS, _MAX_STOP_CHARACTERS = 4, 1024
_PLAIN_TOKENS = 16  # of a completion that asks for no number, by OpenAI's word
# Part of OpenAI's API, but not of this engine; these values ask for nothing.
_NOT_HERE: Mapping[str, Sequence[Any]] = {
    "audio": (None,),
    "best_of": (None, 1),
    "echo": (None, False),
    "frequency_penalty": (None, 0),
    "function_call": (None, "none"),
    "functions": (None, []),
    "logit_bias": (None, {}),
    "metadata": (None, {}),
    "modalities": (None, ["text"]),
    "parallel_tool_calls": (None, False, True),  # of tools, which are refused
    "prediction": (None,),
    "presence_penalty": (None, 0),
    "reasoning_effort": (None,),
    "response_format": (None, {"type": "text"}),
    "service_tier": (None, "auto", "default"),
    "store": (None, False),
    "suffix": (None, ""),
    "tool_choice": (None, "none"),
    "tools": (None, []),
    "verbosity": (None,),
    "web_search_options": (None,),
}


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True)


class _StreamOptions(_Strict):
    include_usage: bool = False


class SampledRequest(_Strict):
    """What both kinds of request have."""

    model: str | None = None
    max_tokens: Annotated[int, Field(ge=1)] | None = None
    n: Annotated[int, Field(ge=1)] | None = None
    temperature: Annotated[float, Field(ge=0, allow_inf_nan=False)] | None = None
    top_p: Annotated[float, Field(gt=0, le=1)] | None = None
    top_k: Annotated[int, Field(ge=-1, lt=2**31)] | None = None  # vLLM's; 0 and -1: all tokens
    seed: Annotated[int, Field(ge=-(2**63), lt=2**63)] | None = None
    stop: Any = None
    stream: bool | None = None
    stream_options: _StreamOptions | None = None
    user: str | None = None  # whom OpenAI watches by it; nobody does here

    @field_validator("stop")
    @classmethod
    def _texts(cls, stop: Any) -> list[str]:
        words = [] if stop is None else [stop] if isinstance(stop, str) else stop
        fits = isinstance(words, list) and all(
            isinstance(word, str) and 0 < len(word) <= _MAX_STOP_CHARACTERS for word in words
        )
        if not fits or len(words) > _MAX_STOPS:
            raise ValueError(
                f"expected: a text, or up to {_MAX_STOPS}; none empty or over {_MAX_STOP_CHARACTERS} characters"
            )
        return list(words)

    @model_validator(mode="after")
    def _options_of_a_stream(self) -> "SampledRequest":
        if self.stream_options is not None and not self.stream:
            raise ValueError("stream_options: expected: with stream: true alone")
        return self

    @property
    def choices(self) -> int:
        """To each prompt."""
        return self.n or 1

    @property
    def with_usage(self) -> bool:
        """Whether a stream ends with its usage."""
        return self.stream_options is not None and self.stream_options.include_usage

    def _sampling(self, logprobs: int | None) -> Sampling:
        return Sampling(
            temperature=1.0 if self.temperature is None else self.temperature,
            top_p=1.0 if self.top_p is None else self.top_p,
            top_k=max(0, self.top_k or 0),
            stop=tuple(self.stop or ()),
            logprobs=logprobs,
        )


class CompletionRequest(SampledRequest):
    """POST /v1/completions."""

    prompt: Any
    logprobs: Annotated[int, Field(ge=0, le=5)] | None = None

    @field_validator("prompt")
    @classmethod
    def _prompts(cls, prompt: Any) -> list[Any]:
        if isinstance(prompt, str) or (isinstance(prompt, list) and prompt and type(prompt[0]) is int):
            prompt = [prompt]
        if not isinstance(prompt, list) or not prompt or not all(map(_is_prompt, prompt)):
            raise ValueError("expected: a text, a list of texts, the ids of tokens, or a list of these; none empty")
        return prompt

    @property
    def sampling(self) -> Sampling:
        return self._sampling(self.logprobs)

    @property
    def asked_tokens(self) -> int | None:
        """Of a response at most; None: the request does not say."""
        return self.max_tokens

    def default_tokens(self, serve_max_tokens: int | None) -> int | None:
        """Where the request does not say; None: as many as there is room for."""
        return min(_PLAIN_TOKENS, serve_max_tokens or _PLAIN_TOKENS)


class _TextPart(_Strict):
    type: Literal["text"]
    text: str


class _Message(_Strict):
    role: Literal["system", "user", "assistant"]
    content: str | Annotated[list[_TextPart], Field(min_length=1)]

    def plain(self) -> dict[str, str]:
        """As chat templates take it."""
        whole = self.content if isinstance(self.content, str) else "\n".join(part.text for part in self.content)
        return {"role": self.role, "content": whole}


class ChatRequest(SampledRequest):
    """POST /v1/chat/completions."""

    messages: Annotated[list[_Message], Field(min_length=1)]
    max_completion_tokens: Annotated[int, Field(ge=1)] | None = None
    logprobs: bool | None = None
    top_logprobs: Annotated[int, Field(ge=0, le=20)] | None = None

    @model_validator(mode="after")
    def _likeliest_of_something(self) -> "ChatRequest":
        if self.top_logprobs and not self.logprobs:
            raise ValueError("top_logprobs: expected: with logprobs: true alone")
        return self

    @property
    def sampling(self) -> Sampling:
        return self._sampling((self.top_logprobs or 0) if self.logprobs else None)

    @property
    def asked_tokens(self) -> int | None:
        """Of a response at most; None: the request does not say."""
        return self.max_completion_tokens or self.max_tokens

    def default_tokens(self, serve_max_tokens: int | None) -> int | None:
        """Where the request does not say; None: as many as there is room for."""
        return serve_max_tokens


Request = TypeVar("Request", CompletionRequest, ChatRequest)


def parsed(form: type[Request], body: bytes) -> Request:
    """The request of a body; raises RefusalError with the name of what is wrong or not supported."""
    found = json_of(body)
    if isinstance(found, dict):
        for name in sorted(found.keys() & _NOT_HERE.keys()):
            if found.pop(name) not in _NOT_HERE[name]:
                raise RefusalError(
                    400, "not_supported", f"{name}: not supported here; expected: no such field", param=name
                )
    return of_form(form, found)


def _is_prompt(prompt: Any) -> bool:
    """A text, or ids; whether the ids are known, the tokenizer's side says."""
    return isinstance(prompt, str) or (
        isinstance(prompt, list) and bool(prompt) and all(type(number) is int for number in prompt)
    )
