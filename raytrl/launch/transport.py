"""Weights on their way through the object store: plain bytes, which readers map instead of copying."""

import math
import warnings
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch

from raytrl.roles.weights import Weights


@dataclass(frozen=True)
class PackedTensor:
    """Bytes, because numpy knows no bfloat16, with what they mean."""

    data: npt.NDArray[np.uint8]
    dtype: torch.dtype
    shape: tuple[int, ...]


@dataclass(frozen=True)
class PackedWeights:
    """`Weights` with numpy arrays: Ray maps those into a reader's memory, while torch tensors are copied for each."""

    version: int
    tensors: Mapping[str, PackedTensor]
    checksum: str


def pack(weights: Weights) -> PackedWeights:
    """Shares the tensors' memory."""
    packed = {
        name: PackedTensor(tensor.reshape(-1).view(torch.uint8).numpy(), tensor.dtype, tuple(tensor.shape))
        for name, tensor in weights.tensors.items()
    }
    return PackedWeights(weights.version, packed, weights.checksum)


def unpack(packed: PackedWeights) -> Weights:
    """Tensors on the packed memory; it is shared by every reader, so they are only to be copied from."""
    tensors = {}
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="The given NumPy array is not writable")
        for name, tensor in packed.tensors.items():
            if math.prod(tensor.shape):
                tensors[name] = torch.from_numpy(tensor.data).view(tensor.dtype).reshape(tensor.shape)
            else:
                tensors[name] = torch.empty(tensor.shape, dtype=tensor.dtype)
    return Weights(packed.version, tensors, packed.checksum)
