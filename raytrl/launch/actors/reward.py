"""What runs inside a reward actor."""

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

from raytrl.launch.actors.base import CONTROL, Actor, in_group
from raytrl.records.samples import Attempt, Score

if TYPE_CHECKING:
    from raytrl.roles.reward.call import Pair
    from raytrl.roles.reward.sources import RewardSources


class RewardActor(Actor):
    """Holds the reward sources."""

    def __init__(self, make_sources: "Callable[[], RewardSources]") -> None:
        super().__init__()
        self._make_sources = make_sources
        self._sources: RewardSources | None = None

    @in_group(CONTROL)
    def start(self) -> None:
        """Load the sources."""
        with self._busy("loading reward sources"):
            self._loaded()

    @in_group(CONTROL)
    def prepare(self, attempt: Attempt) -> None:
        """Serve this attempt; returns once the sources are loaded."""
        self.begin(attempt)
        self.start()

    def score(self, attempt: Attempt, pairs: "Sequence[Pair]") -> list[Score]:
        """One score a pair, in order.

        Raises:
            RewardError: a source failed and `reward.on_error` is fail.
            StaleAttemptError: a newer attempt has begun.
        """
        with self._busy(f"scoring {len(pairs)} responses of step {pairs[0][0].step}"):
            self._refuse_if_old(attempt)
            return self._loaded().score(pairs)

    def _loaded(self) -> "RewardSources":
        if self._sources is None:
            self._sources = self._make_sources()
        return self._sources
