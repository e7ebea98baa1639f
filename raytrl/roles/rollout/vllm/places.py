"""Where each of the learner's tensors belongs in vLLM's model, so that new ones can be put straight there.

vLLM's own way to take new weights (layer by layer: see `vllm_worker`) costs milliseconds a layer, whatever its size. Here its
first run is watched; from what it did follows where the next weights go. Only layers of kinds that are known to keep
nothing else that is made from their weights are taken; a model with others is loaded layer by layer for good.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from raytrl.errors import WeightsVersionError
from raytrl.roles.weights.buckets import checksum


@dataclass(frozen=True)
class Layout:
    """A view of a tensor: sizes and strides in numbers, and where it starts, counted from the tensor's own start."""

    size: tuple[int, ...]
    stride: tuple[int, ...]
    offset: int

    @classmethod
    def of(cls, view: Tensor, tensor: Tensor) -> "Layout":
        return cls(tuple(view.shape), view.stride(), int(view.storage_offset()) - int(tensor.storage_offset()))

    def view(self, tensor: Tensor) -> Tensor:
        return tensor.as_strided(self.size, self.stride, int(tensor.storage_offset()) + self.offset)


@dataclass(frozen=True)
class Copy:
    """What one `copy_` of a loader did: a part of a tensor that was sent became a part of a parameter."""

    name: str  # of what was sent
    source: Layout
    module: nn.Module
    parameter: str  # of the module
    whole: Layout  # of the parameter while it was loaded; a kernel's own format may have taken its place since
    there: Layout
    checksum: str  # of the part

    @classmethod
    def seen(cls, model: nn.Module, name: str, sent: Tensor, source: Tensor, there: Tensor) -> "Copy | None":
        """`source` is a view of `sent`. None: `there` is not a part of any parameter."""
        place = there.untyped_storage().data_ptr()
        for module in model.modules():
            for key, parameter in module.named_parameters(recurse=False):
                if not parameter.is_meta and parameter.untyped_storage().data_ptr() == place:
                    whole, part = Layout.of(parameter, parameter), Layout.of(there, parameter)
                    return cls(name, Layout.of(source, sent), module, key, whole, part, checksum({"": there}))
        return None


@dataclass
class _Packed:
    """A weight of a linear layer that only its kernel's format holds: put together here, then packed."""

    module: Any
    whole: Layout
    parts: int  # copies that make it
    missing: int = 0
    weight: Tensor | None = None


