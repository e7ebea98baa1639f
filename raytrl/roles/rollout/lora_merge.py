"""LoRA on the rollout side: only the adapter travels; here it is added to the base weights."""

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from peft.tuners.lora import Linear, LoraLayer
from torch import Tensor

from raytrl.roles.models.adapters import POLICY_ADAPTER, add_policy_adapter, policy_parameters
from raytrl.roles.models.loading import load_model
from raytrl.roles.weights.buckets import PolicyCopy


class LoraMerge:
    """The base weights as they lie on disk, and the adapter that arrived last."""

    def __init__(
        self,
        model_path: str,
        lora: Mapping[str, Any],
        dtype: torch.dtype,
        trust_remote_code: bool = False,
        device: torch.device | str = "cpu",
    ) -> None:
        """
        Args:
            dtype: the rollout engine's. Safetensors in that dtype are mapped, not read into memory.
            device: where the two are added; the base stays where it is mapped, and goes there a weight at a time.
        """
        base = load_model(model_path, "causal", "rollout", dtype=dtype, trust_remote_code=trust_remote_code)
        self._policy = add_policy_adapter(base, lora)
        self._policy.requires_grad_(False)
        for parameter in policy_parameters(self._policy).values():
            parameter.data = parameter.data.to(device)
        self._device = device
        self._copy = PolicyCopy(self._policy)

    def begin(self) -> None:
        """A new adapter is coming, in place of the last one."""
        if 0 in self._copy.versions:
            self._copy.drop(0)
        self._copy.begin()

    def take(self, tensors: Mapping[str, Tensor]) -> str:
        """Hold this part of it; returns the checksum of what is then held.

        Raises:
            WeightsVersionError: it does not fit.
        """
        return self._copy.take(tensors)

    def finish(self) -> None:
        """Raises WeightsVersionError where a part of the adapter is missing."""
        self._copy.finish(0)

    def changed(self) -> Iterator[tuple[str, Tensor]]:
        """The parameters of every block that the adapter changes, merged, one by one, by their Hugging Face names.

        Those of a block that the adapter leaves alone are among them: an engine may fuse layers, such as query, key and
        value, and can replace them only together.
        """
        model = self._policy.get_base_model()
        layers = {name: layer for name, layer in model.named_modules() if isinstance(layer, LoraLayer)}
        blocks = {name.rpartition(".")[0] for name in layers}
        for name, parameter in model.named_parameters():
            layer, _, leaf = name.replace(".base_layer.", ".").rpartition(".")
            if "lora_" in name:
                continue
            if layer in layers and leaf == "weight":
                yield f"{layer}.{leaf}", self._merged(layers[layer])
            elif layer in layers and leaf == "bias" and layers[layer].lora_bias[POLICY_ADAPTER]:
                added = layers[layer].lora_B[POLICY_ADAPTER].bias.data * layers[layer].scaling[POLICY_ADAPTER]
                yield f"{layer}.{leaf}", parameter.data.to(self._device) + added
            elif layer.rpartition(".")[0] in blocks:
                yield f"{layer}.{leaf}", parameter.data

    @torch.no_grad()
    def _merged(self, layer: LoraLayer) -> Tensor:
        base: Tensor = layer.get_base_layer().weight.data.to(self._device)
        if type(layer) is Linear and layer.lora_A[POLICY_ADAPTER].weight.dtype == base.dtype:
            a, b = layer.lora_A[POLICY_ADAPTER].weight.data, layer.lora_B[POLICY_ADAPTER].weight.data
            factors = (a.t(), b.t()) if layer.fan_in_fan_out else (b, a)
            return torch.addmm(base, *factors, alpha=layer.scaling[POLICY_ADAPTER])  # in one pass over the weights
        delta: Tensor = layer.get_delta_weight(POLICY_ADAPTER)
        return (base.to(delta.dtype) + delta).to(base.dtype)  # rounded once
