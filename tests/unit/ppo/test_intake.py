"""The book of an engine's weights, without Ray and without a model: buckets in turn, out of turn, broken and missing."""

from collections.abc import Sequence
from typing import Any

import pytest
import torch

from raytrl.errors import WeightGroupError, WeightsGoneError, WeightsVersionError
from raytrl.records.samples import Attempt
from raytrl.roles.rollout.intake import WeightIntake
from raytrl.roles.weights.buckets import Bucket, combined
from raytrl.roles.weights.packed import PackedBucket, pack

FIRST, SECOND = Attempt("run", 1), Attempt("run", 2)


class Engine:
    """What the intake asks of an engine: counts what it is given, and proves what `RolloutEngine` proves."""

    def __init__(self, num_versions: int = 1) -> None:
        self.calls: list[str] = []
        self.checksums: list[str] = []
        self.fails_at = -1
        self.num_versions, self.versions = num_versions, list[int]()

    def begin_weights(self, version: int) -> None:
        self.calls.append(f"begin {version}")
        self.checksums = []
        self.versions = (
            sorted(set(self.versions) - {version})[-self.num_versions + 1 :] if self.num_versions > 1 else []
        )
        self.coming = version

    def forget_weights(self) -> None:
        self.versions = []

    def take_bucket(self, bucket: Bucket) -> None:
        number = len(self.checksums)
        self.calls.append(f"take {number}")
        if number == self.fails_at:
            self.fails_at = -1
            raise WeightsVersionError("not what was sent")
        self.checksums.append(bucket.checksum)

    def finish_weights(self) -> str:
        self.calls.append("finish")
        self.versions.append(self.coming)
        return combined(self.checksums)


class Group:
    """A member's end of a group: hands out the announced buckets."""

    first_version = 3

    def __init__(self, buckets: Sequence[Bucket]) -> None:
        self._buckets = iter(buckets)

    def receive(self, announced: Any) -> Bucket:
        return next(self._buckets)


@pytest.fixture
def buckets() -> list[Bucket]:
    return [Bucket.of({f"layer.{i}": torch.full((3,), float(i))}) for i in range(3)]


@pytest.fixture
def packed(buckets: list[Bucket]) -> list[PackedBucket]:
    return [pack(bucket) for bucket in buckets]


@pytest.fixture
def engine() -> Engine:
    return Engine()


@pytest.fixture
def intake(engine: Engine) -> WeightIntake:
    return WeightIntake(lambda: engine)  # type: ignore[return-value, arg-type]


def proof(buckets: list[Bucket]) -> str:
    return combined([bucket.checksum for bucket in buckets])


def test_buckets_in_turn_are_loaded_once_and_proven(
    intake: WeightIntake, engine: Engine, buckets: list[Bucket], packed: list[PackedBucket]
) -> None:
    for number, each in enumerate(packed):
        intake.take(FIRST, 1, number, each)
        with pytest.raises(WeightsVersionError):  # nothing is served before the proof
            intake.check(FIRST, 1)
    assert intake.load(FIRST, 1, proof(buckets), 3, packed) == (1, proof(buckets))
    assert engine.calls == ["begin 1", "take 0", "take 1", "take 2", "finish"]
    intake.check(FIRST, 1)
    assert intake.load(FIRST, 1, proof(buckets), 3, packed) == (1, proof(buckets))  # another worker's call
    intake.take(FIRST, 1, 0, packed[0])  # a bucket that came late
    assert len(engine.calls) == 5
    for attempt, version in ((SECOND, 1), (FIRST, 2)):
        with pytest.raises(WeightsVersionError, match=rf"asked for attempt {attempt.number}, version {version}; found"):
            intake.check(attempt, version)


def test_what_is_missing_is_made_up_for(
    intake: WeightIntake, engine: Engine, buckets: list[Bucket], packed: list[PackedBucket]
) -> None:
    intake.take(FIRST, 1, 0, packed[0])
    intake.take(FIRST, 1, 2, packed[2])  # out of turn
    intake.load(FIRST, 1, proof(buckets), 3, packed)
    assert engine.calls == ["begin 1", "take 0", "take 1", "take 2", "finish"]
    intake.take(FIRST, 2, 1, packed[1])  # the first of version 2 was lost
    intake.load(FIRST, 2, proof(buckets), 3, packed)
    assert engine.calls[5:] == ["begin 2", "take 0", "take 1", "take 2", "finish"]


def test_after_a_broken_bucket_all_are_loaded_anew(
    intake: WeightIntake, engine: Engine, buckets: list[Bucket], packed: list[PackedBucket]
) -> None:
    engine.fails_at = 1
    intake.take(FIRST, 1, 0, packed[0])
    with pytest.raises(WeightsVersionError, match="not what was sent"):
        intake.take(FIRST, 1, 1, packed[1])
    intake.take(FIRST, 1, 2, packed[2])  # stays out
    assert engine.calls == ["begin 1", "take 0", "take 1"]
    assert intake.load(FIRST, 1, proof(buckets), 3, packed) == (1, proof(buckets))
    assert engine.calls[3:] == ["begin 1", "take 0", "take 1", "take 2", "finish"]


def test_another_attempt_with_the_same_version_starts_anew(
    intake: WeightIntake, engine: Engine, buckets: list[Bucket], packed: list[PackedBucket]
) -> None:
    intake.load(FIRST, 1, proof(buckets), 3, packed)
    intake.load(SECOND, 1, proof(buckets), 3, packed)
    assert engine.calls.count("begin 1") == 2
    intake.check(SECOND, 1)


def test_by_broadcast(
    intake: WeightIntake, engine: Engine, buckets: list[Bucket], packed: list[PackedBucket], monkeypatch: Any
) -> None:
    with pytest.raises(WeightGroupError, match="is in no group"):
        intake.receive(FIRST, 3, 0, None)  # type: ignore[arg-type]
    assert not intake.can_receive(FIRST, None)
    intake.load(FIRST, 2, proof(buckets), 3, packed)
    assert intake.can_receive(FIRST, None)  # any group will do: it is to join one
    assert not intake.can_receive(FIRST, 3)
    monkeypatch.setattr("raytrl.roles.weights.group.WeightGroup.join", lambda invitation: Group(buckets))
    intake.join(None)  # type: ignore[arg-type]
    assert intake.can_receive(FIRST, 3)
    assert not intake.can_receive(SECOND, 3)
    for number in range(3):
        intake.receive(FIRST, 3, number, None)  # type: ignore[arg-type]
    assert intake.has_received(FIRST, 3, 3)
    assert not intake.has_received(FIRST, 3, 4)
    assert intake.load(FIRST, 3, proof(buckets), 3, []) == (3, proof(buckets))


def test_who_missed_a_broadcast_says_so(
    intake: WeightIntake, engine: Engine, buckets: list[Bucket], monkeypatch: Any
) -> None:
    with pytest.raises(
        WeightsGoneError, match="weights of version 3 were sent by broadcast when this actor was not there"
    ):
        intake.load(FIRST, 3, proof(buckets), 3, [])
    monkeypatch.setattr("raytrl.roles.weights.group.WeightGroup.join", lambda invitation: Group(buckets))
    intake.join(None)  # type: ignore[arg-type]
    engine.fails_at = 0
    with pytest.raises(WeightsVersionError, match="not what was sent"):
        intake.receive(FIRST, 3, 0, None)  # type: ignore[arg-type]
    with pytest.raises(WeightsVersionError, match="not what was sent"):  # the cause, not its consequence
        intake.load(FIRST, 3, proof(buckets), 3, [])
