"""Advantages without a critic: each response against the others to its prompt. B responses, G of a prompt's group.

Statistics are over a row's kept responses, in float64: a response whose score was dropped is in no mean, no deviation
and no count, and a response that is alone in its group has advantage 0.
"""

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from raytrl.algo.masked import Moments

Baseline = Literal["group_mean", "leave_one_out"]
AdvantageScale = Literal["none", "group", "batch"]

EPSILON = 1e-4  # TRL's, added to a deviation: what rounding alone makes of equal scores stays near 0


@dataclass(frozen=True)
class Groups:
    """Who is in a group with whom, and the moments of each group. K groups."""

    rows_K: Tensor  # whose group it is
    places_B: Tensor  # which of the K groups a response belongs to
    counts_K: Tensor
    means_K: Tensor
    deviations_K: Tensor  # unbiased; 0 for a group of one
    spreads_K: Tensor  # largest less smallest

    @classmethod
    def of(cls, values_B: Tensor, rows_B: Tensor) -> "Groups":
        """Groups of the same row, never of the same text: two rows with one prompt are two groups."""
        values_B = values_B.double()
        rows_K, places_B = torch.unique(rows_B, return_inverse=True)
        zeros_K = values_B.new_zeros(len(rows_K))
        counts_K = zeros_K.index_add(0, places_B, torch.ones_like(values_B))
        means_K = zeros_K.index_add(0, places_B, values_B) / counts_K.clamp(min=1)
        squares_K = zeros_K.index_add(0, places_B, (values_B - means_K[places_B]).square())
        low_K = zeros_K.scatter_reduce(0, places_B, values_B, "amin", include_self=False)
        high_K = zeros_K.scatter_reduce(0, places_B, values_B, "amax", include_self=False)
        deviations_K = (squares_K / (counts_K - 1).clamp(min=1)).sqrt()
        return cls(rows_K, places_B, counts_K, means_K, deviations_K, high_K - low_K)

    @property
    def differ_K(self) -> Tensor:
        """Which hold values that differ by more than rounding; bool."""
        return (self.counts_K > 1) & (self.spreads_K > 1e-6 * self.means_K.abs().clamp(min=1))

    def sums(self) -> Tensor:
        """Of the groups of two or more: (how many, how many differ, sum of deviations); float64 of shape (3,), to be added
        over workers."""
        real_K = self.counts_K > 1
        return torch.stack([real_K.sum().double(), self.differ_K.sum().double(), self.deviations_K[real_K].sum()])


def group_advantages(
    values_B: Tensor, rows_B: Tensor, *, baseline: Baseline, scale: AdvantageScale, batch: Moments | None = None
) -> Tensor:
    """What a response was worth beyond its group: one number a response, float64 (B,).

    `group_mean`: R − mean over the group, the own response included (GRPO, arXiv 2402.03300; without a scale Dr. GRPO,
    2503.20783). `leave_one_out`: R − mean of the others = n/(n−1)·(R − mean) (RLOO, 2402.14740). Scaled by 1/(std + 1e-4)
    with the group's unbiased standard deviation, or with that of the batch's values as they are, as TRL does.

    Args:
        values_B: one worth a response, whatever is to be in it.
        rows_B: the prompt's row of each.
        batch: moments of the values over all workers, where the scale is that of the batch.
    """
    groups = Groups.of(values_B, rows_B)
    counts_B, deviations_B = groups.counts_K[groups.places_B], groups.deviations_K[groups.places_B]
    centred_B = values_B.double() - groups.means_K[groups.places_B]
    if baseline == "leave_one_out":
        centred_B = centred_B * counts_B / (counts_B - 1).clamp(min=1)
    if scale == "group":
        centred_B = centred_B / (deviations_B + EPSILON)
    elif scale == "batch":
        assert batch is not None
        unbiased = (batch.variance * batch.count / max(batch.count - 1, 1)) ** 0.5
        centred_B = centred_B / (unbiased + EPSILON)
    return torch.where(counts_B > 1, centred_B, torch.zeros_like(centred_B))
