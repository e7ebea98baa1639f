"""Versioned weights on their way from the learner to the rollout engines, and the proof of what arrived."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import torch
import xxhash
from torch import Tensor, nn

from raytrl.errors import WeightsVersionError

POLICY_ADAPTER = "default"  # the name that PEFT saves at the top of a folder, where `from_pretrained` looks


@dataclass(frozen=True)
class Weights:
    """What a rollout engine needs to become the policy after `version` steps.

    `tensors` are on the CPU, under the names of the policy's parameters: all of them, or with LoRA the adapter's.
    """

    version: int
    tensors: Mapping[str, Tensor]
    checksum: str

    @classmethod
    def of(cls, version: int, named: Iterable[tuple[str, Tensor]], dtype: torch.dtype) -> "Weights":
        """In the dtype of the rollout engines; tensors that are so already are not copied, so send them at once."""
        tensors = {name: value.detach().to("cpu", dtype).contiguous() for name, value in named}
        return cls(version, tensors, checksum(tensors))


def checksum(tensors: Mapping[str, Tensor]) -> str:
    """Digest of names, dtypes, shapes and bytes, whatever the order and the device."""
    digest = xxhash.xxh3_128()  # against faults, not fraud; as fast as memory, where a cryptographic one is not
    for name in sorted(tensors):
        value = tensors[name].detach().cpu().contiguous()
        digest.update(f"{name}|{value.dtype}|{tuple(value.shape)}|".encode())
        # numpy knows no bfloat16; bytes are bytes.
        digest.update(value.reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def policy_parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    """What travels to the rollout engines: the policy adapter where there is one, else every parameter."""
    named = dict(model.named_parameters())
    adapter = {name: value for name, value in named.items() if f".{POLICY_ADAPTER}." in name and "lora_" in name}
    return adapter or named


@torch.no_grad()
def copy_into(model: nn.Module, weights: Weights) -> None:
    """Copy into the model and prove it: the checksum of what the model then holds must be the sender's.

    Raises:
        WeightsVersionError: other names, shapes or dtypes than the model's, or bytes that changed on the way.
    """
    parameters = policy_parameters(model)
    if parameters.keys() != weights.tensors.keys():
        odd = sorted(parameters.keys() ^ weights.tensors.keys())
        raise WeightsVersionError(
            f"rollout engine: weights of version {weights.version} name other parameters than the model has; found "
            f"{len(odd)} that only one side knows, first {odd[0]!r}; the engine must load the learner's model and LoRA"
        )
    for name, parameter in parameters.items():
        if parameter.shape != weights.tensors[name].shape:
            raise WeightsVersionError(
                f"rollout engine: {name} has another shape; found {tuple(weights.tensors[name].shape)}; "
                f"expected {tuple(parameter.shape)}; the engine must load the learner's model and LoRA"
            )
        parameter.copy_(weights.tensors[name])
    held = checksum({name: parameter.data for name, parameter in parameters.items()})
    if held != weights.checksum:
        raise WeightsVersionError(
            f"rollout engine: weights of version {weights.version} are not what the learner sent; found checksum "
            f"{held}; expected {weights.checksum}; the engine's dtype must be the one that the learner sends"
        )
