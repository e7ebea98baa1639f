"""From one score a response to one reward a token. B sequences, R response width (right-padded)."""

import math

import torch
from torch import Tensor

from raytrl.algo.masked import Moments


def shaped_scores(
    scores_B: Tensor,
    ended_B: Tensor,
    *,
    scale: float = 1.0,
    clip: float | None = None,
    missing_eos_penalty: float | None = None,
) -> Tensor:
    """Scores divided by `scale`, cut to ±`clip`, minus the penalty where no end token was sampled; float32 (B,)."""
    shaped_B = scores_B.float() / scale
    if clip is not None:
        shaped_B = shaped_B.clamp(-clip, clip)
    if missing_eos_penalty is not None:
        shaped_B = shaped_B - missing_eos_penalty * (~ended_B).float()
    return shaped_B


def token_rewards(scores_B: Tensor, kl_BR: Tensor, mask_BR: Tensor, kl_coef: float) -> Tensor:
    """−kl_coef · KL on every response token, plus the score on the last one; 0 on padding; float32 (B, R).

    The score enters once, at the last real token. (TRL's PPO put it one position later where there was room; both have
    the same optimum.) `mask_BR` must hold at least one token a row.
    """
    rewards_BR = torch.where(mask_BR, -kl_coef * kl_BR.float(), torch.zeros_like(kl_BR, dtype=torch.float32))
    last_B1 = (mask_BR.sum(-1, keepdim=True) - 1).clamp(min=0)
    return rewards_BR.scatter_add(1, last_B1, scores_B.float().unsqueeze(-1))


class RunningMoments:
    """Mean and variance of all scores so far (Chan et al. 1979 parallel update), over all workers."""

    def __init__(self) -> None:
        self.count = 0.0
        self.mean = 0.0
        self._m2 = 0.0  # sum of squared deviations

    def update(self, batch: Moments) -> None:
        """Take in the moments of one global batch of scores."""
        total = self.count + batch.count
        if total == 0:
            return
        delta = batch.mean - self.mean
        self._m2 += batch.variance * batch.count + delta * delta * self.count * batch.count / total
        self.mean += delta * batch.count / total
        self.count = total

    @property
    def scale(self) -> float:
        """The unbiased standard deviation; 1 as long as all scores were equal."""
        deviation = math.sqrt(self._m2 / (self.count - 1)) if self.count > 1 else 0.0
        return deviation if deviation > 1e-8 else 1.0

    def state_dict(self) -> dict[str, float]:
        return {"count": self.count, "mean": self.mean, "m2": self._m2}

    def load_state_dict(self, state: dict[str, float]) -> None:
        self.count, self.mean, self._m2 = state["count"], state["mean"], state["m2"]
