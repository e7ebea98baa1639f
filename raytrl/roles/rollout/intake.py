"""New weights on their way into an engine: which it holds, how far others have come, and for whom it serves."""

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

from raytrl.errors import RaytrlError, WeightGroupError, WeightsGoneError, WeightsVersionError
from raytrl.records.samples import Attempt

if TYPE_CHECKING:  # torch: the driver knows this module, and has no need of it
    from raytrl.roles.rollout.engine import RolloutEngine
    from raytrl.roles.weights.buckets import Bucket
    from raytrl.roles.weights.group import Announcement, Invitation, WeightGroup
    from raytrl.roles.weights.packed import PackedBucket


class WeightIntake:
    """The book that one engine's weights are kept by.

    Buckets come in order, ahead of `load`, which makes up for those that did not come and proves the whole. From the first
    bucket on the oldest version is not served any more, where the engine has no room for another. A bucket that is out of
    turn is left to `load`.
    """

    def __init__(self, engine: "Callable[[], RolloutEngine]") -> None:
        """`engine`: gives the engine, and makes it when it is first asked for."""
        self._engine = engine
        self._held: dict[int, tuple[Attempt, str]] = {}  # by version: attempt, checksum
        self._arrived: tuple[Attempt, int, int] | None = None  # of new weights: attempt, version, buckets so far
        self._group: WeightGroup | None = None  # for weights by broadcast
        self._failure: RaytrlError | None = None  # of a bucket that came by broadcast

    def take(self, attempt: Attempt, version: int, number: int, packed: "PackedBucket") -> None:
        """A bucket through the object store."""
        if any(held >= version and of == attempt for held, (of, _) in self._held.items()):
            return  # another worker's `load` was here before
        self._unpack_in_turn(attempt, version, number, packed)

    def join(self, invitation: "Invitation") -> None:
        """Become a member of the learner's group, instead of any that the engine was in; raises WeightGroupError."""
        from raytrl.roles.weights.group import WeightGroup

        if self._group is not None:
            self._group.close()
            self._group = None
        self._group = WeightGroup.join(invitation)

    def can_receive(self, attempt: Attempt, group_version: int | None) -> bool:
        """Whether it serves this attempt, and is in the group whose first version that was (None: in whichever)."""
        serves = any(of == attempt for of, _ in self._held.values())
        is_member = self._group is not None and self._group.first_version == group_version
        return serves and (group_version is None or is_member)

    def receive(self, attempt: Attempt, version: int, number: int, announced: "Announcement") -> None:
        """As `take`, with the group's next message. What it failed of, `load` raises."""
        if self._group is None:
            raise WeightGroupError("rollout actor: is in no group for weights")
        if number == 0:
            self._begin(attempt, version)
        bucket = self._group.receive(announced)  # also after a failure: the others wait for this one
        try:
            self._take_in_turn(attempt, version, number, bucket)
        except RaytrlError as error:
            self._failure = error
            raise

    def has_received(self, attempt: Attempt, version: int, num_buckets: int) -> bool:
        """Whether it has all of them."""
        return self._arrived == (attempt, version, num_buckets)

    def load(
        self, attempt: Attempt, version: int, checksum: str, num_buckets: int, buckets: "Sequence[PackedBucket]"
    ) -> tuple[int, str]:
        """Take these weights, or what is missing of them, unless it holds them already.

        Args:
            checksum: of all buckets.
            buckets: none, where they came by broadcast.

        Returns:
            Version and checksum of what the engine now holds.

        Raises:
            WeightsGoneError: they came by broadcast, when this engine was not there.
        """
        if self._held.get(version) != (attempt, checksum):
            arrived = self._arrived[2] if self._arrived is not None and self._arrived[:2] == (attempt, version) else 0
            if arrived < num_buckets and not buckets:
                raise self._failure or WeightsGoneError(
                    f"rollout actor: weights of version {version} were sent by broadcast when this actor was not there"
                )
            for number in range(arrived, num_buckets):
                self._unpack_in_turn(attempt, version, number, buckets[number])
            self._arrived = None
            self._held[version] = (attempt, self._engine().finish_weights())
        return version, self._held[version][1]

    def check(self, attempt: Attempt, version: int) -> None:
        """
        Raises:
            WeightsVersionError: the engine holds others, or none since it was made.
        """
        if version not in self._held or self._held[version][0] != attempt:
            raise WeightsVersionError(
                f"rollout actor: asked for attempt {attempt.number}, version {version}; found: {self._held or None}"
            )

    def _unpack_in_turn(self, attempt: Attempt, version: int, number: int, packed: "PackedBucket") -> None:
        from raytrl.roles.weights.packed import unpack

        if number == 0:
            self._begin(attempt, version)
        if self._arrived == (attempt, version, number):
            self._take_in_turn(attempt, version, number, unpack(packed))

    def _begin(self, attempt: Attempt, version: int) -> None:
        self._arrived, self._failure = (attempt, version, 0), None
        engine = self._engine()
        if any(of != attempt for of, _ in self._held.values()):  # its versions count from another checkpoint
            self._held = {}
            engine.forget_weights()
        engine.begin_weights(version)
        self._held = {held: of for held, of in self._held.items() if held in engine.versions}

    def _take_in_turn(self, attempt: Attempt, version: int, number: int, bucket: "Bucket") -> None:
        if self._arrived == (attempt, version, number):
            self._arrived = None  # stays so after an error: `load` then begins again
            self._engine().take_bucket(bucket)
            self._arrived = (attempt, version, number + 1)
