"""Losses of policy and value function. B sequences, R response width.

Each loss is a sum over this worker's tokens, each times its share, divided by a *global* number of the minibatch. Added
over micro-batches and workers it is one mean over the minibatch, however that was cut up.
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
    """`loss` carries the gradient; the others are detached, those named sum to be divided by the token count."""

    loss: Tensor
    kl_loss: Tensor  # the part of `loss` that is the KL penalty
    approxkl_sum: Tensor  # ½ (log ratio)², as in lm-human-preferences
    clipped_sum: Tensor  # tokens whose ratio was cut
    ratio_sum: Tensor
    ratio_square_sum: Tensor
    max_log_ratio: Tensor  # largest |log ratio| of a token


def policy_loss(
    logprobs_BR: Tensor,
    old_logprobs_BR: Tensor,
    advantages_BR: Tensor,
    mask_BR: Tensor,
    *,
    clip_range: float,
    clip_range_high: float | None = None,
    ratio_limit: float | None = None,
    cispo: bool = False,
    rows_BR: Tensor | None = None,
    divisor: float,
    shares_BR: Tensor | None = None,
    weights_BR: Tensor | None = None,
    ref_logprobs_BR: Tensor | None = None,
    kl_coef: float = 0.0,
) -> PolicyLoss:
    """Σ share · (weight · surrogate + kl_coef · KL) / divisor.

    The surrogate with ρ the probability ratio of new to old, a token's:
        max(−A·min(ρ, limit), −A·clip(ρ, 1 − clip_range, 1 + clip_range_high)): PPO (Schulman et al. 2017, eq. 7), with
            another upper range DAPO (arXiv 2503.14476), with a limit dual clip (1912.09729; `delta` in TRL);
        −sg[min(ρ, limit)]·A·log π where `cispo` (2506.13585): no token loses its gradient.
    The KL penalty is ρ·k3, whose gradient at ρ = 1 is that of the reverse KL at each token (TRL's
    `use_bias_correction_kl`); k3 alone would be the forward one.

    Args:
        clip_range_high: None is `clip_range`.
        rows_BR: which response a token belongs to: ρ is then one number a response, the exponential of its mean log-ratio
            (GSPO, 2507.18071). None: ρ is the token's own.
        divisor: a number of the minibatch over all workers: tokens, responses …
        shares_BR: what a token counts in the mean; None is 1.
        weights_BR: of samples that other weights made (`importance.importance_weights`); None is 1. The KL penalty is not
            weighted.
        ref_logprobs_BR: of the reference, where there is a KL penalty.
    """
    high = clip_range if clip_range_high is None else clip_range_high
    log_ratio_BR = torch.where(mask_BR, logprobs_BR - old_logprobs_BR, torch.zeros_like(logprobs_BR))
    own_log_ratio_BR = log_ratio_BR
    if rows_BR is not None:
        log_ratio_BR = _row_means(log_ratio_BR, mask_BR, rows_BR)
    ratio_BR = log_ratio_BR.clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO).exp()
    limited_BR = ratio_BR if ratio_limit is None else ratio_BR.clamp(max=ratio_limit)
    if cispo:
        losses_BR = -limited_BR.detach() * advantages_BR * torch.where(mask_BR, logprobs_BR, torch.zeros_like(ratio_BR))
        cut_BR = ratio_BR > limited_BR
    else:
        plain_BR = -advantages_BR * limited_BR
        clipped_BR = -advantages_BR * ratio_BR.clamp(1 - clip_range, 1 + high)
        losses_BR = torch.maximum(plain_BR, clipped_BR)
        cut_BR = (clipped_BR > plain_BR) | ((ratio_BR > limited_BR) & (advantages_BR < 0))
    if weights_BR is not None:
        losses_BR = losses_BR * weights_BR

    def mean(x_BR: Tensor) -> Tensor:
        return masked_sum(x_BR if shares_BR is None else x_BR * shares_BR, mask_BR) / divisor

    kl_loss = losses_BR.new_zeros(())
    if ref_logprobs_BR is not None:
        away_BR = torch.where(mask_BR, ref_logprobs_BR - logprobs_BR, torch.zeros_like(logprobs_BR))
        away_BR = away_BR.clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO)
        kl_loss = mean(kl_coef * ratio_BR * (torch.expm1(away_BR) - away_BR))
    loss = mean(losses_BR) + kl_loss
    with torch.no_grad():
        return PolicyLoss(
            loss=loss,
            kl_loss=kl_loss.detach(),
            approxkl_sum=masked_sum(own_log_ratio_BR.square() / 2, mask_BR),
            clipped_sum=masked_sum(cut_BR.float(), mask_BR),
            ratio_sum=masked_sum(ratio_BR, mask_BR),
            ratio_square_sum=masked_sum(ratio_BR.square(), mask_BR),
            max_log_ratio=own_log_ratio_BR.abs().max() if own_log_ratio_BR.numel() else own_log_ratio_BR.new_zeros(()),
        )


def _row_means(x_BR: Tensor, mask_BR: Tensor, rows_BR: Tensor) -> Tensor:
    """At each token the mean over the real tokens of its row; `x_BR` is 0 where there is none."""
    rows = rows_BR.flatten()
    zeros = x_BR.new_zeros(int(rows.max()) + 1 if rows.numel() else 0)
    sums, counts = zeros.index_add(0, rows, x_BR.flatten()), zeros.index_add(0, rows, mask_BR.flatten().to(x_BR.dtype))
    return torch.where(mask_BR, (sums / counts.clamp(min=1))[rows_BR], torch.zeros_like(x_BR))


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
    divisor: float,
) -> ValueLoss:
    """Σ ½·max((V − R)², (V_old + clip(V − V_old, ±clip_range) − R)²) / divisor (lm-human-preferences).

    `clip_range` None leaves the plain squared error.
    """
    squares_BR = (values_BR - returns_BR).square()
    if clip_range is None:
        return ValueLoss(0.5 * masked_sum(squares_BR, mask_BR) / divisor, squares_BR.new_zeros(()))
    near_BR = old_values_BR + (values_BR - old_values_BR).clamp(-clip_range, clip_range)
    near_squares_BR = (near_BR - returns_BR).square()
    with torch.no_grad():
        clipped_sum = masked_sum((near_squares_BR > squares_BR).float(), mask_BR)
    loss = 0.5 * masked_sum(torch.maximum(squares_BR, near_squares_BR), mask_BR) / divisor
    return ValueLoss(loss, clipped_sum)
