"""`ppo`, `value_model`, `reference` and `eval`: the algorithm, and what it starts from."""

from typing import Annotated, Any, Literal

from pydantic import Field, ModelWrapValidatorHandler, PositiveFloat, PositiveInt, model_validator

from raytrl.config.sections.algorithms import PRESETS, Algorithm
from raytrl.config.sections.base import Section

Fraction = Annotated[float, Field(ge=0.0, le=1.0)]


# What the backward pass of one micro-batch keeps, in bytes: a share of any GPU, and enough tokens to fill it with work.
MICROBATCH_BYTES = {"gpu": 4 * 2**30, "cpu": 2 * 2**30}
# What a backward pass needs of a layer, as a multiple of its linear layers' inputs and outputs: norms, residuals,
# rotary embeddings and the attention output come on top. Fitted to float32 runs on a CPU; counted by hand for a Qwen3
# layer in bfloat16, whose norms work in float32, it is the same.
KEPT = 1.5
# Token ids whose log-probs are computed at a time: on a CPU they stay in its caches; a GPU wants large matrix products.
HEAD_CHUNK = {"gpu": 32768, "cpu": 1024}
LOGIT_BYTES = 16  # of a logit that is held: itself, its gradient, and the float32 copies of both


class KlSection(Section):
    """The KL penalty."""

    place: Literal["reward", "loss"] = "reward"
    """reward: each token's KL is part of what it earned, later KL too (k1). loss: each token is pulled by its own (k3 times the
    ratio), another optimum for responses of several tokens."""

    coef: Annotated[float, Field(ge=0.0)] = 0.05
    """What a nat of KL costs in reward: the coefficient, or with a target the one to start from."""
    target: PositiveFloat | None = None
    """KL in nats a response that the coefficient adapts towards. null: the coefficient stays."""
    horizon: PositiveInt = 10000
    """With a target: in so many responses the coefficient changes by about a fifth at most (Ziegler et al. 2019)."""

    @model_validator(mode="after")
    def _check(self) -> "KlSection":
        if self.target is not None and self.coef == 0.0:
            raise ValueError("coef: target adapts it by factors, and 0 stays 0; found: 0; expected: a positive coef")
        return self


class ImportanceSection(Section):
    """Weights for samples that other weights made, or that an engine's arithmetic made: π_old / π_sampling."""

    level: Literal["token", "sequence"] = "token"
    """token: each has its own ratio. sequence: the product over the response, which spreads as responses grow."""
    mode: Literal["truncate", "mask"] = "truncate"
    """Ratios beyond low or high are moved there (truncate), or count nothing (mask)."""
    low: PositiveFloat | None = None
    """The least that counts. null: 0."""
    high: PositiveFloat | None = 2.0
    """The most that counts. null: no limit."""

    @model_validator(mode="after")
    def _check(self) -> "ImportanceSection":
        if (self.low or 0.0) > 1.0 or (self.high or 1.0) < 1.0:
            raise ValueError(
                f"low and high: must leave room for 1, a sample of the same weights; found: {self.low}, {self.high}"
            )
        return self


