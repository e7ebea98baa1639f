"""The finished networks as folders: gathered tensor by tensor into the RAM of the first worker, and written from there.

So nothing more is needed on a GPU, and under ZeRO-3 no worker but the first ever holds a whole model. What is saved here
is all that a run of days was for.
"""

from collections.abc import Mapping
from copy import deepcopy
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from torch import Tensor, nn

from raytrl.roles.learner.backend import Backend
from raytrl.roles.learner.collectives import worker_rank
from raytrl.roles.learner.networks import VALUE_ADAPTER
from raytrl.roles.models.adapters import POLICY_ADAPTER, policy_parameters
from raytrl.roles.models.loading import load_model
from raytrl.roles.models.sharded import whole_models


def save_policy(backend: Backend, folder: Path, *, trust_remote_code: bool = False) -> None:
    """A Hugging Face folder; with LoRA the adapter, and the merged model in `merged/`. Collective; the first worker writes."""
    policy, dtype = backend.networks.policy, backend.networks.dtype
    if not isinstance(policy, PeftModel):
        _save_whole(backend, policy, folder)
        return
    tensors = _gathered(backend, policy_parameters(policy), torch.float32)
    if worker_rank() != 0:
        return
    policy.save_pretrained(str(folder), selected_adapters=[POLICY_ADAPTER], state_dict=tensors)
    path = str(policy.peft_config[POLICY_ADAPTER].base_model_name_or_path)
    with whole_models(backend.networks.sharding):
        base = load_model(path, "causal", "model.path", dtype=dtype, trust_remote_code=trust_remote_code)
        PeftModel.from_pretrained(base, str(folder)).merge_and_unload().save_pretrained(folder / "merged")


def save_value(backend: Backend, folder: Path) -> None:
    """The value function: a sequence classifier's folder; with LoRA the adapter and `value_head.pt`; shared, that
    alone. Collective; the first worker writes."""
    networks = backend.networks
    if networks.value is not None:
        _save_whole(backend, networks.value, folder)
        return
    assert networks.value_head is not None
    adapter = {name: p for name, p in networks.policy.named_parameters() if f".{VALUE_ADAPTER}." in name}
    tensors = _gathered(backend, adapter, torch.float32)
    head = _gathered(backend, dict(networks.value_head.named_parameters()), torch.float32)
    if worker_rank() != 0:
        return
    if not networks.is_shared:
        assert isinstance(networks.policy, PeftModel)
        networks.policy.save_pretrained(str(folder), selected_adapters=[VALUE_ADAPTER], state_dict=tensors)
        for file in (folder / VALUE_ADAPTER).iterdir():  # PEFT puts an adapter of another name than its default there
            file.replace(folder / file.name)
        (folder / VALUE_ADAPTER).rmdir()
    torch.save(head, folder / "value_head.pt")


def _save_whole(backend: Backend, model: nn.Module, folder: Path) -> None:
    dtype = backend.networks.dtype
    tensors = _gathered(backend, dict(model.named_parameters()), dtype)
    if worker_rank() != 0:
        return
    buffers = dict(model.named_buffers())
    tensors |= {name: value.cpu() for name, value in model.state_dict().items() if name in buffers}
    # For what a class and a config say of themselves; the numbers are `tensors`.
    with whole_models(backend.networks.sharding), torch.device("meta"):
        empty: Any = type(model)(deepcopy(model.config)).to(dtype)
    empty.generation_config = getattr(model, "generation_config", None)
    empty.save_pretrained(folder, state_dict=tensors)


def _gathered(backend: Backend, parameters: Mapping[str, nn.Parameter], dtype: torch.dtype) -> dict[str, Tensor]:
    """Whole, in the first worker's RAM; nothing elsewhere. Collective."""
    kept: dict[str, Tensor] = {}
    for tensors in backend.whole(parameters):
        if worker_rank() == 0:
            kept |= {name: value.detach().to("cpu", dtype, copy=True) for name, value in tensors.items()}
    return kept
