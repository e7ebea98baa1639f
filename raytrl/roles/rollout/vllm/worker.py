"""What vLLM's worker gains to take new weights: mixed into its class by vLLM's own option `worker_extension_cls`.

Imported by vLLM inside the process, or the processes, that hold the model.
"""

import logging
from collections.abc import Iterable, Mapping
from contextlib import nullcontext
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from raytrl.errors import WeightsVersionError
from raytrl.roles.rollout.lora_merge import LoraMerge
from raytrl.roles.rollout.vllm.places import Copy, Places, check_packed, unknown_layers
from raytrl.roles.weights.buckets import checksum, grouped

LOG = logging.getLogger("raytrl")


class WeightLoading:
    """New weights by Hugging Face names: the first time layer by layer and watched, then straight to their places."""

    model_runner: Any
    parallel_config: Any
    model_config: Any
    device: torch.device
    _raytrl_merge: LoraMerge | None = None  # adapters arrive
    _raytrl_places: Places | str | None = None  # a string: why there are none
    _raytrl_reload: "_LayerByLayer | None" = None  # under way

    def raytrl_expect_adapters(self, model_path: str, lora: Mapping[str, Any], trust_remote_code: bool) -> None:
        """What comes from now on are adapters of the model that lies at this path; they are added to it here."""
        dtype = self.model_config.dtype
        self._raytrl_merge = LoraMerge(model_path, lora, dtype, trust_remote_code, self.device)

    def raytrl_begin_weights(self) -> None:
        """The model computes nothing sensible until `raytrl_finish_weights`."""
        if self._raytrl_merge is not None:
            self._raytrl_merge.begin()
        else:
            self._raytrl_begin_model(complete=True)

    def raytrl_take_weights(self, named: Iterable[tuple[str, Tensor]]) -> str:
        """Load these; returns the checksum of what the model then holds of them, or of what arrived where the model holds
        it in another form.

        Raises:
            WeightsVersionError: a tensor has no place or did not arrive there as it is.
        """
        if self._raytrl_merge is not None:
            return self._raytrl_merge.take(dict(named))
        return checksum(self._raytrl_take_into_model(dict(named)))

    def raytrl_take_file(self, path: str) -> str:
        """As `raytrl_take_weights`, of a file of safetensors, whose pages all of the engine's processes share."""
        return self.raytrl_take_weights(load_file(path).items())

    def raytrl_finish_weights(self) -> None:
        """All are there: the model is whole.

        Raises:
            WeightsVersionError: a tensor, or a part of it, found no place, or a parameter got none.
        """
        if self._raytrl_merge is not None:
            self._raytrl_merge.finish()
            self._raytrl_begin_model(complete=False)
            for group in grouped(self._raytrl_merge.changed()):  # merged one group after the other
                self._raytrl_take_into_model(dict(group))
        self._raytrl_finish_model()

    def _raytrl_begin_model(self, complete: bool) -> None:
        """
        Args:
            complete: all weights of the model will come; else all or none of the weights of a layer, of layers that vLLM
                fuses too, and the same ones each time.
        """
        if self._raytrl_reload is not None:  # an update that failed; the model must be whole for the next
            reload, self._raytrl_reload = self._raytrl_reload, None
            reload.restore()
        if isinstance(self._raytrl_places, Places):
            self._raytrl_places.begin()
            return
        model = self.model_runner.get_model()
        hidden = self._raytrl_hidden()
        if self._raytrl_places is None and (obstacle := hidden or _keeps_more(model)):
            self._raytrl_places = obstacle
            LOG.info("vLLM loads new weights layer by layer: %s", obstacle)
        learns = self._raytrl_places is None
        self._raytrl_reload = _LayerByLayer(
            model, self.model_config, complete, _Loading(model, learns) if hidden is None else None
        )

    def _raytrl_hidden(self) -> str | None:
        """Why weights cannot be followed to their places."""
        if self.model_config.quantization is not None:
            return "quantised, they are other numbers than those sent"
        if self.parallel_config.world_size > 1:
            return "each of the engine's processes holds a part of them"
        return None

    def _raytrl_take_into_model(self, tensors: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
        """What the model then has of them."""
        if self._raytrl_reload is not None:
            self._raytrl_reload.load(tensors)
            return tensors  # of which every number was seen to arrive, or which are held in another form
        assert isinstance(self._raytrl_places, Places)
        return self._raytrl_places.load(tensors)

    def _raytrl_finish_model(self) -> None:
        if self._raytrl_reload is None:
            assert isinstance(self._raytrl_places, Places)
            self._raytrl_places.check_whole()
            return
        reload, self._raytrl_reload = self._raytrl_reload, None
        reload.finish()
        if reload.watching is not None and reload.watching.learns:
            self._raytrl_places = Places.learn(self.model_runner.get_model(), reload.watching.copies)
            if isinstance(self._raytrl_places, str):
                LOG.info("vLLM loads new weights layer by layer: %s", self._raytrl_places)


def _keeps_more(model: nn.Module) -> str | None:
    """Why weights that were put to their places would not be all that the model computes with."""
    unknown = unknown_layers(model)
    return f"{unknown[0]} may keep more than its weights" if unknown else None


class _LayerByLayer:
    """vLLM's own `reload_weights`, in parts: a layer goes to new memory, is brought into its kernels' format, and replaces
    the old one in place; then the next. On a CPU the weights of linear layers are packed, and exist in no other form."""

    def __init__(self, model: Any, model_config: Any, complete: bool, watching: "_Loading | None") -> None:
        """`watching`: every tensor on its way into the layer that computes with it."""
        from vllm.model_executor.model_loader.reload import initialize_layerwise_reload

        self._model, self._config, self._complete = model, model_config, complete
        self._missing = {name for name, _ in model.named_parameters()}
        self.watching = watching
        initialize_layerwise_reload(model)

    def load(self, tensors: Mapping[str, Tensor]) -> None:
        if self.watching is not None:
            self.watching.watch(tensors)
        with torch.no_grad(), self.watching or nullcontext():
            loaded = self._model.load_weights(tensors.items())
        self._missing -= set(self._missing if loaded is None else loaded)

    def restore(self) -> None:
        """Makes the model whole; layers that got no weights keep the ones they had."""
        from vllm.model_executor.model_loader.reload import finalize_layerwise_reload

        with torch.no_grad(), self.watching or nullcontext():
            finalize_layerwise_reload(self._model, self._config)
        _pack_tied(self._model)

    def finish(self) -> None:
        self.restore()
        for module in self._model.modules():
            weight = getattr(module, "weight", None) if getattr(module, "cpu_linear", None) is not None else None
            if weight is not None and weight.dim() == 2 and weight.numel():  # packed, and kept as it was too
                check_packed(module, weight, 1)
        if self.watching is not None:
            self.watching.check_whole()
        left = sorted(self._missing)
        if self._complete and left:
            raise WeightsVersionError(
                f"rollout engine: the learner sent no weights for {len(left)} of vLLM's parameters, first {left[0]!r}"
            )


def _pack_tied(model: nn.Module) -> None:
    """vLLM's reload (0.32) leaves a head that shares the embedding's weights with what it had packed before."""
    owners: dict[int, list[Any]] = {}
    for module in model.modules():
        for parameter in module.parameters(recurse=False):
            owners.setdefault(id(parameter), []).append(module)
    for modules in owners.values():
        for module in modules if len(modules) > 1 else ():
            module.quant_method.process_weights_after_loading(module)


class _Loading(TorchFunctionMode):
    """Sees every `copy_` that the model's loaders do: where a tensor went, and whether it arrived as it is."""

    def __init__(self, model: nn.Module, learns: bool) -> None:
        """`learns`: keep what was copied where in `copies`."""
        super().__init__()
        self.copies: list[Copy] = []
        self.learns, self._model = learns, model
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

    def watch(self, tensors: Mapping[str, Tensor]) -> None:
        """These come next."""
        for name, tensor in tensors.items():
            if tensor.numel():
                self._sent[tensor.untyped_storage().data_ptr()] = name
                self._left[name] = tensor.numel()
                self._alive[tensor.untyped_storage().data_ptr()] = tensor

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
            sent = self._alive[source.untyped_storage().data_ptr()]
            copy = Copy.seen(self._model, name, sent, source, there) if self.learns else None
        if not same:
            raise WeightsVersionError(f"rollout engine: vLLM does not hold what was sent as {name!r}")
        if copy is not None:
            self.copies.append(copy)
        self._left[name] -= source.numel()
        if self._left[name] <= 0:  # need not stay
            place = source.untyped_storage().data_ptr()
            del self._sent[place], self._alive[place]
