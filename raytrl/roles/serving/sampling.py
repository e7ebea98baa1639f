"""Tokens drawn from logits, each row by its own settings."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from raytrl.errors import NonFiniteError


@dataclass(frozen=True)
class Sampling:
    """How one response is sampled, and what is told of it."""

    temperature: float = 1.0  # 0: the likeliest token
    top_p: float = 1.0
    top_k: int = 0  # 0: all tokens
    stop: tuple[str, ...] = ()
    logprobs: int | None = None  # how many of the likeliest tokens are told beside each; None: none, nor its own


class Knobs:
    """Settings of the rows of a batch, as tensors."""

    def __init__(self, rows: Sequence[Sampling], device: torch.device) -> None:
        self._temperature_B = torch.tensor([row.temperature for row in rows], dtype=torch.float64, device=device)
        self._top_p_B = torch.tensor([row.top_p for row in rows], dtype=torch.float64, device=device)
        self._top_k_B = torch.tensor([row.top_k for row in rows], device=device)
        self._all_greedy = all(row.temperature == 0 for row in rows)
        self._cut = any(row.top_p < 1 or row.top_k for row in rows)

    def pick(self, logits_BV: Tensor, draws_B: Tensor) -> Tensor:
        """The likeliest token, or the one in whose slice of the cumulated distribution the draw falls; int64 (B).

        Args:
            draws_B: uniform numbers, float64.

        Raises:
            NonFiniteError: there is no distribution.
        """
        if not bool(logits_BV.isfinite().any(-1).all()) or bool(logits_BV.isnan().any()):
            raise NonFiniteError("serve: the policy's logits are NaN or all infinite; the weights are broken")
        likeliest_B = logits_BV.argmax(-1)
        if self._all_greedy:
            return likeliest_B
        greedy_B = self._temperature_B == 0
        # Below their maximum first: no temperature is so small that they overflow to NaN.
        below_BV = logits_BV.double() - logits_BV.double().amax(-1, keepdim=True)
        probs_BV = torch.softmax(below_BV / self._temperature_B.where(~greedy_B, 1.0).unsqueeze(-1), dim=-1)
        if self._cut:
            probs_BV = self._cut_off(probs_BV)
        cumulated_BV = probs_BV.cumsum(-1)
        # right=True: the first token whose cumulated probability is *above* the draw, never one of probability 0.
        point_B1 = draws_B.unsqueeze(-1) * cumulated_BV[:, -1:]
        drawn_B = torch.searchsorted(cumulated_BV, point_B1, right=True).squeeze(-1)
        return likeliest_B.where(greedy_B, drawn_B.clamp(max=logits_BV.shape[-1] - 1))

    def _cut_off(self, probs_BV: Tensor) -> Tensor:
        """0 for all but the top_k likeliest, and of these all but the fewest that hold top_p; not normalised."""
        sorted_BV, order_BV = probs_BV.sort(dim=-1, descending=True, stable=True)
        rank_V = torch.arange(probs_BV.shape[-1], device=probs_BV.device)
        beyond_BV = (self._top_k_B.unsqueeze(-1) > 0) & (rank_V >= self._top_k_B.unsqueeze(-1))
        sorted_BV = sorted_BV.masked_fill(beyond_BV, 0.0)
        before_BV = sorted_BV.cumsum(-1) - sorted_BV
        limit_B1 = self._top_p_B.unsqueeze(-1) * sorted_BV.sum(-1, keepdim=True)
        full_BV = (self._top_p_B.unsqueeze(-1) < 1) & (before_BV >= limit_B1)
        full_BV[:, 0] = False  # however small top_p is
        return torch.zeros_like(probs_BV).scatter(-1, order_BV, sorted_BV.masked_fill(full_BV, 0.0))