@dataclass
class Places:
    """What `load` needs to know of each tensor."""

    copies: Mapping[str, list[Copy]]
    packed: Mapping[int, _Packed]  # by the id of the module
    repacked: Mapping[str, list[Any]]  # modules whose kernels pack a parameter that stays, by what was sent for it
    _seen: set[str] = field(default_factory=set)
    _turn: int = 0

    @classmethod
    def learn(cls, model: nn.Module, copies: Iterable[Copy]) -> "Places | str":
        """From all that the loaders did, after the model is whole again; a string says why it cannot be."""
        by_name: dict[str, list[Copy]] = {}
        by_parameter: dict[tuple[int, str], list[Copy]] = {}
        for copy in copies:
            by_name.setdefault(copy.name, []).append(copy)
            by_parameter.setdefault((id(copy.module), copy.parameter), []).append(copy)
        packed: dict[int, _Packed] = {}
        for group in by_parameter.values():
            module, key = group[0].module, group[0].parameter
            live = getattr(module, key)
            if _is_packed_away(module, key, live):
                if not _tiles(group):
                    return f"{type(module).__name__} packs more than was sent"
                packed[id(module)] = _Packed(module, group[0].whole, len(group))
            elif any(checksum({"": copy.there.view(live)}) != copy.checksum for copy in group):
                return f"{type(module).__name__}.{key} is not kept as it was sent"
        return cls(by_name, packed, _repacked(model, by_name, packed))

    def begin(self) -> None:
        """New weights are coming."""
        self._seen = set()
        self._turn += 1
        for packed in self.packed.values():
            packed.missing, packed.weight = packed.parts, None

    @torch.no_grad()
    def load(self, tensors: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
        """Put these where the kernels compute with them; returns the memory that is theirs there.

        Raises:
            WeightsVersionError: unknown names, or a kernel that then computes with something else.
        """
        held = {name: self._put(name, tensor) for name, tensor in tensors.items()}
        for packed in self.packed.values():
            if packed.weight is not None and not packed.missing:
                _pack(packed.module, packed.weight, self._turn)
                packed.weight = None
        for name in tensors:
            for module in self.repacked.get(name, []):
                _pack(module, module.weight, self._turn)
        return held

    def check_whole(self) -> None:
        """Raises WeightsVersionError unless all tensors came that came the first time."""
        left = sorted(self.copies.keys() - self._seen)
        if left:
            raise WeightsVersionError(
                f"rollout engine: the learner sent no weights for {len(left)} of vLLM's parameters, first {left[0]!r}"
            )

    def _put(self, name: str, tensor: Tensor) -> Tensor:
        """Returns the memory that now holds the tensor, as it was sent."""
        if name not in self.copies:
            raise WeightsVersionError(f"rollout engine: was sent {name!r}, for which vLLM's model had no place before")
        self._seen.add(name)
        held = tensor
        for copy in self.copies[name]:
            source, packed = copy.source.view(tensor), self.packed.get(id(copy.module))
            if packed is not None and copy.parameter == "weight":
                packed.missing -= 1
                if packed.parts == 1 and copy.source == copy.there == copy.whole:
                    packed.weight = tensor  # needs no putting together
                    continue
                if packed.weight is None:
                    packed.weight = torch.empty_strided(packed.whole.size, packed.whole.stride, dtype=tensor.dtype)
                there = copy.there.view(packed.weight)
            else:
                there = copy.there.view(getattr(copy.module, copy.parameter).data)
            there.copy_(source)
            if source.shape == tensor.shape and source.is_contiguous():
                held = there
            elif not _same(there, source):
                raise WeightsVersionError(f"rollout engine: vLLM does not hold what was sent as {name!r}")
        return held


def check_packed(module: Any, weight: Tensor, turn: int) -> None:
    """A unit vector picks one column of the weight out of what a kernel has packed, bit by bit: never one of older weights.

    Args:
        weight: (outputs, inputs), what should be packed.
        turn: another number, another column.

    Raises:
        WeightsVersionError: it is not the weight's. Where a weight is not finite, nothing can be told.
    """
    column = turn * 7919 % weight.shape[1]
    unit = torch.zeros(1, weight.shape[1], dtype=weight.dtype)
    unit[0, column] = 1
    found, expected = module.cpu_linear(unit, weight, None)[0], weight[:, column]
    if not bool(((found == expected) | found.isnan()).all()):
        raise WeightsVersionError(
            f"rollout engine: vLLM computes with other weights than it was given in a {type(module).__name__}"
        )


def packs_in_vain(module: nn.Module) -> bool:
    """vLLM packs an embedding like a head, though it is only looked up in, unless the model uses it as its head too."""
    from vllm.model_executor.layers.vocab_parallel_embedding import VocabParallelEmbedding

    return type(module) is VocabParallelEmbedding


def _pack(module: Any, weight: Tensor, turn: int) -> None:
    """As vLLM packs after it has loaded a layer; `module.weight` stays the object that it is."""
    kept = module.weight
    module.cpu_linear = None  # the old one first, so that the new one takes its memory
    if packs_in_vain(module):
        module.cpu_linear = _PackedWhenUsed(module)
        return
    if weight is not kept:
        module.weight = nn.Parameter(weight, requires_grad=False)
    try:
        module.quant_method.process_weights_after_loading(module)
        check_packed(module, weight, turn)
    finally:
        module.weight = kept


@dataclass(frozen=True)
class _PackedWhenUsed:
    """Stands for a kernel's packed weights until they are asked for."""

    module: Any

    def __call__(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        self.module.quant_method.process_weights_after_loading(self.module)
        result: Tensor = self.module.cpu_linear(x, weight, bias)
        return result


def _is_packed_away(module: Any, key: str, live: Tensor) -> bool:
    return key == "weight" and not live.numel() and getattr(module, "cpu_linear", None) is not None


def _tiles(group: list[Copy]) -> bool:
    """Whether the copies make up the whole parameter, each number once."""
    whole = group[0].whole
    times = torch.zeros(whole.size, dtype=torch.uint8).as_strided(whole.size, whole.stride)
    for copy in group:
        if copy.whole != whole:
            return False
        copy.there.view(times).add_(1)
    return bool((times == 1).all())


def _repacked(
    model: nn.Module, by_name: Mapping[str, list[Copy]], packed: Mapping[int, _Packed]
) -> dict[str, list[Any]]:
    """A tied head shares its parameter with the embedding, and each of the two packs it."""
    users: dict[int, list[Any]] = {}
    for module in model.modules():
        if getattr(module, "cpu_linear", None) is not None and id(module) not in packed:
            users.setdefault(id(module.weight), []).append(module)
    return {
        name: [user for copy in copies for user in users.get(id(getattr(copy.module, copy.parameter)), [])]
        for name, copies in by_name.items()
    }


def unknown_layers(model: nn.Module) -> list[str]:
    """Kinds of layers that may make something else from their weights, once these are loaded."""
    from vllm.model_executor.layers.attention import Attention
    from vllm.model_executor.layers.linear import UnquantizedLinearMethod
    from vllm.model_executor.layers.vocab_parallel_embedding import UnquantizedEmbeddingMethod

    known = (UnquantizedLinearMethod, UnquantizedEmbeddingMethod)
    return [
        type(module).__name__
        for module in model.modules()
        if type(module) is not Attention
        and (
            hasattr(module, "process_weights_after_loading")
            or (getattr(module, "quant_method", None) is not None and type(module.quant_method) not in known)
        )
    ]


def _same(found: Tensor, expected: Tensor) -> bool:
    arrived = expected.to(found)
    return torch.equal(found, arrived) or bool(((found == arrived) | (arrived != arrived)).all())  # NaN != NaN
