"""Buckets as plain bytes, for the object store: readers map those instead of copying them."""

import math
import warnings
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch

from raytrl.roles.weights.buckets import Bucket, as_bytes


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


def pack(bucket: Bucket) -> PackedBucket:
    """Shares the tensors' memory."""
    packed = {
        name: PackedTensor(as_bytes(tensor).numpy(), tensor.dtype, tuple(tensor.shape))
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