class PpoSection(Section):
    """The algorithm: one step is one rollout batch and its updates."""

    algorithm: Algorithm = "ppo"
    """ppo learns a value function; grpo, dr_grpo, dapo, gspo, cispo, rloo, reinforce and reinforce_baseline need none. It sets
    defaults of the keys below, any of which can be written beside it."""
    steps: PositiveInt = 200
    """How many steps the run has; one is a batch of responses and the updates from it."""
    batch_size: PositiveInt = 64
    """Responses a step, over all learner workers."""
    responses_per_prompt: PositiveInt = 1
    """Responses to each prompt; a step has batch_size / responses_per_prompt prompts."""
    candidates: PositiveInt = 1
    """So many times as many prompts are sampled, and the first ones learned from whose responses differ in score, as cut and
    penalised, and are trained (dynamic sampling). It costs so many times the sampling, always."""
    epochs: PositiveInt = 4
    """How often the updates of a step go through its responses."""
    minibatches: PositiveInt = 4
    """Equal parts of a step's responses, each an optimizer step; so many in every epoch."""
    learning_rate: PositiveFloat = 1.0e-5
    """Of the policy, at the start of the run."""
    value_learning_rate: PositiveFloat | None = None
    """Of the value function, at the start of the run. null: learning_rate."""
    lr_schedule: Literal["linear", "cosine", "constant"] = "linear"
    """How the learning rates fall over the run: to 0 in a line, to 0 along half a cosine, or not at all."""
    adam_epsilon: PositiveFloat = 1.0e-5
    """Adam's epsilon, which keeps its step finite where gradients vanish."""
    max_grad_norm: PositiveFloat = 1.0
    """The gradient of policy and value function together is scaled down where its norm is greater."""
    gamma: Fraction = 1.0
    """Discount of rewards, a token. 1: none."""
    lam: Fraction = 0.95
    """λ of generalised advantage estimation. 1: whole returns; 0: one step of the value function."""
    advantage: Literal["critic", "group_mean", "leave_one_out", "none"] = "critic"
    """What a response is compared with: a value function's estimates (critic), the mean over the responses to its prompt
    (group_mean), the mean of the others (leave_one_out), nothing (none)."""
    advantage_scale: Literal["none", "group", "batch"] = "none"
    """What the difference is divided by: the standard deviation, over the prompt's group or over the batch, of what responses
    are worth, a KL in the reward included; or nothing."""
    loss: Literal["clip", "cispo"] = "clip"
    """clip: what leaves the clip range has no gradient. cispo: every token has one, weighted by its ratio up to ratio_limit."""
    loss_mean: Literal["tokens", "responses", "max_tokens"] = "tokens"
    """What each counts in the loss: each token of the minibatch the same (tokens), each response the same (responses), each
    token 1 / max_new_tokens of a response (max_tokens)."""
    ratio: Literal["token", "sequence"] = "token"
    """The ratio of new to old probability: of a token, or of a whole response, per token of it."""
    clip_range: PositiveFloat = 0.2
    """The ratio of new to old probability is clipped to 1 ± this."""
    clip_range_high: PositiveFloat | None = None
    """Upwards to 1 + this. null: clip_range."""
    ratio_limit: Annotated[float, Field(ge=1.0)] | None = None
    """No ratio counts for more than this: with clip where the advantage is negative (dual clip), with cispo everywhere."""
    train_unfinished: bool = True
    """false: a response that was cut before it ended trains nothing, but stays in its group."""
    value_clip_range: PositiveFloat | None = 0.2
    """A value counts within ± this of the one before the step's updates. null: no clipping."""
    value_coef: Annotated[float, Field(ge=0.0)] = 0.1
    """Weight of the value loss beside the policy loss."""
    kl: KlSection = KlSection()
    """The KL penalty: what keeps the policy near its reference. With coef 0 there is none, and no reference is loaded."""
    missing_eos_penalty: Annotated[float, Field(ge=0.0)] | None = None
    """Subtracted from the score of a response that was cut before it ended. null: nothing is."""
    reward_scaling: bool = False
    """Whether scores are divided by the running standard deviation of all scores so far."""
    reward_clip: PositiveFloat | None = None
    """Scores are cut to ± this, after scaling. null: they are not."""
    whiten_advantages: bool = True
    """Whether advantages are brought to mean 0 and variance 1 over all tokens of the step."""
    max_tokens_per_microbatch: PositiveInt | None = None
    """Tokens in one forward pass of a learner worker. null: as many as keep about 4 GiB on a GPU, 2 GiB on a CPU, for the
    backward pass, at most 16384."""
    gradient_checkpointing: bool = False
    """Whether layers are computed again in the backward pass instead of keeping their results: less memory, more time."""
    max_lag: Annotated[int, Field(ge=0, le=8)] = 0
    """So many batches are sampled ahead while one is learned from: that of step s by the weights of step s - max_lag, exactly. 0:
    in turn."""
    importance: ImportanceSection | None = None
    """How samples are weighted that other weights made. Left out: as tokens, truncated at 2, with a max_lag, else null. null: not
    at all."""

    @model_validator(mode="wrap")
    @classmethod
    def _defaults_of_the_algorithm(cls, values: Any, build: ModelWrapValidatorHandler["PpoSection"]) -> "PpoSection":
        """What nobody wrote is the algorithm's, and stays unwritten."""
        if not isinstance(values, dict):
            return build(values)
        merged = dict(values)
        preset = dict(PRESETS.get(str(merged.get("algorithm")), {}))
        preset_kl, kl = preset.pop("kl", {}), merged.get("kl") or {}
        if merged.get("max_lag") not in (None, 0):
            preset["importance"] = {}
        added, added_kl = preset.keys() - merged.keys(), set[str]()
        merged |= {key: preset[key] for key in added}
        if preset_kl and isinstance(kl, dict):
            added_kl = preset_kl.keys() - kl.keys()
            added |= set() if kl else {"kl"}
            merged["kl"] = preset_kl | kl
        found = build(merged)
        found.__pydantic_fields_set__.difference_update(added)
        found.kl.__pydantic_fields_set__.difference_update(added_kl)
        return found

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
        problems = self._contradictions()
        if problems:
            raise ValueError("\n".join(problems))
        return self

    def _contradictions(self) -> list[str]:
        """Keys that cannot both be meant."""
        problems = []
        if self.in_groups and self.responses_per_prompt < 2:
            problems.append(
                f"responses_per_prompt: advantage {self.advantage} compares the responses to a prompt; found: "
                f"{self.responses_per_prompt}; expected: 2 or more"
            )
        if not self.in_groups and self.candidates > 1:
            problems.append(
                f"candidates: are chosen by how the responses to a prompt differ, which advantage {self.advantage} does not "
                f"compare; found: {self.candidates}; expected: 1"
            )
        if not self.in_groups and self.advantage_scale != "none":
            problems.append(
                f"advantage_scale: there is no group to take it from with advantage {self.advantage}; found: "
                f"{self.advantage_scale}; expected: none"
            )
        if self.advantage_scale == "group" and self.whiten_advantages:
            problems.append(
                "whiten_advantages: advantages would be scaled twice; found: true with advantage_scale group; expected: one "
                "of the two"
            )
        if self.ratio == "sequence" and self.loss_mean != "responses":
            problems.append(
                f"loss_mean: with ratio sequence all tokens of a response have one gradient, and the longer would count more; "
                f"found: {self.loss_mean}; expected: responses"
            )
        high = self.clip_range if self.clip_range_high is None else self.clip_range_high
        if self.loss == "cispo" and self.ratio_limit is None:
            problems.append(
                "ratio_limit: missing; loss cispo has no other limit; expected: an absolute ratio, such as 5"
            )
        if self.loss == "clip" and self.ratio_limit is not None and self.ratio_limit <= 1 + high:
            problems.append(
                f"ratio_limit: the clip range ends at {1 + high:g} already; found: {self.ratio_limit:g}; expected: more, such "
                f"as 3, or null"
            )
        return problems

    @property
    def in_groups(self) -> bool:
        """Whether the responses to a prompt are compared with one another."""
        return self.advantage in ("group_mean", "leave_one_out")

    @property
    def has_critic(self) -> bool:
        """Whether a value function is learned."""
        return self.advantage == "critic"

    @property
    def is_one_step(self) -> bool:
        """Whether every batch has one optimizer step: then every ratio of new to old is 1."""
        return self.epochs * self.minibatches == 1

    def version_of(self, step: int) -> int:
        """The version of the weights that make the batch of a step."""
        return max(0, step - self.max_lag)

    def lanes(self, versions: int) -> int:
        """Batches that may be on their way at a time, where an engine holds so many versions: with more than the lag one is
        always idle."""
        return self.max_lag + 1 if versions > self.max_lag else self.max_lag

    def microbatch_tokens(self, token_bytes: float, on_gpu: bool) -> int:
        """Tokens in one forward pass of the learner, of each of which a backward pass needs `token_bytes`."""
        if self.max_tokens_per_microbatch is not None:
            return self.max_tokens_per_microbatch
        return min(16384, max(1, int(MICROBATCH_BYTES["gpu" if on_gpu else "cpu"] / token_bytes)))

    @property
    def prompts_per_step(self) -> int:
        """Prompts that a step samples."""
        return self.candidates * self.batch_size // self.responses_per_prompt


