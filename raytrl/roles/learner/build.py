"""A learner worker's networks from models, and the backend that optimizes them."""

from collections.abc import Mapping
from copy import deepcopy
from typing import Any

import torch
from peft import LoraConfig
from torch import nn
from transformers import AutoModelForSequenceClassification

from raytrl.config.sections.ppo import PpoSection
from raytrl.errors import ConfigError
from raytrl.roles.learner.backend import Backend
from raytrl.roles.learner.mapped import MappedFiles
from raytrl.roles.learner.networks import VALUE_ADAPTER, Networks, backbone
from raytrl.roles.learner.torch_backend import TorchBackend
from raytrl.roles.models.adapters import add_policy_adapter
from raytrl.roles.models.loading import check_loaded, load_model
from raytrl.roles.models.sharded import prepare_deepspeed, set_to_zero, tell_transformers


def build_backend(
    networks: Networks, config: PpoSection, *, deepspeed: Mapping[str, Any] | None = None, device: str = "cpu"
) -> Backend:
    """The backend of one learner worker; torch.distributed, where used, must be initialised before.

    Args:
        deepspeed: a DeepSpeed dictionary; None is plain data parallelism.
        device: of this worker, e.g. "cuda:0".
    """
    rates = {
        "learning_rate": config.learning_rate,
        "value_learning_rate": config.value_learning_rate or config.learning_rate,
        "epsilon": config.adam_epsilon,
        "max_norm": config.max_grad_norm,
    }
    networks.to(device)
    backend: Backend
    if deepspeed is None:
        backend = TorchBackend(networks, **rates)
    else:
        from raytrl.roles.learner.deepspeed_backend import DeepSpeedBackend  # an optional extra, and seconds to import

        prepare_deepspeed(torch.device(device).type == "cuda")
        backend = DeepSpeedBackend(networks, deepspeed, **rates)
    networks.prepare()  # under ZeRO-3 only the engine can run them
    return backend


def build_networks(
    model_path: str,
    *,
    lora: Mapping[str, Any] | None = None,
    value_init: str | None = None,
    reference_path: str | None = None,
    critic: bool = True,
    reference: bool = True,
    shared: bool = False,
    dtype: torch.dtype = torch.float32,
    trust_remote_code: bool = False,
    seed: int = 0,
    gradient_checkpointing: bool = False,
    deepspeed: Mapping[str, Any] | None = None,
    on_gpu: bool = False,
) -> Networks:
    """The networks of one learner worker from folders or hub ids.

    Args:
        lora: PEFT `LoraConfig` fields; None is full fine-tuning.
        value_init: a model to start the value function from, e.g. a reward model, whose score head is kept; None:
            with LoRA an adapter and head on the base, else a copy of the policy with a zero head.
        reference_path: None is the starting policy.
        critic, reference: False where the algorithm needs none: nothing is loaded for it.
        shared: the value function is a head on the policy.
        seed: of the adapters' initial weights, so that every worker starts from the same.
        gradient_checkpointing: see `Networks`.
        deepspeed: a DeepSpeed dictionary; under ZeRO-3 no worker ever holds a whole model, and `build_backend` must get
            the same.
        on_gpu: whether this worker was given one.
    """

    def causal(path: str) -> nn.Module:
        model: nn.Module = load_model(path, "causal", "learner", dtype=dtype, trust_remote_code=trust_remote_code)
        return model

    if deepspeed is not None:
        prepare_deepspeed(on_gpu)
    sharding = tell_transformers(deepspeed, dtype)
    torch.manual_seed(seed)
    policy = causal(model_path)
    value = None
    if critic and not shared and (value_init is not None or lora is None):
        value = value_from_path(value_init or model_path, dtype, trust_remote_code)
    if reference and reference_path is None and lora is None:
        # Read again rather than copied: weights that nobody writes to stay pages of their file, and all processes of a
        # node that hold them, other workers and a sweep's other trials, share one copy in its RAM.
        reference_path = model_path
    files = MappedFiles([path for path in (reference_path, model_path if lora else None) if path is not None])
    networks = assemble(
        policy,
        value,
        None if reference_path is None else causal(reference_path),
        critic=critic,
        reference_needed=reference,
        shared=shared,
        lora=lora,
        dtype=dtype,
        gradient_checkpointing=gradient_checkpointing,
    )
    networks.files, networks.sharding = files, sharding
    return networks


def assemble(
    policy: nn.Module,
    value: nn.Module | None = None,
    reference: nn.Module | None = None,
    *,
    critic: bool = True,
    reference_needed: bool = True,
    shared: bool = False,
    lora: Mapping[str, Any] | None = None,
    dtype: torch.dtype = torch.float32,
    gradient_checkpointing: bool = False,
) -> Networks:
    """`Networks` from models in memory; None for one that is needed as in `build_networks`."""
    model = policy
    if lora is None:
        reference = deepcopy(policy) if reference is None and reference_needed else reference
        value = value_from_policy(policy) if value is None and critic and not shared else value
    else:
        model = add_policy_adapter(policy, lora)
        if value is None and critic and not shared:
            model.add_adapter(VALUE_ADAPTER, LoraConfig(task_type="CAUSAL_LM", **lora))
    return Networks(
        model,
        value,
        reference,
        dtype=dtype,
        critic=critic,
        shared=shared,
        gradient_checkpointing=gradient_checkpointing,
    )


def value_from_policy(policy: nn.Module) -> nn.Module:
    """A sequence classifier of the policy's family with its backbone's weights and a zero head."""
    config = deepcopy(policy.config)
    config.num_labels = 1  # type: ignore[union-attr]
    value: nn.Module = AutoModelForSequenceClassification.from_config(config)
    _check_head(value, "the policy")
    backbone(value).load_state_dict(backbone(policy).state_dict())
    nn.init.zeros_(value.score.weight)  # type: ignore[union-attr, arg-type]
    return value


def value_from_path(path: str, dtype: torch.dtype, trust_remote_code: bool = False) -> nn.Module:
    """A sequence classifier with its head, e.g. a reward model; the head of a language model without one is zero."""
    value, loading = AutoModelForSequenceClassification.from_pretrained(
        path, num_labels=1, dtype=dtype, trust_remote_code=trust_remote_code, output_loading_info=True
    )
    _check_head(value, path)
    check_loaded(value, loading, "score", f"value_model.init: {path!r}", new_head=True)
    if any(key.startswith("score.") for key in loading["missing_keys"]):
        set_to_zero(value.score.weight)
    module: nn.Module = value
    return module


def _check_head(value: nn.Module, origin: str) -> None:
    if not isinstance(getattr(value, "score", None), nn.Linear):
        raise ConfigError(
            f"value_model.init: the sequence classifier of {origin} has no linear layer `score`; found "
            f"{type(value).__name__}; expected a decoder family such as GPT-2, Llama or Qwen"
        )
