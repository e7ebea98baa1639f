"""What runs inside rollout and reward actors. Plain classes: `ray.remote` is applied where they are started.

Loading is not part of `__init__`, so that its errors reach whoever asked, and so that a reborn actor loads when it is
first asked. Calls that only look or prepare run in threads of their own (`CONTROL`, `STATUS`), beside a long `generate`.
The driver imports this module to start the actors, so nothing heavy is imported before it is needed.
"""

import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING

from raytrl.errors import StaleAttemptError, WeightsVersionError
from raytrl.records import Attempt, Prompt, Response, Score

if TYPE_CHECKING:
    from raytrl.launch.transport import PackedWeights
    from raytrl.roles.reward import RewardSources
    from raytrl.roles.reward_call import Pair
    from raytrl.roles.rollout import RolloutEngine

CONTROL, STATUS = "control", "status"
CONCURRENCY_GROUPS = {CONTROL: 4, STATUS: 1}


class _Actor:
    """An attempt is one life of a run's learner group; older ones of the same run are not served any more."""

    def __init__(self) -> None:
        self._newest: dict[str, int] = {}  # by run: a sweep's trials share reward actors
        self._lock = threading.Lock()  # around the engine or the sources: one call at a time
        self._doing = "nothing"

    def doing(self) -> str:
        """What it is at, for messages; answers at any time."""
        return self._doing

    def begin(self, attempt: Attempt) -> None:
        """Requests of earlier attempts that still wait here are refused from now on."""
        self._newest[attempt.run] = max(self._newest.get(attempt.run, attempt.number), attempt.number)

    def _refuse_if_old(self, attempt: Attempt) -> None:
        newest = self._newest.get(attempt.run, attempt.number)
        if attempt.number < newest:
            raise StaleAttemptError(f"{attempt.run}: request of attempt {attempt.number}; this actor serves {newest}")

    @contextmanager
    def _busy(self, text: str) -> Iterator[None]:
        with self._lock:
            self._doing = f"{text}, since {time.strftime('%H:%M:%S')}"
            try:
                yield
            finally:
                self._doing = "nothing"


class RolloutActor(_Actor):
    """Holds a rollout engine, the weights it was given, and knows which attempt gave them."""

    def __init__(self, make_engine: "Callable[[], RolloutEngine]") -> None:
        super().__init__()
        self._make_engine = make_engine
        self._engine: RolloutEngine | None = None
        self._held: tuple[Attempt, int, str] | None = None  # attempt, version, checksum

    def start(self) -> None:
        """Load the model, without weights to serve."""
        with self._busy("loading the model"):
            self._loaded()

    def load_weights(self, attempt: Attempt, packed: "PackedWeights") -> tuple[int, str]:
        """Take these weights, unless it holds them already.

        Returns:
            Version and checksum of what the engine now holds.
        """
        self.begin(attempt)
        with self._busy(f"loading weights of version {packed.version}"):
            self._refuse_if_old(attempt)
            from raytrl.launch.transport import unpack

            if self._held is None or self._held != (attempt, packed.version, packed.checksum):
                self._held = None
                checksum = self._loaded().load_weights(unpack(packed))
                self._held = (attempt, packed.version, checksum)
            return self._held[1], self._held[2]

    def generate(
        self, attempt: Attempt, prompts: Sequence[Prompt], version: int, samples: int, greedy: bool
    ) -> list[Response]:
        """Responses by the weights of this attempt and version.

        Raises:
            WeightsVersionError: it holds others, or none since it was restarted.
            StaleAttemptError: a newer attempt has begun.
        """
        with self._busy(f"generating for rows {prompts[0].row} to {prompts[-1].row} of step {prompts[0].step}"):
            self._check(attempt, version)
            return self._loaded().generate(prompts, version, samples=samples, greedy=greedy)

    def logprobs(
        self, attempt: Attempt, prompts: Sequence[Prompt], responses: Sequence[Response], version: int
    ) -> list[float]:
        """Log-probability of each response under the weights of this attempt and version; raises as `generate`."""
        with self._busy(f"log-probabilities of rows {prompts[0].row} to {prompts[-1].row}"):
            self._check(attempt, version)
            return self._loaded().logprobs(prompts, responses, version)

    def _check(self, attempt: Attempt, version: int) -> None:
        self._refuse_if_old(attempt)
        if self._held is None or self._held[:2] != (attempt, version):
            raise WeightsVersionError(
                f"rollout actor: asked for attempt {attempt.number}, version {version}; found: {self._held}"
            )

    def _loaded(self) -> "RolloutEngine":
        if self._engine is None:
            self._engine = self._make_engine()
        return self._engine


class RewardActor(_Actor):
    """Holds the reward sources."""

    def __init__(self, make_sources: "Callable[[], RewardSources]") -> None:
        super().__init__()
        self._make_sources = make_sources
        self._sources: RewardSources | None = None

    def start(self) -> None:
        """Load the sources."""
        with self._busy("loading reward sources"):
            self._loaded()

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