class ValueModelSection(Section):
    """Where the value function starts from."""

    init: str | None = None
    """A model to start from, such as a reward model, whose head is kept. null: a copy of the policy with a new head, with
    lora an adapter and a head on the policy's base."""

    shared: bool = False
    """true: a head on the policy's own last layer. One network learns in place of two, in one pass, and both losses train it."""

    @model_validator(mode="after")
    def _check(self) -> "ValueModelSection":
        if self.shared and self.init is not None:
            raise ValueError(
                f"init: a shared value function is a new head on the policy; found: {self.init!r}; leave it out"
            )
        return self


class ReferenceSection(Section):
    """What the KL penalty is measured against."""

    path: str | None = None
    """Hugging Face id or local folder. null: the starting policy, with lora the base without its adapter."""


class EvalSection(Section):
    """Responses on data.eval, scored by the same sources."""

    every: PositiveInt = 20
    """Steps between two evaluations. The last step always has one."""
    rows: PositiveInt = 64
    """The first rows of data.eval, the same at every evaluation."""
    greedy: bool = True
    """true: the likeliest token each time, one response a prompt. false: sampled as in training."""


def activation_bytes(linear_width: int, hidden: int, layers: int, size: int, recomputed: bool) -> float:
    """What the backward pass needs of a token: inputs and outputs of all layers, or of one where layers are recomputed.

    Args:
        linear_width: inputs and outputs of all linear layers below the head, numbers a token.
        size: bytes of a number in the forward pass.
    """
    one_layer = KEPT * linear_width / max(1, layers)
    kept = hidden * layers if recomputed else KEPT * linear_width
    return (kept + 2 * one_layer) * size  # beside the gradients of the layer in hand
