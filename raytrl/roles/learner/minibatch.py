"""What an update adds up: the losses of micro-batches, and the sums that its metrics come from."""

from typing import Generic, NamedTuple, TypeVar

import torch
from torch import Tensor

from raytrl.algo.losses import PolicyLoss, ValueLoss, policy_loss, value_loss
from raytrl.config.sections.ppo import PpoSection
from raytrl.roles.learner.collectives import sum_over_workers
from raytrl.roles.learner.experience import Experience

T = TypeVar("T")


class Part:
    """One micro-batch's slice of the experience, and its losses. N response tokens."""

    def __init__(
        self, experience: Experience, rows_N: Tensor, columns_N: Tensor, num_tokens: float, config: PpoSection
    ) -> None:
        """`rows_N`, `columns_N`: each token's place in the experience; `num_tokens`: see `algo.losses`."""
        self._experience, self._rows_N, self._columns_N = experience, rows_N, columns_N
        self._num_tokens, self._config = num_tokens, config
        self._mask_N = torch.ones_like(rows_N, dtype=torch.bool)

    def _cut(self, x_BR: Tensor) -> Tensor:
        return x_BR[self._rows_N, self._columns_N]

    def policy_loss(self, logprobs_N: Tensor) -> PolicyLoss:
        importance_BR = self._experience.importance_BR
        return policy_loss(
            logprobs_N,
            self._cut(self._experience.old_logprobs_BR),
            self._cut(self._experience.advantages_BR),
            self._mask_N,
            clip_range=self._config.clip_range,
            num_tokens=self._num_tokens,
            weights_BR=None if importance_BR is None else self._cut(importance_BR),
        )

    def value_loss(self, values_N: Tensor) -> ValueLoss:
        return value_loss(
            values_N,
            self._cut(self._experience.values_BR),
            self._cut(self._experience.returns_BR),
            self._mask_N,
            clip_range=self._config.value_clip_range,
            num_tokens=self._num_tokens,
        )


class _Sums(NamedTuple, Generic[T]):
    """What is added up over parts, and over workers in one call; over response tokens, where it says sum."""

    policy_loss: T
    value_loss: T
    approxkl_sum: T
    policy_clipped_sum: T
    value_clipped_sum: T
    ratio_sum: T
    ratio_square_sum: T
    entropy_sum: T


class Totals:
    """Sums over the parts of a step's update, added over workers once at its end."""

    def __init__(self, device: torch.device) -> None:
        self._sums = torch.zeros(len(_Sums._fields), dtype=torch.float64, device=device)
        self._norms: list[float] = []
        self._num_tokens = 0.0
        self.max_log_ratio = torch.zeros((), device=device)
        self.first_log_ratio = 0.0

    @property
    def optimizer_steps(self) -> int:
        return len(self._norms)

    def add_part(self, policy: PolicyLoss, value: ValueLoss, entropy_sum: Tensor) -> None:
        sums = _Sums(
            policy_loss=policy.loss,
            value_loss=value.loss,
            approxkl_sum=policy.approxkl_sum,
            policy_clipped_sum=policy.clipped_sum,
            value_clipped_sum=value.clipped_sum,
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
        return {
            "loss/policy_avg": sums.policy_loss / steps,
            "loss/value_avg": sums.value_loss / steps,
            "policy/approxkl_avg": sums.approxkl_sum / tokens,
            "policy/clipfrac_avg": sums.policy_clipped_sum / tokens,
            "val/clipfrac_avg": sums.value_clipped_sum / tokens,
            "val/ratio": ratio,
            "val/ratio_var": max(sums.ratio_square_sum / tokens - ratio * ratio, 0.0),
            "policy/entropy_avg": sums.entropy_sum / tokens,
            "val/grad_norm": sum(self._norms) / steps,
        }
