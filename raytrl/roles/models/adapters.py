"""LoRA adapters: the policy's own, and how a finished one is merged."""

import os
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from torch import nn

from raytrl.config.runs.supervised import SupervisedRun
from raytrl.errors import ConfigError
from raytrl.roles.models.base import labels_of
from raytrl.roles.models.loading import load_model
from raytrl.roles.models.sharded import whole_models

if TYPE_CHECKING:
    from peft import PeftModel

# peft takes 5 s to import: only where there is an adapter.

POLICY_ADAPTER = "default"  # the name that PEFT saves at the top of a folder, where `from_pretrained` looks


def add_policy_adapter(model: nn.Module, lora: Mapping[str, Any]) -> "PeftModel":
    """The model with a fresh policy adapter; a rollout engine calls it too, so that parameter names agree."""
    from peft import LoraConfig, PeftModel, get_peft_model

    adapted = get_peft_model(model, LoraConfig(task_type="CAUSAL_LM", **lora), adapter_name=POLICY_ADAPTER)
    assert isinstance(adapted, PeftModel)
    return adapted


def policy_parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    """What travels to the rollout engines: the policy adapter where there is one, else every parameter."""
    named = dict(model.named_parameters())
    adapter = {name: value for name, value in named.items() if f".{POLICY_ADAPTER}." in name and "lora_" in name}
    return adapter or named


def with_adapters(model: Any, adapters: Mapping[str, tuple[str, str]]) -> Any:
    """The model with finished adapters on it, side by side, or as it is where there are none.

    Args:
        adapters: name in PEFT → (key of the run file, folder).

    Raises:
        ConfigError: one does not fit the model: some of its weights have no place, or places have no weights.
    """
    if not adapters:
        return model
    from peft import PeftModel

    found = model
    for name, (key, folder) in adapters.items():
        try:
            if found is model:
                found = PeftModel.from_pretrained(model, folder, adapter_name=name)
            # The first a second time: only this says what did not fit.
            loaded = found.load_adapter(folder, adapter_name=name)
        except (OSError, ValueError, RuntimeError, TypeError) as error:
            raise ConfigError(f"{key}: {folder!r} does not fit the model: {str(error).splitlines()[0]}") from error
        wrong = sorted([*loaded.unexpected_keys, *loaded.missing_keys])
        if wrong:
            raise ConfigError(f"{key}: {folder!r} does not fit the model; found: no match for {', '.join(wrong[:3])}")
    return found


def merge_adapter(run: SupervisedRun, base: str, adapter: str, tokenizer: Any, folder: str) -> None:
    """Writes the base model with the adapter's weights folded in, as a plain Hugging Face folder."""
    from peft import PeftModel

    with whole_models(None):
        model = load_model(
            base,
            run.head,
            "model.path",
            new_head=run.head == "score",
            revision=run.model.revision if base == run.model.path else None,
            dtype="auto",
            trust_remote_code=run.model.trust_remote_code,
            **labels_of(run),
        )
    if len(tokenizer) > model.get_input_embeddings().num_embeddings:
        model.resize_token_embeddings(len(tokenizer))
    model.config.pad_token_id = tokenizer.pad_token_id
    merged = PeftModel.from_pretrained(model, adapter).merge_and_unload()
    os.makedirs(folder, exist_ok=True)
    merged.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
