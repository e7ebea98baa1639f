"""PPO's losses (Schulman et al. 2017). B sequences, R response width.

Each loss is a sum over this worker's tokens divided by the *global* token count of the minibatch. Added over
micro-batches and workers it is the token mean over the minibatch, however that was cut up.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from raytrl.algo.masked import masked_sum

# e^20 is far beyond any clip range and still finite in float32, squared too: it keeps one wild token from making the
# whole gradient infinite.
MAX_LOG_RATIO = 20.0


@dataclass(frozen=True)
class PolicyLoss:
    """`loss` carries the gradient; the others are detached sums over tokens, to be divided by the token count."""

    loss: Tensor
    approxkl_sum: Tensor  # ½ (log ratio)², as in lm-human-preferences
    clipped_sum: Tensor  # tokens where the clipped term is the larger one
    ratio_sum: Tensor
    ratio_square_sum: Tensor
    max_log_ratio: Tensor  # largest |log ratio|


def policy_loss(
    logprobs_BR: Tensor,
    old_logprobs_BR: Tensor,
    advantages_BR: Tensor,
    mask_BR: Tensor,
    *,
    clip_range: float,
    num_tokens: float,
    weights_BR: Tensor | None = None,
) -> PolicyLoss:
    """Σ max(−A·ratio, −A·clip(ratio, 1 ± clip_range)) / num_tokens (Schulman et al. 2017, eq. 7).

    Args:
        num_tokens: response tokens of the minibatch over all workers.
        weights_BR: importance weights of stale rollouts, `truncated_importance`; None is 1.
    """
    log_ratio_BR = torch.where(mask_BR, logprobs_BR - old_logprobs_BR, torch.zeros_like(logprobs_BR))
    ratio_BR = log_ratio_BR.clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO).exp()
    plain_BR = -advantages_BR * ratio_BR
    clipped_BR = -advantages_BR * ratio_BR.clamp(1 - clip_range, 1 + clip_range)
    losses_BR = torch.maximum(plain_BR, clipped_BR)
    if weights_BR is not None:
        losses_BR = losses_BR * weights_BR
    loss = masked_sum(losses_BR, mask_BR) / num_tokens
    with torch.no_grad():
        return PolicyLoss(
            loss=loss,
            approxkl_sum=masked_sum(log_ratio_BR.square() / 2, mask_BR),
            clipped_sum=masked_sum((clipped_BR > plain_BR).float(), mask_BR),
            ratio_sum=masked_sum(ratio_BR, mask_BR),
            ratio_square_sum=masked_sum(ratio_BR.square(), mask_BR),
            max_log_ratio=log_ratio_BR.abs().max() if log_ratio_BR.numel() else log_ratio_BR.new_zeros(()),
        )


@dataclass(frozen=True)
class ValueLoss:
    """`loss` carries the gradient; `clipped_sum` counts the tokens where the clipped square is the larger one."""

    loss: Tensor
    clipped_sum: Tensor


def value_loss(
    values_BR: Tensor,
    old_values_BR: Tensor,
    returns_BR: Tensor,
    mask_BR: Tensor,
    *,
    clip_range: float | None,
    num_tokens: float,
) -> ValueLoss:
    """Σ ½·max((V − R)², (V_old + clip(V − V_old, ±clip_range) − R)²) / num_tokens (lm-human-preferences).

    `clip_range` None leaves the plain squared error.
    """
    squares_BR = (values_BR - returns_BR).square()
    if clip_range is None:
        return ValueLoss(0.5 * masked_sum(squares_BR, mask_BR) / num_tokens, squares_BR.new_zeros(()))
    near_BR = old_values_BR + (values_BR - old_values_BR).clamp(-clip_range, clip_range)
    near_squares_BR = (near_BR - returns_BR).square()
    with torch.no_grad():
        clipped_sum = masked_sum((near_squares_BR > squares_BR).float(), mask_BR)
    loss = 0.5 * masked_sum(torch.maximum(squares_BR, near_squares_BR), mask_BR) / num_tokens
    return ValueLoss(loss, clipped_sum)


def truncated_importance(old_logprobs_BR: Tensor, sampling_logprobs_BR: Tensor, mask_BR: Tensor, cap: float) -> Tensor:
    """min(π_old / π_sampling, cap) a token, detached (Espeholt et al. 2018, ρ-bar of V-trace).

    1 on padding, and where the sampler's log-prob is NaN: it is not known, so nothing is corrected.
    """
    known_BR = mask_BR & sampling_logprobs_BR.isfinite()
    log_ratio_BR = torch.where(known_BR, old_logprobs_BR - sampling_logprobs_BR, torch.zeros_like(old_logprobs_BR))
    return log_ratio_BR.detach().clamp(max=MAX_LOG_RATIO).exp().clamp(max=cap)
