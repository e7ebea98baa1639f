"""`serve`: a finished model behind HTTP, its limits, and who may ask."""

import re
from typing import Literal

from pydantic import Field, NonNegativeInt, PositiveFloat, PositiveInt, field_validator, model_validator

from raytrl.config.credentials import is_reference
from raytrl.config.sections.base import NativeArguments, ProcessSection

BATCH_ROWS = 32  # of what transformers samples from at a time, unless max_ongoing is less
BATCH_PROMPT_TOKENS = (
    8192  # of the same, padding included: their activations are there at once; a longer prompt is alone
)
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.\-]*")


def is_this_machine(host: str) -> bool:
    """Whether only processes of this machine reach what listens there."""
    return host in ("localhost", "::1") or re.fullmatch(r"127(\.\d{1,3}){3}", host) is not None


class ServeSection(ProcessSection):
    """Where it listens, what it is called, how much it takes at a time."""

    host: str = "127.0.0.1"
    """The address to listen at. 127.0.0.1: this machine alone; any other, such as 0.0.0.0, needs an api_key."""
    port: int = Field(default=8000, ge=1, le=65535)
    """Of the address."""
    name: str | None = None
    """What the model is called in requests, and the application in Ray Serve. null: as the run or folder."""
    route: str = "/"
    """What all paths begin with, where several applications share an address: /my-model has /my-model/v1/completions."""
    replicas: PositiveInt = 1
    """How many processes, each with the whole model; requests are dealt to them."""
    engine: Literal["auto", "vllm", "transformers"] = "auto"
    """Of a policy: what samples. auto: vllm where it is installed and can run the model, else transformers."""
    engine_args: NativeArguments = Field(default={})
    """Of a policy: passed on as they are: fields of vLLM's EngineArgs, or arguments of transformers' from_pretrained."""
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    """What it computes in. auto: bfloat16 on a GPU, float32 on a CPU."""
    label: str | int | None = None
    """Of a classifier with several outputs: which of them is the score, by name or index. null: its only one."""
    adapters: dict[str, str] = Field(default={})
    """Of a policy: LoRA adapters on it, name → folder; each is one more model that requests can name."""
    max_ongoing: PositiveInt = 128
    """Requests that a replica works on at a time."""
    max_queued: NonNegativeInt = 256
    """Requests that wait beside them; who comes then is answered 429."""
    max_tokens: PositiveInt | None = None
    """Of a policy: tokens of a response at most; more are refused, and a chat that asks for no number has these. null: as many
    as the model has room for."""
    max_n: PositiveInt = 8
    """Of a policy: responses to a prompt at most (n)."""
    max_body_bytes: PositiveInt = 1048576
    """Of a request; a longer one is answered 413."""
    max_rows: PositiveInt = 1024
    """Responses that one call of /score is about at most, and prompts of one completion; more are answered 413."""
    request_timeout_s: PositiveFloat = 600.0
    """Seconds until a request has to be done, its wait included; else it is stopped and answered 504."""
    drain_s: PositiveFloat = 30.0
    """Seconds for what is in flight when the server is stopped; who comes meanwhile is answered 503."""
    start_timeout_s: PositiveFloat = 600.0
    """Seconds for all replicas to be placed, to load the model and to warm up."""
    api_key: str | None = None
    """Where the key is that requests must bring (Authorization: Bearer …): NAME of an environment variable, or NAME=/file. Never
    the key itself. null: none is asked for."""

    @field_validator("route")
    @classmethod
    def _a_path(cls, route: str) -> str:
        if not re.fullmatch(r"/|(/[A-Za-z0-9_.\-]+)+", route):
            raise ValueError(f"found: {route!r}; expected: / or a path such as /my-model, without a / at its end")
        return route

    @field_validator("name")
    @classmethod
    def _a_name(cls, name: str | None) -> str | None:
        return None if name is None else _checked_name(name)

    @field_validator("label", mode="before")
    @classmethod
    def _no_bool(cls, label: object) -> object:
        if isinstance(label, bool):
            raise ValueError(f'found: {label}; expected: a number, or a name: "{str(label).lower()}" in quotes')
        return label

    @field_validator("adapters")
    @classmethod
    def _names(cls, adapters: dict[str, str]) -> dict[str, str]:
        for name in adapters:
            _checked_name(name)
        return adapters

    @field_validator("api_key")
    @classmethod
    def _a_reference(cls, key: str | None) -> str | None:
        if key is not None and not is_reference(key):
            raise ValueError(
                "found: (not shown); expected: NAME of an environment variable, or NAME=/path/of/a/file; the key itself has no "
                "place in a run file"
            )
        return key

    @model_validator(mode="after")
    def _closed(self) -> "ServeSection":
        if self.api_key is None and not is_this_machine(self.host):
            raise ValueError(
                f"host: whoever reaches that address could use the model; found: {self.host!r} and no api_key; expected: "
                f"api_key: NAME of an environment variable that holds one, or host: 127.0.0.1"
            )
        if self.placement not in ("pack", "strict_spread"):
            raise ValueError(
                f"placement: Ray Serve places replicas by itself; found: {self.placement!r}; expected: strict_spread (each on a "
                f"node of its own), or none"
            )
        return self


def _checked_name(name: str) -> str:
    if not _NAME.fullmatch(name):
        raise ValueError(f"found: {name!r}; expected: letters, digits, '.', '_' and '-'")
    return name
