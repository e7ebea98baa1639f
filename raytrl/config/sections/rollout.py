"""`rollout`: the actors that sample responses."""

from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field, PositiveFloat, PositiveInt, field_validator, model_validator

from raytrl.config.foreign.native import words_for_bools
from raytrl.config.sections.base import ProcessSection, Section

# Truncated sampling draws from another distribution than the one whose log-probs PPO learns from: at top_p 0.8 a
# user measured a mean ratio of 0.896 before any update (huggingface/trl#7269).
TRUNCATING = ("top_k", "top_p", "min_p", "typical_p", "repetition_penalty", "no_repeat_ngram_size", "num_beams")


def _as_list(value: Any) -> Any:
    return [value] if isinstance(value, str) else value


class SamplingSection(Section):
    """How responses are drawn; the learner's log-probs use the same temperature."""

    max_new_tokens: PositiveInt = 48
    """Tokens of a response at most, its end token included."""
    temperature: float = 1.0
    """What logits are divided by before a token is drawn; above 0."""
    stop: Annotated[list[str] | None, BeforeValidator(_as_list)] = None
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
    engine_args: dict[str, Any] = Field(default={})
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
    start_timeout_s: PositiveFloat = 600.0
    """Seconds for rollout and reward actors to be placed, and to load their models."""
    timeout_s: PositiveFloat = 600.0
    """Seconds without a single answer of any actor before the run fails; reward actors have those of their sources more."""
    samples: Annotated[int, Field(ge=0)] = 8
    """Responses a step, and of an evaluation, that go to samples.jsonl."""

    @field_validator("engine_args")
    @classmethod
    def _no_words_for_bools(cls, arguments: dict[str, Any]) -> dict[str, Any]:
        if problems := words_for_bools("", arguments):
            raise ValueError("\n".join(problems))
        return arguments

    def chosen(self, **names: str | int) -> "RolloutSection":
        """A copy with auto replaced; what was written in the run file stays the only part that counts as written."""
        copy = self.model_copy()
        copy.__dict__.update(names)
        return copy
