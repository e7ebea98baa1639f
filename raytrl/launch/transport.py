"""Weights on their way through the object store, bucket by bucket: plain bytes, which readers map instead of copying."""

import math
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from raytrl.roles.weights import Bucket, Weights, combined


@dataclass(frozen=True)
class PackedTensor:
    """Bytes, because numpy knows no bfloat16, with what they mean."""

    data: npt.NDArray[np.uint8]
    dtype: torch.dtype
    shape: tuple[int, ...]


@dataclass(frozen=True)
class PackedBucket:
    """`Bucket` with numpy arrays: Ray maps those into a reader's memory, while torch tensors are copied for each."""

    tensors: Mapping[str, PackedTensor]
    checksum: str


@dataclass(frozen=True)
class SentWeights:
    """All buckets of one version, where every actor can take them, and what it must prove to hold afterwards."""

    version: int
    checksum: str
    buckets: tuple[Any, ...]  # what `put` made of the packed buckets


def pack(bucket: Bucket) -> PackedBucket:
    """Shares the tensors' memory."""
    packed = {
        name: PackedTensor(tensor.reshape(-1).view(torch.uint8).numpy(), tensor.dtype, tuple(tensor.shape))
        for name, tensor in bucket.tensors.items()
    }
    return PackedBucket(packed, bucket.checksum)


def unpack(packed: PackedBucket) -> Bucket:
    """Tensors on the packed memory; it is shared by every reader, so they are only to be copied from."""
    tensors = {}
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="The given NumPy array is not writable")
        for name, tensor in packed.tensors.items():
            if math.prod(tensor.shape):
                tensors[name] = torch.from_numpy(tensor.data).view(tensor.dtype).reshape(tensor.shape)
            else:
                tensors[name] = torch.empty(tensor.shape, dtype=tensor.dtype)
    return Bucket(tensors, packed.checksum)


def send(
    weights: Weights, tell: Callable[[int, Any], None], put: Callable[[PackedBucket], Any] = lambda packed: packed
) -> SentWeights:
    """Bucket by bucket: while the actors load one, the next is on its way.

    Args:
        tell: called with a bucket's number and what `put` made of it, as soon as it can be taken.
        put: makes a copy of the bucket that all actors can reach.
    """
    checksums, places = [], []
    for number, tensors in enumerate(weights.buckets):
        bucket = Bucket.of(tensors)
        places.append(put(pack(bucket)))
        checksums.append(bucket.checksum)
        tell(number, places[-1])
    return SentWeights(weights.version, combined(checksums), tuple(places))
