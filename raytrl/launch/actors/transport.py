"""Weights on their way, bucket by bucket: through the object store, or by broadcast in a process group."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from raytrl.roles.weights.buckets import Bucket, Weights, checksum, combined
from raytrl.roles.weights.group import Announcement, WeightGroup
from raytrl.roles.weights.packed import PackedBucket, pack


@dataclass(frozen=True)
class Receivers:
    """The rollout actors that take new weights, as the one who sends them sees them."""

    tell: Callable[..., None]  # starts a call of each that nobody waits for: method, version, what else it takes
    agree: Callable[..., bool]  # whether each answers True to such a call; False as soon as one does not, or is lost
    count: int
    complete: bool  # whether all of them were up to date until now
    group: int | None = 0  # which of the groups that weights go to apart; None: several
    oldest: int = 0  # the oldest version that anybody may still have to load


@dataclass(frozen=True)
class SentWeights:
    """All buckets of one version, where every actor can take them, and what it must prove to hold afterwards."""

    version: int
    checksum: str
    num_buckets: int
    buckets: Sequence[Any]  # where they are read; empty: they were sent to whoever was there


def send(
    weights: Weights, receivers: Receivers, put: Callable[[PackedBucket], Any] = lambda packed: packed
) -> SentWeights:
    """Bucket by bucket: while the actors load one, the next is on its way.

    Args:
        put: makes a copy of a bucket that all actors can reach; they are told of it as soon as they can take it.
    """
    checksums, places = [], []
    for number, tensors in enumerate(weights.buckets):
        checksums.append(checksum(tensors))  # where they lie
        places.append(put(pack(Bucket({name: tensor.cpu() for name, tensor in tensors.items()}, checksums[-1]))))
        receivers.tell("take_bucket", weights.version, number, places[-1])
    return SentWeights(weights.version, combined(checksums), len(places), tuple(places))


def broadcast(weights: Weights, receivers: Receivers, group: WeightGroup) -> SentWeights:
    """To all receivers, which are members of the group, bucket by bucket: while they load one, the next is on its way.

    Raises:
        WeightGroupError: a member was lost; the others have only a part.
    """
    checksums = []
    for number, tensors in enumerate(weights.buckets):
        bucket = Bucket.of(tensors)
        checksums.append(bucket.checksum)
        receivers.tell("receive_bucket", weights.version, number, Announcement.of(tensors, bucket.checksum))
        group.send(tensors)
    receivers.agree("has_received", weights.version, len(checksums))  # where one has not, `load_weights` says why
    return SentWeights(weights.version, combined(checksums), len(checksums), ())
