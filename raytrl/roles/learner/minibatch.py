"""What an update adds up: the losses of micro-batches, and the sums that its metrics come from."""

from dataclasses import dataclass
from typing import Generic, NamedTuple, TypeVar

import torch
from torch import Tensor

from raytrl.algo.losses import PolicyLoss, ValueLoss, policy_loss, value_loss
from raytrl.config.sections.ppo import PpoSection
from raytrl.roles.learner.collectives import sum_over_workers
from raytrl.roles.learner.experience import Experience

T = TypeVar("T")


@dataclass(frozen=True)
class Divisors:
    """What the losses of a minibatch are divided by, over all workers."""

    tokens: float  # that are trained: of the value loss and of metrics
    policy: float

    @classmethod
    def of(cls, loss_mean: str, num_tokens: float, num_kept: float, max_new_tokens: int | None) -> "Divisors":
        """`num_kept`: responses of the minibatch, those that train nothing included, as TRL counts them."""
        if loss_mean == "tokens":
            return cls(num_tokens, num_tokens)
        if loss_mean == "responses":
            return cls(num_tokens, num_kept)
        assert max_new_tokens is not None
        return cls(num_tokens, num_kept * max_new_tokens)


class Part:
    """One micro-batch's slice of the experience, and its losses. N response tokens, of whole responses."""

    def __init__(
        self, experience: Experience, rows_N: Tensor, columns_N: Tensor, divisors: Divisors, config: PpoSection
    ) -> None:
        """`rows_N`, `columns_N`: each token's place in the experience."""
        self._experience, self._rows_N, self._columns_N = experience, rows_N, columns_N
        self._divisors, self._config = divisors, config
        self._mask_N = torch.ones_like(rows_N, dtype=torch.bool)

    def _cut(self, x_BR: Tensor) -> Tensor:
        return x_BR[self._rows_N, self._columns_N]

    def policy_loss(self, logprobs_N: Tensor) -> PolicyLoss:
        experience, config = self._experience, self._config
        shares_N = None
        if config.loss_mean == "responses":
            shares_N = 1.0 / experience.samples.sequences.response_lengths_B[self._rows_N].to(logprobs_N.dtype)
        return policy_loss(
            logprobs_N,
            logprobs_N.detach() if experience.old_logprobs_BR is None else self._cut(experience.old_logprobs_BR),
            self._cut(experience.advantages_BR),
            self._mask_N,
            clip_range=config.clip_range,
            clip_range_high=config.clip_range_high,
            ratio_limit=config.ratio_limit,
            cispo=config.loss == "cispo",
            rows_BR=self._rows_N if config.ratio == "sequence" else None,
            divisor=self._divisors.policy,
            shares_BR=shares_N,
            weights_BR=None if experience.importance_BR is None else self._cut(experience.importance_BR),
            ref_logprobs_BR=None if experience.ref_logprobs_BR is None else self._cut(experience.ref_logprobs_BR),
            kl_coef=experience.kl_coef,
        )

    def value_loss(self, values_N: Tensor) -> ValueLoss:
        assert self._experience.values_BR is not None and self._experience.returns_BR is not None
        return value_loss(
            values_N,
            self._cut(self._experience.values_BR),
            self._cut(self._experience.returns_BR),
            self._mask_N,
            clip_range=self._config.value_clip_range,
            divisor=self._divisors.tokens,
        )


class _Sums(NamedTuple, Generic[T]):
    """What is added up over parts, and over workers in one call; over response tokens, where it says sum."""

    policy_loss: T
    kl_loss: T
    value_loss: T
    approxkl_sum: T
    policy_clipped_sum: T
    value_clipped_sum: T
    ratio_sum: T
    ratio_square_sum: T
    entropy_sum: T


class Totals:
    """Sums over the parts of a step's update, added over workers once at its end."""

    def __init__(self, device: torch.device, config: PpoSection) -> None:
        self._config = config
        self._sums = torch.zeros(len(_Sums._fields), dtype=torch.float64, device=device)
        self._norms: list[float] = []
        self._num_tokens = 0.0
        self.max_log_ratio = torch.zeros((), device=device)
        self.first_log_ratio = 0.0

    @property
    def optimizer_steps(self) -> int:
        return len(self._norms)

    def add_part(self, policy: PolicyLoss, value: ValueLoss | None, entropy_sum: Tensor) -> None:
        zero = torch.zeros_like(entropy_sum)
        sums = _Sums(
            policy_loss=policy.loss.detach() - policy.kl_loss,
            kl_loss=policy.kl_loss,
            value_loss=zero if value is None else value.loss,
            approxkl_sum=policy.approxkl_sum,
            policy_clipped_sum=policy.clipped_sum,
            value_clipped_sum=zero if value is None else value.clipped_sum,
            ratio_sum=policy.ratio_sum,
            ratio_square_sum=policy.ratio_square_sum,
            entropy_sum=entropy_sum,
        )
        self._sums += torch.stack([x.detach().double() for x in sums])
        self.max_log_ratio = torch.maximum(self.max_log_ratio, policy.max_log_ratio)

    def add_step(self, norm: float, num_tokens: float) -> None:
        self._norms.append(norm)
        self._num_tokens += num_tokens

    def metrics(self) -> dict[str, float]:
        """Token means over all epochs; losses and gradient norm are means over optimizer steps."""
        sums: _Sums[float] = _Sums(*sum_over_workers(self._sums).tolist())
        steps, tokens = max(1, self.optimizer_steps), max(1.0, self._num_tokens)
        ratio = sums.ratio_sum / tokens
        of_critic = {"loss/value_avg": sums.value_loss / steps, "val/clipfrac_avg": sums.value_clipped_sum / tokens}
        has_kl_loss = self._config.kl.place == "loss" and self._config.kl.coef > 0
        return {
            "loss/policy_avg": sums.policy_loss / steps,
            **({"loss/kl_avg": sums.kl_loss / steps} if has_kl_loss else {}),
            **(of_critic if self._config.has_critic else {}),
            "policy/approxkl_avg": sums.approxkl_sum / tokens,
            "policy/clipfrac_avg": sums.policy_clipped_sum / tokens,
            "val/ratio": ratio,
            "val/ratio_var": max(sums.ratio_square_sum / tokens - ratio * ratio, 0.0),
            "policy/entropy_avg": sums.entropy_sum / tokens,
            "val/grad_norm": sum(self._norms) / steps,
        }
