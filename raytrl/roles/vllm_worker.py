"""What vLLM's worker gains to take new weights: mixed into its class by vLLM's own option `worker_extension_cls`.

Imported by vLLM inside the process, or the processes, that hold the model.
"""

from collections.abc import Iterable, Iterator
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from raytrl.errors import WeightsVersionError


class WeightLoading:
    """New weights by Hugging Face names, each followed on its way into the layer that computes with it."""

    model_runner: Any
    parallel_config: Any
    model_config: Any

    def raytrl_load_weights(self, named: Iterable[tuple[str, Tensor]], complete: bool) -> None:
        """As vLLM's own `reload_weights`: a layer goes to new memory, is brought into its kernels' format, and replaces
        the old one in place; then the next. On a CPU the weights of linear layers are packed, and exist in no other form.

        Args:
            named: consumed one by one. All or none of the weights of a layer, of layers that vLLM fuses too.
            complete: these are all weights of the model; else the others stay as they are.

        Raises:
            WeightsVersionError: a tensor found no place or did not arrive as it is, or a parameter got none.
        """
        model = self.model_runner.get_model()
        expected = {name for name, _ in model.named_parameters()}
        # Quantised weights are other numbers than those sent, and of tensor parallel ones each process has a part.
        follows = self.model_config.quantization is None and self.parallel_config.world_size == 1
        loading = _Loading() if follows else None
        with torch.no_grad(), loading or nullcontext():
            watched = named if loading is None else loading.watched(named)
            loaded = self._layer_by_layer(model, watched)
        _check_packed(model)
        if loading is not None:
            loading.check_whole()
        left = sorted(expected - set(loaded if loaded is not None else expected))
        if complete and left:
            raise WeightsVersionError(
                f"rollout engine: the learner sent no weights for {len(left)} of vLLM's parameters, first {left[0]!r}"
            )

    def _layer_by_layer(self, model: Any, named: Iterable[tuple[str, Tensor]]) -> Any:
        from vllm.model_executor.model_loader.reload import finalize_layerwise_reload, initialize_layerwise_reload

        initialize_layerwise_reload(model)
        try:
            return model.load_weights(named)
        finally:  # also after an error: the model must be whole for the next weights
            finalize_layerwise_reload(model, self.model_config)
            _pack_tied(model)


def _pack_tied(model: nn.Module) -> None:
    """vLLM's reload (0.32) leaves a head that shares the embedding's weights with what it had packed before."""
    owners: dict[int, list[Any]] = {}
    for module in model.modules():
        for parameter in module.parameters(recurse=False):
            owners.setdefault(id(parameter), []).append(module)
    for modules in owners.values():
        for module in modules if len(modules) > 1 else ():
            module.quant_method.process_weights_after_loading(module)


def _check_packed(model: nn.Module) -> None:
    """Where packed weights and their originals both exist, they must compute the same."""
    for name, module in model.named_modules():
        weight, packed = getattr(module, "weight", None), getattr(module, "cpu_linear", None)
        if packed is None or weight is None or weight.dim() != 2 or not weight.numel():
            continue
        probe = torch.linspace(-1, 1, weight.shape[1], dtype=weight.dtype).unsqueeze(0)
        found, expected = packed(probe, weight, None), torch.nn.functional.linear(probe, weight)
        scale = float(expected.abs().nan_to_num().max())
        if not torch.allclose(found, expected, rtol=1e-3, atol=1e-3 * scale, equal_nan=True):
            raise WeightsVersionError(f"rollout engine: vLLM computes with other weights than it was given in {name}")


class _Loading(TorchFunctionMode):
    """Sees every `copy_` that the model's loaders do: where a tensor went, and whether it arrived as it is."""

    def __init__(self) -> None:
        super().__init__()
        self._sent: dict[int, str] = {}  # by the place of their memory, which views of a tensor share
        self._left: dict[str, int] = {}  # numbers that have not arrived
        self._alive: dict[int, Tensor] = {}  # those on their way, so that no two have the same place

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if func is Tensor.copy_:
            there, source = args[:2]
            name = None if there.is_meta or source.is_meta else self._sent.get(source.untyped_storage().data_ptr())
            if name is not None:
                self._compare(name, there, source)
        return result

    def watched(self, named: Iterable[tuple[str, Tensor]]) -> Iterator[tuple[str, Tensor]]:
        """Hands the tensors out."""
        for name, tensor in named:
            if tensor.numel():
                self._sent[tensor.untyped_storage().data_ptr()] = name
                self._left[name] = tensor.numel()
                self._alive[tensor.untyped_storage().data_ptr()] = tensor
            yield name, tensor

    def check_whole(self) -> None:
        """Raises where a tensor, or a part of it, was copied to nowhere."""
        missing = [name for name, left in self._left.items() if left > 0]
        if missing:
            raise WeightsVersionError(
                f"rollout engine: vLLM's loader for this model left out {len(missing)} of the weights sent, first "
                f"{missing[0]!r}; set rollout.engine: transformers"
            )

    def _compare(self, name: str, there: Tensor, source: Tensor) -> None:
        with torch._C.DisableTorchFunction():
            arrived = source.to(there)
            same = torch.equal(there, arrived) or bool(((there == arrived) | (arrived != arrived)).all())  # NaN != NaN
        if not same:
            raise WeightsVersionError(f"rollout engine: vLLM does not hold what was sent as {name!r}")
        self._left[name] -= source.numel()
        if self._left[name] <= 0:  # merged tensors are made one by one, and need not stay
            place = source.untyped_storage().data_ptr()
            del self._sent[place], self._alive[place]
