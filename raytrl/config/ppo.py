"""The PPO part of a run file: rollout, ppo, value_model, reference and eval."""

from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field, PositiveFloat, PositiveInt, model_validator

from raytrl.config.base import Placement, Section

Fraction = Annotated[float, Field(ge=0.0, le=1.0)]
# Truncated sampling draws from another distribution than the one whose log-probs PPO learns from: at top_p 0.8 a
# user measured a mean ratio of 0.896 before any update (huggingface/trl#7269).
TRUNCATING = ("top_k", "top_p", "min_p", "typical_p", "repetition_penalty", "no_repeat_ngram_size", "num_beams")
# Logits of one micro-batch, their gradient and the float32 copies of both should stay near 2 GiB.
LOGITS_BYTES = 2 * 2**30


def _as_list(value: Any) -> Any:
    return [value] if isinstance(value, str) else value


class SamplingConfig(Section):
    """How responses are drawn; the learner's log-probs use the same temperature."""

    max_new_tokens: PositiveInt = 48
    temperature: float = 1.0
    stop: Annotated[list[str] | None, BeforeValidator(_as_list)] = None  # strings that end a response

    @model_validator(mode="before")
    @classmethod
    def _refuse_truncation(cls, values: Any) -> Any:
        for name in TRUNCATING:
            if isinstance(values, dict) and name in values:
                raise ValueError(
                    f"{name} is refused: it changes the distribution that responses are drawn from, while PPO's ratio "
                    f"compares full distributions, so it would be wrong before the first update; found "
                    f"{name}={values[name]!r}; remove it (temperature and max_new_tokens are safe)"
                )
        return values

    @model_validator(mode="after")
    def _check(self) -> "SamplingConfig":
        if not self.temperature > 0:
            raise ValueError(
                f"temperature must be greater than 0 (PPO needs sampled responses; evaluation is greedy by "
                f"eval.greedy); found {self.temperature}"
            )
        if self.stop is not None and not all(self.stop):
            raise ValueError("stop must not hold an empty string: every response would end at once")
        return self


class RolloutConfig(Section):
    """The actors that sample responses."""

    actors: PositiveInt = 1
    resources: dict[str, float] = Field(default={"CPU": 1})
    placement: Placement = "pack"  # of the actors on the nodes
    labels: dict[str, str] = Field(default={})  # only nodes with these labels, in Ray's label selectors
    engine: Literal["auto", "vllm", "transformers"] = "auto"
    engine_args: dict[str, Any] = Field(default={})
    sampling: SamplingConfig = SamplingConfig()
    max_prompt_length: PositiveInt = 512  # tokens
    long_prompts: Literal["cut", "refuse"] = "cut"  # cut: a longer prompt loses its beginning
    # Prompts that go to an actor together, and whose responses are scored together and, by transformers, sampled together:
    # the bits of a matrix product depend on what shares its batch, so a chunk is what makes a response and its score the
    # same however many actors there are. vLLM samples all its chunks in one continuous batch.
    chunk_prompts: PositiveInt = 8
    # How new weights get from the learner to the engines. object_store: through Ray's, where an engine that was restarted
    # finds them too. broadcast: straight from the learner, by NCCL between GPUs and gloo between CPUs; an engine that dies
    # comes back with the next step's weights. auto: broadcast where both have whole GPUs, and two engines at least.
    weight_transfer: Literal["auto", "object_store", "broadcast"] = "auto"
    start_timeout_s: PositiveFloat = 600.0  # for rollout and reward actors to be placed and to load their models
    timeout_s: PositiveFloat = 600.0  # without a single answer of any actor before the run fails
    samples: Annotated[int, Field(ge=0)] = 8  # responses a step that go to samples.jsonl

    def chosen(self, **names: str) -> "RolloutConfig":
        """A copy with auto replaced; what was written in the run file stays the only part that counts as written."""
        copy = self.model_copy()
        copy.__dict__.update(names)
        return copy


class KlConfig(Section):
    """The coefficient of the KL penalty in the reward."""

    coef: Annotated[float, Field(ge=0.0)] = 0.05
    target: PositiveFloat | None = None  # nats a response; set: the coefficient adapts towards it
    horizon: PositiveInt = 10000  # responses

    @model_validator(mode="after")
    def _check(self) -> "KlConfig":
        if self.target is not None and self.coef == 0.0:
            raise ValueError("kl.target adapts kl.coef by factors, and 0 stays 0; found coef 0; give a positive coef")
        return self


class PpoConfig(Section):
    """The algorithm: one step is one rollout batch and its updates."""

    steps: PositiveInt = 200
    batch_size: PositiveInt = 64  # responses a step, over all learner workers
    responses_per_prompt: PositiveInt = 1
    epochs: PositiveInt = 4
    minibatches: PositiveInt = 4  # optimizer steps an epoch
    learning_rate: PositiveFloat = 1.0e-5
    value_learning_rate: PositiveFloat | None = None  # null: learning_rate
    lr_schedule: Literal["linear", "cosine", "constant"] = "linear"  # to 0 at the last step
    adam_epsilon: PositiveFloat = 1.0e-5
    max_grad_norm: PositiveFloat = 1.0
    gamma: Fraction = 1.0
    lam: Fraction = 0.95
    clip_range: PositiveFloat = 0.2
    value_clip_range: PositiveFloat | None = 0.2  # null: no clipping
    value_coef: Annotated[float, Field(ge=0.0)] = 0.1
    kl: KlConfig = KlConfig()
    missing_eos_penalty: Annotated[float, Field(ge=0.0)] | None = None  # subtracted when no end token was sampled
    reward_scaling: bool = False  # divide scores by the running standard deviation of all scores so far
    reward_clip: PositiveFloat | None = None  # scores are cut to ± this, after scaling
    whiten_advantages: bool = True
    max_tokens_per_microbatch: PositiveInt | None = None
    gradient_checkpointing: bool = False  # compute layers again in the backward pass instead of keeping their results
    max_lag: Literal[0, 1] = 0
    importance_cap: Annotated[float, Field(ge=1.0)] = 2.0  # upper limit of the correction for stale rollouts

    @model_validator(mode="after")
    def _check(self) -> "PpoConfig":
        if self.batch_size % self.responses_per_prompt:
            raise ValueError(
                f"batch_size counts responses, so it must be a multiple of responses_per_prompt; found "
                f"batch_size={self.batch_size}, responses_per_prompt={self.responses_per_prompt}"
            )
        if self.batch_size % self.minibatches:
            raise ValueError(
                f"batch_size must be a multiple of minibatches, so that every optimizer step sees as many responses; "
                f"found batch_size={self.batch_size}, minibatches={self.minibatches}"
            )
        return self

    def microbatch_tokens(self, vocabulary: int) -> int:
        """Tokens in one forward pass of the learner, for a policy with this many token ids."""
        if self.max_tokens_per_microbatch is not None:
            return self.max_tokens_per_microbatch
        return min(16384, max(1, LOGITS_BYTES // (16 * vocabulary)))

    @property
    def prompts_per_step(self) -> int:
        """Prompts of a step's global batch."""
        return self.batch_size // self.responses_per_prompt


class ValueModelConfig(Section):
    """Where the value function starts from."""

    init: str | None = None  # null: lora → adapter and head on the base, full → copy of the policy; or a model path


class ReferenceConfig(Section):
    """What the KL penalty is measured against."""

    path: str | None = None  # null: the starting policy


class EvalConfig(Section):
    """Responses on data.eval, scored by the same sources."""

    every: PositiveInt = 20  # steps
    rows: PositiveInt = 64
    greedy: bool = True  # false: sampled as in training
