"""What runs inside a rollout actor."""

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

from raytrl.launch.actors.base import CONTROL, WEIGHTS, WORK, Actor, in_group
from raytrl.launch.session.logs import set_version
from raytrl.records.samples import Attempt, Prompt, Response
from raytrl.roles.rollout.intake import WeightIntake

if TYPE_CHECKING:
    from raytrl.roles.rollout.engine import RolloutEngine
    from raytrl.roles.weights.group import Announcement, Invitation
    from raytrl.roles.weights.packed import PackedBucket


class RolloutActor(Actor):
    """Holds a rollout engine, the weights it was given, and knows which attempt gave them."""

    def __init__(self, make_engine: "Callable[[], RolloutEngine]") -> None:
        super().__init__()
        self._make_engine = make_engine
        self._engine: RolloutEngine | None = None
        self._intake = WeightIntake(self._loaded)

    @in_group(CONTROL)
    def start(self) -> None:
        """Load the model, without weights to serve."""
        with self._busy("loading the model"):
            self._loaded()

    @in_group(WEIGHTS)
    def take_bucket(self, attempt: Attempt, version: int, number: int, packed: "PackedBucket") -> None:
        """Load a part of new weights ahead of `load_weights`."""
        self.begin(attempt)
        with self._busy(f"taking bucket {number} of weights of version {version}", beside=self._takes_beside):
            self._refuse_if_old(attempt)
            self._intake.take(attempt, version, number, packed)

    @in_group(WEIGHTS)
    def join_group(self, attempt: Attempt, version: int, invitation: "Invitation") -> None:
        """Become a member of the learner's group for weights from `version` on."""
        self.begin(attempt)
        with self._busy(f"joining the group for weights from version {version} on", beside=self._takes_beside):
            self._refuse_if_old(attempt)
            self._intake.join(invitation)

    @in_group(WEIGHTS)
    def can_receive(self, attempt: Attempt, version: int, group_version: int | None) -> bool:
        """Whether weights of `version` may go to it by the group whose first version that was (None: by a new one)."""
        self._refuse_if_old(attempt)
        return self._intake.can_receive(attempt, group_version)

    @in_group(WEIGHTS)
    def receive_bucket(self, attempt: Attempt, version: int, number: int, announced: "Announcement") -> None:
        """As `take_bucket`, with the group's next message."""
        self.begin(attempt)
        with self._busy(f"receiving bucket {number} of weights of version {version}", beside=self._takes_beside):
            self._refuse_if_old(attempt)
            self._intake.receive(attempt, version, number, announced)

    @in_group(WEIGHTS)
    def has_received(self, attempt: Attempt, version: int, num_buckets: int) -> bool:
        """Whether it has all of them; answers once those that it was told of are loaded."""
        self._refuse_if_old(attempt)
        return self._intake.has_received(attempt, version, num_buckets)

    @in_group(WEIGHTS)
    def load_weights(
        self, attempt: Attempt, version: int, checksum: str, num_buckets: int, buckets: "Sequence[PackedBucket]"
    ) -> tuple[int, str]:
        """`WeightIntake.load`: the proof that it holds these weights. `buckets` may be `OnShelf`: most often none is read."""
        self.begin(attempt)
        with self._busy(f"loading weights of version {version}", beside=self._takes_beside):
            self._refuse_if_old(attempt)
            held = self._intake.load(attempt, version, checksum, num_buckets, buckets)
            set_version(version)
            return held

    @in_group(WORK)
    def generate(
        self, attempt: Attempt, prompts: Sequence[Prompt], version: int, samples: int, greedy: bool
    ) -> list[Response]:
        """Responses by the weights of this attempt and version.

        Raises:
            WeightsVersionError: it holds others, or none since it was restarted.
            StaleAttemptError: a newer attempt has begun, before or while it samples.
        """
        rows = f"rows {prompts[0].row} to {prompts[-1].row} of step {prompts[0].step}"
        with self._busy(f"generating for {rows}", self._concurrent):
            self._check(attempt, version)
            return self._loaded().generate(
                prompts, version, samples=samples, greedy=greedy, wanted=lambda: self._is_newest(attempt)
            )

    @in_group(WORK)
    def logprobs(
        self, attempt: Attempt, prompts: Sequence[Prompt], responses: Sequence[Response], version: int
    ) -> list[float]:
        """Log-probability of each response under the weights of this attempt and version; raises as `generate`."""
        rows = f"rows {prompts[0].row} to {prompts[-1].row}"
        with self._busy(f"log-probabilities of {rows}", self._concurrent):
            self._check(attempt, version)
            return self._loaded().logprobs(prompts, responses, version)

    @property
    def _takes_beside(self) -> bool:
        """Whether new weights need not wait for those that sample: they lie elsewhere."""
        return self._engine is not None and self._engine.num_versions > 1

    @property
    def _concurrent(self) -> bool:
        return self._engine is not None and self._engine.concurrent

    def _check(self, attempt: Attempt, version: int) -> None:
        self._refuse_if_old(attempt)
        self._intake.check(attempt, version)

    def _loaded(self) -> "RolloutEngine":
        if self._engine is None:
            self._engine = self._make_engine()
        return self._engine
