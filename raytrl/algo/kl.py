"""KL estimators and the controller of the KL coefficient."""

from typing import Literal

import torch
from torch import Tensor

KlEstimator = Literal["k1", "k2", "k3"]


def kl_estimate(logprobs: Tensor, ref_logprobs: Tensor, estimator: KlEstimator = "k1") -> Tensor:
    """Per-token estimate of KL(policy ‖ reference) from tokens sampled by the policy, nats.

    With d = log π − log π_ref (Schulman 2020, "Approximating KL divergence"): k1 = d, k2 = d²/2, k3 = e^−d − 1 + d.
    Only k1 may be used as a reward: the expectation of k3's score-function gradient is that of
    KL(π‖π_ref) − KL(π_ref‖π) (arXiv 2510.01555), which drives the policy away from the optimum; k2 and k3 are metrics.
    """
    difference = logprobs - ref_logprobs
    if estimator == "k1":
        return difference
    if estimator == "k2":
        return difference.square() / 2
    return torch.expm1(-difference) + difference


class KlController:
    """The KL coefficient: fixed, or adaptive (Ziegler et al. 2019, §2.2, as in lm-human-preferences).

    Adaptive: after each step, coef *= 1 + clip(kl / target − 1, ±0.2) · responses / horizon.
    """

    def __init__(self, coef: float, target: float | None = None, horizon: int = 10000) -> None:
        self.coef = coef
        self._target = target
        self._horizon = horizon

    def update(self, kl: float, num_responses: int) -> None:
        """Take in a step: `kl` is the mean over responses of the summed per-token k1, nats."""
        if self._target is None:
            return
        error = min(max(kl / self._target - 1.0, -0.2), 0.2)
        self.coef *= 1.0 + error * num_responses / self._horizon

    def state_dict(self) -> dict[str, float]:
        return {"coef": self.coef}

    def load_state_dict(self, state: dict[str, float]) -> None:
        # A fixed coefficient is a setting, not a state: the run file's value counts.
        if self._target is not None:
            self.coef = float(state["coef"])
