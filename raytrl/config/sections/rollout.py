"""`rollout`: the actors that sample responses."""

import re
from collections.abc import Mapping
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field, PositiveFloat, PositiveInt, model_validator

from raytrl.config.sections.base import NativeArguments, ProcessSection, Section, as_list

# Truncated sampling draws from another distribution than the one whose log-probs PPO learns from: at top_p 0.8 a
# user measured a mean ratio of 0.896 before any update (huggingface/trl#7269).
TRUNCATING = ("top_k", "top_p", "min_p", "typical_p", "repetition_penalty", "no_repeat_ngram_size", "num_beams")


# Keys that only conversations read.
_OF_CONVERSATIONS = (
    "max_turns",
    "tool_timeout_s",
    "max_result_tokens",
    "tool_processes",
    "tool_env",
    "max_failed_fraction",
)
PLACE_IN_FILE = re.compile(r"(?P<place>.+\.py|[A-Za-z_]\w*(\.[A-Za-z_]\w*)*):(?P<name>[A-Za-z_]\w*)")


class SamplingSection(Section):
    """How responses are drawn; the learner's log-probs use the same temperature."""

    max_new_tokens: PositiveInt = 48
    """Tokens of a response at most, its end token included."""
    temperature: float = 1.0
    """What logits are divided by before a token is drawn; above 0."""
    stop: Annotated[list[str] | None, BeforeValidator(as_list)] = None
    """Strings that end a response, besides its end token; reward sources do not see them. null: none."""

    @model_validator(mode="before")
    @classmethod
    def _refuse_truncation(cls, values: Any) -> Any:
        for name in TRUNCATING:
            if isinstance(values, dict) and name in values:
                raise ValueError(
                    f"{name}: is refused: it changes the distribution that responses are drawn from, while PPO's ratio "
                    f"compares full distributions, so it would be wrong before the first update; found: "
                    f"{values[name]!r}; remove it (temperature and max_new_tokens are safe)"
                )
        return values

    @model_validator(mode="after")
    def _check(self) -> "SamplingSection":
        if not self.temperature > 0:
            raise ValueError(
                f"temperature: PPO needs sampled responses, and evaluation is greedy by eval.greedy; found: "
                f"{self.temperature}; expected: more than 0"
            )
        if self.stop is not None and not all(self.stop):
            raise ValueError("stop: every response would end at once; found: ''; expected: no empty string")
        return self


class RolloutSection(ProcessSection):
    """The actors that sample responses."""

    actors: PositiveInt = 1
    """How many, each with an engine of its own."""
    engine: Literal["auto", "vllm", "transformers"] = "auto"
    """What samples. auto: vllm where it is installed and can run the model, else transformers."""
    engine_args: NativeArguments = Field(default={})
    """Passed on as they are: fields of vLLM's EngineArgs, or arguments of transformers' from_pretrained."""
    sampling: SamplingSection = SamplingSection()
    """How responses are drawn."""
    max_prompt_length: PositiveInt = 512
    """Tokens of a prompt at most."""
    long_prompts: Literal["cut", "refuse"] = "cut"
    """What becomes of a longer prompt. cut: it loses its beginning; refuse: the run does not start."""
    # The bits of a matrix product depend on what shares its batch, so a chunk is what makes a response and its score the
    # same however many actors there are. vLLM samples all its chunks in one continuous batch.
    chunk_prompts: PositiveInt = 8
    """Prompts that go to an actor together, and whose responses are scored together."""
    weight_transfer: Literal["auto", "object_store", "broadcast"] = "auto"
    """How new weights get from the learner to the engines. object_store: through Ray's, where an engine that was restarted
    finds them too. broadcast: straight from the learner, by NCCL between GPUs and gloo between CPUs; an engine that dies
    comes back with the next step's weights. auto: broadcast where both have whole GPUs, there are two engines at least
    and no lora, else object_store."""
    versions: PositiveInt | None = None
    """With a ppo.max_lag: versions of the policy that an engine holds side by side. max_lag + 1: no engine waits for the last
    responses of a batch. Fewer than max_lag: the actors are dealt to groups that take turns. null: 1; with a max_lag of 2 or
    more max_lag + 1, where the engine can: transformers any policy, vllm the adapters (lora) of a local model of a class that
    takes them."""
    tools: Annotated[list[str], BeforeValidator(as_list)] = Field(default=[])
    """Functions that the policy may call, file.py:name each, with type hints and a docstring: TRL's tools=."""
    environment: str | dict[str, str] | None = None
    """A class whose methods the policy may call, file.py:name: TRL's environment_factory=. Or several by name, of which the
    column environment says a row's. null: none."""
    max_turns: PositiveInt = 8
    """How often calls of a conversation are answered."""
    tool_timeout_s: PositiveFloat = 30.0
    """Seconds that one call of a tool, reset or get_reward may take; the conversation is lost then, and no other."""
    max_result_tokens: PositiveInt = 1024
    """Tokens of a tool's answer that are kept, its first ones."""
    tool_processes: PositiveInt = 64
    """Conversations of an actor whose tools run at a time, each in a process of its own."""
    tool_env: Annotated[list[str], BeforeValidator(as_list)] = Field(default=[])
    """Environment variables that tools see although they are named like secrets."""
    max_failed_fraction: Annotated[float, Field(ge=0, le=1)] = 0.25
    """The largest part of a step's conversations that may be lost, as a tool hung, its process ended or reset raised; each is
    left out and counted."""
    start_timeout_s: PositiveFloat = 600.0
    """Seconds for rollout and reward actors to be placed, and to load their models."""
    timeout_s: PositiveFloat = 600.0
    """Seconds without a single answer of any actor before the run fails; reward actors have those of their sources more."""
    samples: Annotated[int, Field(ge=0)] = 8
    """Responses a step, and of an evaluation, that go to samples.jsonl."""

    @property
    def environments(self) -> Mapping[str | None, str]:
        """Places of the classes by name; None is the name of the only one."""
        if isinstance(self.environment, str):
            return {None: self.environment}
        return dict((self.environment or {}).items())

    @property
    def converses(self) -> bool:
        """Whether responses are conversations with tools."""
        return bool(self.tools) or self.environment is not None

    @model_validator(mode="after")
    def _check_tools(self) -> "RolloutSection":
        for key, places in (("tools", self.tools), ("environment", self.environments.values())):
            for place in places:
                if not PLACE_IN_FILE.fullmatch(place):
                    raise ValueError(
                        f"{key}: no place of a function or class; found: {place!r}; expected: file.py:name or "
                        f"package.module:name"
                    )
        if self.environment == {}:
            raise ValueError("environment: found: {}; expected: a class, or names and their classes")
        if not self.converses:
            fields = type(self).model_fields
            for name in _OF_CONVERSATIONS:
                found = getattr(self, name)
                if found != fields[name].default:
                    raise ValueError(
                        f"{name}: does nothing without tools or environment; found: {found!r}; leave it out"
                    )
        elif self.sampling.stop is not None:
            raise ValueError(
                f"sampling.stop: a turn of a conversation ends by its end token; found: {self.sampling.stop!r}; leave it out"
            )
        return self
