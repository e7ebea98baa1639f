"""What runs inside a rollout actor."""

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

from raytrl.errors import RaytrlError, WeightGroupError, WeightsGoneError, WeightsVersionError
from raytrl.launch.actors.base import CONTROL, WEIGHTS, WORK, Actor, in_group
from raytrl.launch.session.logs import set_version
from raytrl.records.samples import Attempt, Prompt, Response

if TYPE_CHECKING:
    from raytrl.launch.actors.transport import PackedBucket
    from raytrl.roles.rollout.engine import RolloutEngine
    from raytrl.roles.weights.buckets import Bucket
    from raytrl.roles.weights.group import Announcement, Invitation, WeightGroup


class RolloutActor(Actor):
    """Holds a rollout engine, the weights it was given, and knows which attempt gave them."""

    def __init__(self, make_engine: "Callable[[], RolloutEngine]") -> None:
        super().__init__()
        self._make_engine = make_engine
        self._engine: RolloutEngine | None = None
        self._held: tuple[Attempt, int, str] | None = None  # attempt, version, checksum
        self._arrived: tuple[Attempt, int, int] | None = None  # of new weights: attempt, version, buckets so far
        self._group: WeightGroup | None = None  # for weights by broadcast
        self._failure: RaytrlError | None = None  # of a bucket that came by broadcast

    @in_group(CONTROL)
    def start(self) -> None:
        """Load the model, without weights to serve."""
        with self._busy("loading the model"):
            self._loaded()

    @in_group(WEIGHTS)
    def take_bucket(self, attempt: Attempt, version: int, number: int, packed: "PackedBucket") -> None:
        """Load a part of new weights ahead of `load_weights`, which makes up for all that was not loaded this way.

        From the first bucket on nothing is served until `load_weights` has proven the whole.
        """
        self.begin(attempt)
        with self._busy(f"taking bucket {number} of weights of version {version}"):
            self._refuse_if_old(attempt)
            if self._held is not None and self._held[0] == attempt and self._held[1] >= version:
                return  # another worker's `load_weights` was here before
            self._take(attempt, version, number, packed)

    @in_group(WEIGHTS)
    def join_group(self, attempt: Attempt, version: int, invitation: "Invitation") -> None:
        """Become a member of the learner's group for weights from `version` on, instead of any that it was in."""
        from raytrl.roles.weights.group import WeightGroup

        self.begin(attempt)
        with self._busy(f"joining the group for weights from version {version} on"):
            self._refuse_if_old(attempt)
            if self._group is not None:
                self._group.close()
                self._group = None
            self._group = WeightGroup.join(invitation)

    @in_group(WEIGHTS)
    def can_receive(self, attempt: Attempt, version: int, group_version: int | None) -> bool:
        """Whether it serves this attempt, and is in the group whose first version that was (None: in whichever)."""
        self._refuse_if_old(attempt)
        serves = self._held is not None and self._held[0] == attempt
        is_member = self._group is not None and self._group.first_version == group_version
        return serves and (group_version is None or is_member)

    @in_group(WEIGHTS)
    def receive_bucket(self, attempt: Attempt, version: int, number: int, announced: "Announcement") -> None:
        """As `take_bucket`, with the group's next message. What it failed of, `load_weights` raises."""
        self.begin(attempt)
        with self._busy(f"receiving bucket {number} of weights of version {version}"):
            self._refuse_if_old(attempt)
            if self._group is None:
                raise WeightGroupError("rollout actor: is in no group for weights")
            if number == 0:
                self._begin_weights(attempt, version)
            bucket = self._group.receive(announced)  # also after a failure: the others wait for this one
            try:
                self._load(attempt, version, number, bucket)
            except RaytrlError as error:
                self._failure = error
                raise

    @in_group(WEIGHTS)
    def has_received(self, attempt: Attempt, version: int, num_buckets: int) -> bool:
        """Whether it has all of them; answers once those that it was told of are loaded."""
        self._refuse_if_old(attempt)
        return self._arrived == (attempt, version, num_buckets)

    @in_group(WEIGHTS)
    def load_weights(
        self, attempt: Attempt, version: int, checksum: str, num_buckets: int, *buckets: "PackedBucket"
    ) -> tuple[int, str]:
        """Take these weights, or what is missing of them, unless it holds them already.

        Args:
            checksum: of all buckets.
            buckets: none, where they came by broadcast.

        Returns:
            Version and checksum of what the engine now holds.

        Raises:
            WeightsGoneError: they came by broadcast, when this actor was not there.
        """
        self.begin(attempt)
        with self._busy(f"loading weights of version {version}"):
            self._refuse_if_old(attempt)
            if self._held is None or self._held != (attempt, version, checksum):
                arrived = (
                    self._arrived[2] if self._arrived is not None and self._arrived[:2] == (attempt, version) else 0
                )
                if arrived < num_buckets and not buckets:
                    raise self._failure or WeightsGoneError(
                        f"rollout actor: weights of version {version} were sent by broadcast when this actor was not there"
                    )
                for number in range(arrived, num_buckets):
                    self._take(attempt, version, number, buckets[number])
                self._arrived = None
                self._held = (attempt, version, self._loaded().finish_weights())
                set_version(version)
            return self._held[1], self._held[2]

    def _take(self, attempt: Attempt, version: int, number: int, packed: "PackedBucket") -> None:
        """The next bucket in order; others are left for `load_weights`."""
        from raytrl.launch.actors.transport import unpack

        if number == 0:
            self._begin_weights(attempt, version)
        if self._arrived == (attempt, version, number):
            self._load(attempt, version, number, unpack(packed))

    def _begin_weights(self, attempt: Attempt, version: int) -> None:
        self._held, self._arrived, self._failure = None, (attempt, version, 0), None
        self._loaded().begin_weights(version)

    def _load(self, attempt: Attempt, version: int, number: int, bucket: "Bucket") -> None:
        if self._arrived == (attempt, version, number):
            self._arrived = None  # stays so after an error: `load_weights` then begins again
            self._loaded().take_bucket(bucket)
            self._arrived = (attempt, version, number + 1)

    @in_group(WORK)
    def generate(
        self, attempt: Attempt, prompts: Sequence[Prompt], version: int, samples: int, greedy: bool
    ) -> list[Response]:
        """Responses by the weights of this attempt and version.

        Raises:
            WeightsVersionError: it holds others, or none since it was restarted.
            StaleAttemptError: a newer attempt has begun.
        """
        rows = f"rows {prompts[0].row} to {prompts[-1].row} of step {prompts[0].step}"
        with self._busy(f"generating for {rows}", self._concurrent):
            self._check(attempt, version)
            return self._loaded().generate(prompts, version, samples=samples, greedy=greedy)

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
    def _concurrent(self) -> bool:
        return self._engine is not None and self._engine.concurrent

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
