"""Notices when rollout engines and learner drift apart: the same weights must give the same log-probs."""

_FLOOR = 1e-3  # nats a token; float32 differs by 1e-6, bfloat16 by 1e-2
_GROWTH = 10.0


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
