"""Generalised advantage estimation. B sequences, R response width (right-padded)."""

import torch
from torch import Tensor


def gae(rewards_BR: Tensor, values_BR: Tensor, mask_BR: Tensor, *, gamma: float, lam: float) -> tuple[Tensor, Tensor]:
    """Advantages and returns over response tokens (Schulman et al. 2016, eq. 16).

    δ_t = r_t + γ·V_{t+1} − V_t and A_t = δ_t + γλ·A_{t+1}; the value after the last response token is 0. Returns are
    A + V with the advantages as they are here, before any whitening.

    Args:
        rewards_BR, values_BR: V_t is the value *before* token t is chosen.
        mask_BR: True on response tokens, which fill each row from the left.

    Returns:
        advantages_BR and returns_BR, float32, detached, 0 on padding.
    """
    zeros_BR = torch.zeros_like(values_BR, dtype=torch.float32)
    rewards_BR = torch.where(mask_BR, rewards_BR.detach().float(), zeros_BR)
    values_BR = torch.where(mask_BR, values_BR.detach().float(), zeros_BR)
    advantages_BR = zeros_BR.clone()
    next_value_B, next_advantage_B = zeros_BR.new_zeros(len(zeros_BR)), zeros_BR.new_zeros(len(zeros_BR))
    for t in reversed(range(values_BR.shape[1])):
        delta_B = rewards_BR[:, t] + gamma * next_value_B - values_BR[:, t]
        # On padding all three terms are 0, so the recursion starts afresh at each row's last real token.
        next_advantage_B = delta_B + gamma * lam * next_advantage_B
        advantages_BR[:, t] = next_advantage_B
        next_value_B = values_BR[:, t]
    return advantages_BR, advantages_BR + values_BR
