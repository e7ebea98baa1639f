"""Versioned weights on their way from the learner to the rollout engines, in buckets, and the proof of what arrived."""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TypeVar

import torch
import xxhash
from torch import Tensor, nn

from raytrl.errors import WeightsVersionError
from raytrl.roles.models.adapters import policy_parameters

# While one bucket is loaded by the engines the next one is packed; small enough to stay in a processor's cache, large
# enough for the object store's millisecond a bucket not to count.
BUCKET_BYTES = 16 * 2**20


T = TypeVar("T", bound=Tensor)


@dataclass(frozen=True)
class Bucket:
    """Some of the tensors, under the names of the policy's parameters, and what they must prove to be."""

    tensors: Mapping[str, Tensor]
    checksum: str

    @classmethod
    def of(cls, tensors: Mapping[str, Tensor]) -> "Bucket":
        """With the checksum of these tensors."""
        return cls(tensors, checksum(tensors))


@dataclass(frozen=True)
class Weights:
    """What a rollout engine needs to become the policy after `version` steps.

    `buckets` are mappings like `Bucket.tensors`: together all of the policy's parameters, or with LoRA the adapter's. They
    can be asked for more than once. Each is to be used before the next is asked for, since the tensors may be the learner's
    own or gathered for the moment; and where the learner's workers hold parts of them, all workers must ask for all.
    """

    version: int
    buckets: Iterable[Mapping[str, Tensor]]

    @property
    def checksum(self) -> str:
        """What an engine that holds them must prove; asks for all buckets."""
        return combined([checksum(tensors) for tensors in self.buckets])

    @classmethod
    def of(
        cls, version: int, named: Iterable[tuple[str, Tensor]], dtype: torch.dtype, bucket_bytes: int = BUCKET_BYTES
    ) -> "Weights":
        """In the dtype of the rollout engines; tensors that are so already are not copied."""
        groups = [dict(group) for group in grouped(named, bucket_bytes)]
        return cls(version, GatheredBuckets(lambda: iter(groups), dtype))


@dataclass(frozen=True)
class GatheredBuckets:
    """Buckets of tensors that are asked for anew each time, in the dtype of the engines, on the learner's device."""

    gather: Callable[[], Iterator[Mapping[str, Tensor]]]
    dtype: torch.dtype

    def __iter__(self) -> Iterator[Mapping[str, Tensor]]:
        for group in self.gather():
            yield {name: value.detach().to(self.dtype).contiguous() for name, value in group.items()}


def weights_on_disk(version: int, path: str) -> Weights:
    """No numbers, only the name of a finished model, for engines that read it themselves."""
    return Weights(version, [{path: torch.empty(0)}])


def grouped(named: Iterable[tuple[str, T]], bucket_bytes: int = BUCKET_BYTES) -> Iterator[list[tuple[str, T]]]:
    """In the order given; a tensor that is larger than a bucket is one of its own."""
    group: list[tuple[str, T]] = []
    size = 0
    for name, tensor in named:
        # Under ZeRO-3 a parameter that is not gathered has no numbers; DeepSpeed keeps how many it will have.
        numel = int(getattr(tensor, "ds_numel", tensor.numel()))
        if group and size + numel * tensor.element_size() > bucket_bytes:
            yield group
            group, size = [], 0
        group.append((name, tensor))
        size += numel * tensor.element_size()
    if group:
        yield group


def checksum(tensors: Mapping[str, Tensor]) -> str:
    """Digest of names, dtypes, shapes and bytes, whatever the order and the device."""
    digest = xxhash.xxh3_128()  # against faults, not fraud; as fast as memory, where a cryptographic one is not
    for name in sorted(tensors):
        value = tensors[name].detach().cpu().contiguous()
        digest.update(f"{name}|{value.dtype}|{tuple(value.shape)}|".encode())
        digest.update(as_bytes(value).numpy().data)
    return digest.hexdigest()


def as_bytes(tensor: Tensor) -> Tensor:
    """One row of uint8, on the same memory where that is contiguous: numpy knows no bfloat16, and bytes are bytes."""
    return tensor.reshape(-1).view(torch.uint8)


def combined(checksums: Sequence[str]) -> str:
    """Of all buckets, in their order."""
    return xxhash.xxh3_128("|".join(checksums).encode()).hexdigest()


class PolicyCopy:
    """A model in an engine's process whose policy parameters become those that are sent."""

    def __init__(self, model: nn.Module) -> None:
        self._parameters = policy_parameters(model)
        self._missing: set[str] = set()

    def begin(self) -> None:
        """All parameters are to come."""
        self._missing = set(self._parameters)

    @torch.no_grad()
    def take(self, tensors: Mapping[str, Tensor]) -> str:
        """Copy into the model; returns the checksum of what the model then holds.

        Raises:
            WeightsVersionError: names or shapes that the model does not have.
        """
        for name, tensor in tensors.items():
            if name not in self._parameters:
                raise WeightsVersionError(_other_parameters(f"{name!r} is not one of the model's"))
            parameter = self._parameters[name]
            if parameter.shape != tensor.shape:
                raise WeightsVersionError(
                    f"rollout engine: {name} has another shape; found {tuple(tensor.shape)}; "
                    f"expected {tuple(parameter.shape)}; the engine must load the learner's model and LoRA"
                )
            parameter.copy_(tensor)
        self._missing -= tensors.keys()
        # In the dtype that was sent: what transformers keeps in float32 holds a bfloat16 number exactly.
        return checksum({name: self._parameters[name].data.to(tensor.dtype) for name, tensor in tensors.items()})

    def finish(self) -> None:
        """Raises WeightsVersionError where a parameter got none."""
        if self._missing:
            raise WeightsVersionError(
                _other_parameters(f"none were sent for {len(self._missing)}, {min(self._missing)!r}")
            )


def _other_parameters(found: str) -> str:
    return (
        f"rollout engine: the weights sent name other parameters than the model has; found: {found}; the engine must load "
        f"the learner's model and LoRA"
    )
