"""Versioned weights on their way from the learner to the rollout engines, in buckets, and the proof of what arrived."""

import functools
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
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


_COLUMNS = 4096
_PART = 2**6 * _COLUMNS  # words that are looked at together; what is made of them stays in a processor's cache
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
    """Digest of names, dtypes, shapes and bytes, whatever the order and the device; against faults, not fraud.

    Computed where the tensors lie: a single number leaves a GPU.
    """
    named = sorted((name, tensor.detach()) for name, tensor in tensors.items())
    words = [_words(tensor) for _, tensor in named]
    number = int(weighted_sum(words[0] if len(words) == 1 else torch.cat(words))) if words else 0
    told = [f"{name}|{tensor.dtype}|{tuple(tensor.shape)}" for name, tensor in named]
    return xxhash.xxh3_128("\n".join([*told, str(number)]).encode()).hexdigest()


def weighted_sum(words: Tensor) -> Tensor:
    """Of one row of int64, each times an odd number of its place; int64, one number.

    Sums of integers wrap around and have no rounding, so that the order of adding, which a GPU does not keep, changes
    nothing. An odd factor keeps every bit, so one wrong number is always seen, and several, or some that changed places, all
    but always. The highest bits, a number's sign, would count for little: they are spread over the lower half first.
    """
    factors = _odd_numbers(words.device)
    total = torch.zeros((), dtype=torch.int64, device=words.device)
    for start in range(0, len(words), _PART):
        spread = words[start : start + _PART] >> 32
        spread ^= words[start : start + _PART]
        whole = len(spread) // _COLUMNS * _COLUMNS
        rows = spread[:whole].view(-1, _COLUMNS)
        rows *= factors
        last = spread[whole:]
        last *= factors[: len(last)]
        sums = torch.cat([rows.sum(1), last.sum().unsqueeze(0)])
        first = start // _COLUMNS
        total += (sums * torch.arange(2 * first + 1, 2 * (first + len(sums)) + 1, 2, device=sums.device)).sum()
    return total


def _words(tensor: Tensor) -> Tensor:
    """The tensor's bytes as one row of int64, filled up with zeros."""
    data = as_bytes(tensor.contiguous())
    if missing := -len(data) % 8:
        data = torch.cat([data, data.new_zeros(missing)])
    if data.storage_offset() % 8:  # a part of a message, between two words
        data = data.clone()
    return data.view(torch.int64)


@functools.cache
def _odd_numbers(device: torch.device) -> Tensor:
    return (torch.randint(-(2**62), 2**62, (_COLUMNS,), generator=torch.Generator().manual_seed(0)) * 2 + 1).to(device)


def as_bytes(tensor: Tensor) -> Tensor:
    """One row of uint8, on the same memory where that is contiguous: numpy knows no bfloat16, and bytes are bytes."""
    return tensor.reshape(-1).view(torch.uint8)


def combined(checksums: Sequence[str]) -> str:
    """Of all buckets, in their order."""
    return xxhash.xxh3_128("|".join(checksums).encode()).hexdigest()


class PolicyCopy:
    """A model in an engine's process whose policy parameters become those that are sent, of one version or of several."""

    def __init__(self, model: nn.Module) -> None:
        self._parameters = policy_parameters(model)
        self._missing: set[str] = set()
        # The model's own memory is the first version's; each further one takes as much again, once.
        self._spare = [{name: parameter.data for name, parameter in self._parameters.items()}]
        self._versions: dict[int, dict[str, Tensor]] = {}
        self._coming: dict[str, Tensor] = {}

    def begin(self) -> None:
        """All parameters of a version are to come; those of others stay until they are dropped."""
        self._missing = set(self._parameters)
        if not self._coming:  # else what came of one that was never whole is written over
            self._coming = self._spare.pop() if self._spare else self._more()

    def _more(self) -> dict[str, Tensor]:
        return {name: torch.empty_like(parameter.data) for name, parameter in self._parameters.items()}

    def drop(self, version: int) -> None:
        """The next version that begins is written where this one lies."""
        self._spare.append(self._versions.pop(version))

    @property
    def versions(self) -> Collection[int]:
        """Those that are whole."""
        return self._versions.keys()

    def held(self, version: int) -> Mapping[str, Tensor]:
        """What is held of a version."""
        return self._versions[version]

    def use(self, version: int) -> None:
        """The model computes with this version."""
        for name, tensor in self._versions[version].items():
            self._parameters[name].data = tensor

    @torch.no_grad()
    def take(self, tensors: Mapping[str, Tensor]) -> str:
        """Copy them; returns the checksum of what is then held.

        Raises:
            WeightsVersionError: names or shapes that the model does not have.
        """
        for name, tensor in tensors.items():
            if name not in self._coming:
                raise WeightsVersionError(_other_parameters(f"{name!r} is not one of the model's"))
            held = self._coming[name]
            if held.shape != tensor.shape:
                raise WeightsVersionError(
                    f"rollout engine: {name} has another shape; found {tuple(tensor.shape)}; "
                    f"expected {tuple(held.shape)}; the engine must load the learner's model and LoRA"
                )
            held.copy_(tensor)
        self._missing -= tensors.keys()
        # In the dtype that was sent: what transformers keeps in float32 holds a bfloat16 number exactly.
        return checksum({name: self._coming[name].to(tensor.dtype) for name, tensor in tensors.items()})

    def finish(self, version: int) -> None:
        """This version is whole; raises WeightsVersionError where a parameter got none."""
        if self._missing:
            raise WeightsVersionError(
                _other_parameters(f"none were sent for {len(self._missing)}, {min(self._missing)!r}")
            )
        self._versions[version], self._coming = self._coming, {}


def _other_parameters(found: str) -> str:
    return (
        f"rollout engine: the weights sent name other parameters than the model has; found: {found}; the engine must load "
        f"the learner's model and LoRA"
    )
