"""Sums and moments over the real tokens of padded tensors.

Masks are boolean. Everything that is compared over workers is a *sum* in float64, to be added up over all workers
before it is divided, so that the number of workers changes nothing. A value under a False mask is never read, not even
multiplied by zero: NaN in the padding stays there.
"""

from dataclasses import dataclass

import torch
from torch import Tensor


def masked_sum(x: Tensor, mask: Tensor) -> Tensor:
    """Sum of `x` where `mask`; both of one shape. A scalar of x's dtype."""
    return torch.where(mask, x, torch.zeros_like(x)).sum()


def masked_mean(x: Tensor, mask: Tensor) -> Tensor:
    """Mean of `x` where `mask`; 0 where the mask is empty."""
    return masked_sum(x, mask) / mask.sum().clamp(min=1)


def moment_sums(x: Tensor, mask: Tensor) -> Tensor:
    """(count, sum, sum of squares) of `x` where `mask`: float64 of shape (3,); add over workers, then `Moments.of`."""
    real = torch.where(mask, x, torch.zeros_like(x)).double()
    return torch.stack([mask.sum().double(), real.sum(), (real * real).sum()])


@dataclass(frozen=True)
class Moments:
    """Mean and biased variance (divided by the count, as in OpenAI's lm-human-preferences)."""

    count: float
    mean: float
    variance: float

    @classmethod
    def of(cls, sums: Tensor) -> "Moments":
        """From `moment_sums`, added over workers; all zero for a count of 0."""
        count, total, squares = (float(value) for value in sums)
        if count == 0:
            return cls(0.0, 0.0, 0.0)
        mean = total / count
        return cls(count, mean, max(squares / count - mean * mean, 0.0))


def whiten(x: Tensor, mask: Tensor, moments: Moments) -> Tensor:
    """(x − mean) / sqrt(variance + 1e-8) where `mask`, 0 elsewhere (lm-human-preferences `whiten`)."""
    white = (x - moments.mean) * (moments.variance + 1e-8) ** -0.5
    return torch.where(mask, white, torch.zeros_like(white))


def explained_variance(returns: Tensor, values: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
    """Moment sums of (returns − values) and of returns; 1 − Var[first]/Var[second] is what the critic explains."""
    return moment_sums(returns - values, mask), moment_sums(returns, mask)
