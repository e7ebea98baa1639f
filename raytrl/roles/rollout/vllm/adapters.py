"""Versions of a LoRA policy side by side in one vLLM: its own adapters, each under a name of its own."""

import itertools
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any, get_args

import torch
from peft.tuners.lora import LoraLayer
from safetensors.torch import save_file
from torch import Tensor

from raytrl.errors import RunError
from raytrl.roles.models.adapters import POLICY_ADAPTER, add_policy_adapter
from raytrl.roles.models.loading import load_model
from raytrl.roles.rollout.vllm.batch import ContinuousBatch
from raytrl.roles.weights.buckets import PolicyCopy


class Adapters:
    """What an engine holds where it serves adapters as they are, and merges none.

    A name is never used twice, so no key-value cache of a prompt outlives the weights that made it.
    """

    def __init__(
        self,
        batch: ContinuousBatch,
        model_path: str,
        lora: Mapping[str, Any],
        dtype: torch.dtype,
        trust_remote_code: bool = False,
    ) -> None:
        base = load_model(
            model_path,
            "causal",
            "rollout",
            dtype=dtype,
            trust_remote_code=trust_remote_code,
            device_map={"": torch.device("meta")},  # vLLM has the base: here only the adapter is held
        )
        policy = add_policy_adapter(base, lora)
        for layer in policy.modules():
            if isinstance(layer, LoraLayer):
                for part in (layer.lora_A, layer.lora_B):
                    part[POLICY_ADAPTER].to_empty(device="cpu")
        self._batch, self._copy, self._config = batch, PolicyCopy(policy), policy.peft_config[POLICY_ADAPTER]
        self._numbers = itertools.count(1)
        self._served: dict[int, Any] = {}  # version → vLLM's LoRARequest

    def begin(self) -> None:
        """An adapter is coming."""
        self._copy.begin()

    def take(self, tensors: Mapping[str, Tensor]) -> str:
        """As `PolicyCopy.take`."""
        return self._copy.take(tensors)

    def finish(self, version: int) -> None:
        """It is whole, and vLLM has it: from a file, the only way in which it takes one.

        Raises:
            WeightsVersionError: a part of it is missing.
            RunError: vLLM did not take it.
        """
        from vllm.lora.request import LoRARequest

        self._copy.finish(version)
        number = next(self._numbers)
        with tempfile.TemporaryDirectory(prefix="raytrl-") as folder:
            infix = f".{POLICY_ADAPTER}."
            held = {name.replace(infix, "."): value for name, value in self._copy.held(version).items()}
            save_file(
                {name: tensor.contiguous() for name, tensor in held.items()}, Path(folder) / "adapter_model.safetensors"
            )
            self._config.save_pretrained(folder)
            request = LoRARequest(f"policy-{version}-{number}", number, folder)
            if not self._batch.call(lambda engine: engine.add_lora(request)):
                raise RunError(f"rollout engine: vLLM did not take the adapter of version {version}")
        self._served[version] = request

    def drop(self, version: int) -> None:
        """It is not served any more; the next one takes its place."""
        number = self._served.pop(version).lora_int_id
        self._batch.call(lambda engine: engine.remove_lora(number))
        self._copy.drop(version)

    def of(self, version: int) -> Any:
        """The `LoRARequest` of a version."""
        return self._served[version]


def adapter_arguments(lora: Mapping[str, Any], num_versions: int) -> dict[str, Any]:
    """Fields of vLLM's `EngineArgs`: room for so many adapters, of the least rank that vLLM has."""
    from vllm.config.lora import MaxLoRARanks

    rank = max([lora.get("r", 8), *(lora.get("rank_pattern") or {}).values()])
    least = min(each for each in get_args(MaxLoRARanks) if each >= rank)
    return {"enable_lora": True, "max_loras": num_versions, "max_cpu_loras": num_versions, "max_lora_rank": least}
