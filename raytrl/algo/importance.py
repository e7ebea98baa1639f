"""Samples that other weights made: what they count, and how far they are from today's policy. B responses, R width.

A token's ratio corrects that token alone, not the text before it nor the score behind it: once responses are longer than a
token most of the bias stays, and what is gained is a bounded variance. The product over a response corrects all of it, as
long as responses are near: the variance of its logarithm is about twice the KL of a whole response. `sampling_kl` and
`effective_sample_size` say where a run is.
"""

from typing import Literal

import torch
from torch import Tensor

from raytrl.algo.losses import MAX_LOG_RATIO


def importance_weights(
    old_logprobs_BR: Tensor,
    sampling_logprobs_BR: Tensor,
    mask_BR: Tensor,
    *,
    level: Literal["token", "sequence"] = "token",
    mode: Literal["truncate", "mask"] = "truncate",
    low: float | None = None,
    high: float | None = None,
) -> Tensor:
    """π_old / π_sampling, kept between `low` and `high`: detached, 1 on padding.

    Of a token (truncated: Espeholt et al. 2018, ρ-bar of V-trace; masked: a token outside counts nothing), or the product
    over a response, which all its tokens get. Where the sampler's log-prob is NaN it is not known, and nothing is corrected.
    """
    known_BR = mask_BR & sampling_logprobs_BR.isfinite()
    log_ratio_BR = torch.where(known_BR, old_logprobs_BR - sampling_logprobs_BR, torch.zeros_like(old_logprobs_BR))
    if level == "sequence":
        log_ratio_BR = log_ratio_BR.sum(-1, keepdim=True).expand_as(log_ratio_BR)
    ratio_BR = log_ratio_BR.detach().clamp(max=MAX_LOG_RATIO).exp()
    kept_BR = ratio_BR.clamp(min=low, max=high) if low is not None or high is not None else ratio_BR
    if mode == "mask":
        kept_BR = torch.where(kept_BR == ratio_BR, ratio_BR, torch.zeros_like(ratio_BR))
    return torch.where(mask_BR, kept_BR, torch.ones_like(kept_BR))


def sampling_kl(old_logprobs_BR: Tensor, sampling_logprobs_BR: Tensor, mask_BR: Tensor) -> Tensor:
    """KL(π_sampling ‖ π_old) of each response, nats (B,): the sum of k3 over its tokens, of which each is 0 or more.

    Schulman, "Approximating KL divergence" (2020), with the ratio of π_old to what the samples are from.
    """
    known_BR = mask_BR & sampling_logprobs_BR.isfinite()
    log_ratio_BR = torch.where(
        known_BR, old_logprobs_BR - sampling_logprobs_BR, torch.zeros_like(old_logprobs_BR)
    ).double()
    log_ratio_BR = log_ratio_BR.clamp(max=MAX_LOG_RATIO)
    return (torch.expm1(log_ratio_BR) - log_ratio_BR).sum(-1)


def weight_sums(old_logprobs_BR: Tensor, sampling_logprobs_BR: Tensor, mask_BR: Tensor) -> Tensor:
    """Σ w and Σ w² over responses, w the product of a response's ratios: float64 (2,), to be added over workers."""
    weights_B = importance_weights(old_logprobs_BR.double(), sampling_logprobs_BR.double(), mask_BR, level="sequence")[
        :, 0
    ]
    return torch.stack([weights_B.sum(), weights_B.square().sum()])


def effective_sample_size(sums: Tensor, num_responses: int) -> float:
    """(Σ w)² / (N Σ w²) (Kong 1992): 1 where all samples count the same, 1/N where one counts for all."""
    total, squares = sums.tolist()
    return total * total / (num_responses * squares) if squares > 0 else 0.0
