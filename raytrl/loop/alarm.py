"""Notices when rollout engines and learner drift apart, and when samples of older weights no longer tell of today's."""

_FLOOR = 1e-3  # nats a token; float32 differs by 1e-6, bfloat16 by 1e-2
_GROWTH = 10.0
_FEW = 0.5  # of the batch's responses: half of it tells nothing


class GapAlarm:
    """Watches the mean difference of the engines' log-probs from the learner's, step by step."""

    def __init__(self) -> None:
        self._first: float | None = None
        self._said = 0.0

    def check(self, step: int, gap: float) -> str | None:
        """What to tell the user; None while all is well, and until the gap has doubled since it was told.

        Args:
            gap: mean over the step's response tokens of |sampling log-prob - the learner's|, nats.
        """
        if self._first is None:
            self._first = gap
        limit = max(_FLOOR, _GROWTH * self._first, 2 * self._said)
        if gap <= limit:
            return None
        self._said = gap
        return (
            f"step {step}: rollout/logprob_gap_mean is {gap:.3g} nats a token; found {self._first:.3g} at first; the "
            f"rollout engines sample from other probabilities than the learner computes with; compare with "
            f"rollout.engine=transformers, and with model.dtype=float32"
        )


class StaleAlarm:
    """Watches the effective sample size of batches that older weights made."""

    def __init__(self) -> None:
        self._said = 2 * _FEW

    def check(self, step: int, ess: float, kl: float, max_lag: int) -> str | None:
        """What to tell the user; None while all is well, and until the size has halved since it was told.

        Args:
            ess: of the batch, 1 is all of it.
            kl: from the sampler to the learner's policy, nats a response.
        """
        if ess >= self._said / 2:
            return None
        self._said = ess
        return (
            f"step {step}: importance/ess is {ess:.2g}: weighted by their whole ratio so large a part of the samples would "
            f"count, as the policy has moved {kl:.2g} nats a response since; weights by token correct little of that; lower "
            f"ppo.max_lag, found {max_lag}, or ppo.learning_rate"
        )
