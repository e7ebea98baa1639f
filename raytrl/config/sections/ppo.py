"""`ppo`, `value_model`, `reference` and `eval`: the algorithm, and what it starts from."""

from typing import Annotated, Literal

from pydantic import Field, PositiveFloat, PositiveInt, model_validator

from raytrl.config.sections.base import Section

Fraction = Annotated[float, Field(ge=0.0, le=1.0)]


# Logits of one micro-batch, their gradient and the float32 copies of both should stay near 2 GiB.
LOGITS_BYTES = 2 * 2**30


class KlSection(Section):
    """The coefficient of the KL penalty in the reward."""

    coef: Annotated[float, Field(ge=0.0)] = 0.05
    target: PositiveFloat | None = None  # nats a response; set: the coefficient adapts towards it
    horizon: PositiveInt = 10000  # responses

    @model_validator(mode="after")
    def _check(self) -> "KlSection":
        if self.target is not None and self.coef == 0.0:
            raise ValueError("coef: target adapts it by factors, and 0 stays 0; found: 0; expected: a positive coef")
        return self


class PpoSection(Section):
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
    kl: KlSection = KlSection()
    missing_eos_penalty: Annotated[float, Field(ge=0.0)] | None = None  # subtracted when no end token was sampled
    reward_scaling: bool = False  # divide scores by the running standard deviation of all scores so far
    reward_clip: PositiveFloat | None = None  # scores are cut to ± this, after scaling
    whiten_advantages: bool = True
    max_tokens_per_microbatch: PositiveInt | None = None
    gradient_checkpointing: bool = False  # compute layers again in the backward pass instead of keeping their results
    max_lag: Literal[0, 1] = 0
    importance_cap: Annotated[float, Field(ge=1.0)] = 2.0  # upper limit of the correction for stale rollouts

    @model_validator(mode="after")
    def _check(self) -> "PpoSection":
        if self.batch_size % self.responses_per_prompt:
            raise ValueError(
                f"batch_size: counts responses; found: {self.batch_size}; expected: a multiple of responses_per_prompt "
                f"{self.responses_per_prompt}"
            )
        if self.batch_size % self.minibatches:
            raise ValueError(
                f"batch_size: every optimizer step sees as many responses; found: {self.batch_size}; expected: a multiple "
                f"of minibatches {self.minibatches}"
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


class ValueModelSection(Section):
    """Where the value function starts from."""

    init: str | None = None  # null: lora → adapter and head on the base, full → copy of the policy; or a model path


class ReferenceSection(Section):
    """What the KL penalty is measured against."""

    path: str | None = None  # null: the starting policy


class EvalSection(Section):
    """Responses on data.eval, scored by the same sources."""

    every: PositiveInt = 20  # steps
    rows: PositiveInt = 64
    greedy: bool = True  # false: sampled as in training
