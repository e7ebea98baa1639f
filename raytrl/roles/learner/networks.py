"""The networks of PPO: policy, value function and reference, as one module with one `forward`.

Full fine-tuning: three models. LoRA: one base; the policy is an adapter, the value function a second adapter with a
head, the reference the base with adapters off.
"""

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from copy import deepcopy
from pathlib import Path
from typing import Literal

import torch
from peft import PeftModel
from torch import Tensor, nn
from transformers.activations import GELUTanh, NewGELUActivation
from transformers.pytorch_utils import Conv1D

from raytrl.roles.learner import unpadded
from raytrl.roles.learner.mapped import MappedFiles
from raytrl.roles.learner.sequences import Sequences
from raytrl.roles.models.adapters import POLICY_ADAPTER

VALUE_ADAPTER = "value_function"  # "value" is what some attention layers call a projection


Network = Literal["policy", "reference", "value"]


class Networks(nn.Module):
    """Which network runs is an argument of `forward`, so that engines that hook `forward` see them all."""

    def __init__(
        self,
        policy: nn.Module,
        value: nn.Module | None,
        reference: nn.Module | None,
        *,
        dtype: torch.dtype,
        gradient_checkpointing: bool = False,
    ) -> None:
        """
        Args:
            policy: a causal language model, or a `PeftModel` with the adapter `POLICY_ADAPTER`.
            value: a sequence classifier with one output, or None: an adapter and a new head on the policy's base.
            reference: a causal language model, or None: the policy's base with adapters off.
            dtype: what the forward passes compute in, and what rollout engines hold.
            gradient_checkpointing: policy and value function keep only what enters each layer, and compute the rest
                again in the backward pass.
        """
        super().__init__()
        self.policy, self.value, self.reference = policy, value, reference
        self.dtype = dtype
        self.files = MappedFiles([])  # of what is frozen, where it was read from files
        self.packed = False
        self.value_head: nn.Linear | None = None
        if value is None:
            self.value_head = nn.Linear(_hidden_size(policy), 1, bias=False)
            nn.init.zeros_(self.value_head.weight)
        if reference is not None:
            reference.requires_grad_(False)
            compute_like_trained(reference, dtype)
        self._mark_trainable()
        for parameter in self.parameters():
            if parameter.requires_grad and parameter.dtype != torch.float32:
                # At a learning rate of 1e-5 a bfloat16 weight would round every update away.
                parameter.data = parameter.data.float()
        disable_dropout(self)
        fuse_gelu(self)
        if gradient_checkpointing:
            for model in (policy, value):
                if model is not None:
                    settings = {"use_reentrant": False, "context_fn": lambda: self._recomputing()}
                    model.gradient_checkpointing_enable(settings)  # type: ignore[operator]
                    model.train()  # transformers checkpoints only then; no dropout is left that it could turn on

    def pack(self) -> None:
        """Let every network that can work without padding do so, see `unpadded`; `packed` says whether all can.

        To be called once, on the device that they stay on, before anything wraps them.
        """
        models = [model for model in (self.policy, self.value, self.reference) if model is not None]
        packed = [unpadded.make_packed(_plain(model), self.dtype) for model in models]
        self.packed = all(packed)

    def forward(self, network: Network, batch: Sequences) -> Tensor:
        """Of the N response tokens, row after row: policy and reference: the logits (N, V) that predict them; value:
        float32 (N,), before each."""
        device = batch.input_ids_BT.device
        with unpadded.autocast(device, self.dtype):
            if network == "value":
                return self._values(batch)
            return self._logits(network, batch)

    @property
    def sent_dtype(self) -> torch.dtype:
        """Of the weights that travel. Adapters are small, engines hold them in float32, and merging rounds once."""
        return torch.float32 if isinstance(self.policy, PeftModel) else self.dtype

    def policy_group(self) -> list[nn.Parameter]:
        """The trainable parameters of the policy."""
        return [p for name, p in self.named_parameters() if p.requires_grad and not _is_value(name)]

    def value_group(self) -> list[nn.Parameter]:
        """The trainable parameters of the value function."""
        return [p for name, p in self.named_parameters() if p.requires_grad and _is_value(name)]

    def save_policy(self, folder: Path) -> None:
        """A Hugging Face folder; with LoRA the adapter, and the merged model in `merged/`."""
        if not isinstance(self.policy, PeftModel):
            deepcopy(self.policy).to(self.dtype).save_pretrained(folder)  # type: ignore[operator]
            return
        self.policy.save_pretrained(str(folder), selected_adapters=[POLICY_ADAPTER])
        merged = deepcopy(self.policy)
        merged.delete_adapter(VALUE_ADAPTER) if VALUE_ADAPTER in merged.peft_config else None
        merged.merge_and_unload().save_pretrained(folder / "merged")

    def save_value(self, folder: Path) -> None:
        """A sequence classifier's folder; with LoRA the adapter and `value_head.pt`."""
        if self.value is not None:
            deepcopy(self.value).to(self.dtype).save_pretrained(folder)  # type: ignore[operator]
            return
        assert isinstance(self.policy, PeftModel) and self.value_head is not None
        self.policy.save_pretrained(str(folder), selected_adapters=[VALUE_ADAPTER])
        for file in (folder / VALUE_ADAPTER).iterdir():  # PEFT puts an adapter of another name than its default there
            file.replace(folder / file.name)
        (folder / VALUE_ADAPTER).rmdir()
        torch.save(self.value_head.state_dict(), folder / "value_head.pt")

    def _logits(self, network: Network, batch: Sequences) -> Tensor:
        model = self.policy
        if network == "reference" and self.reference is not None:
            model = self.reference
        elif isinstance(model, PeftModel):
            if network == "reference":
                with model.disable_adapter():
                    logits_NV = self._run(model, batch)
                self._mark_trainable()
                return logits_NV
            self._activate(POLICY_ADAPTER)
        return self._run(model, batch)

    @staticmethod
    def _run(model: nn.Module, batch: Sequences) -> Tensor:
        if unpadded.is_packed(_plain(model)):
            logits_1NV: Tensor = model(**unpadded.inputs(batch), logits_to_keep=unpadded.predicting(batch)).logits
            return logits_1NV[0]
        out = model(**unpadded.padded_inputs(batch), logits_to_keep=batch.response_width + 1)
        return batch.at_tokens(out.logits[:, :-1])  # the last one predicts a token that nobody sampled

    def _values(self, batch: Sequences) -> Tensor:
        if self.value is not None:
            model, head = self.value, self.value.score
        else:
            self._activate(VALUE_ADAPTER)
            assert isinstance(self.policy, PeftModel) and self.value_head is not None
            model, head = self.policy.get_base_model(), self.value_head
        if unpadded.is_packed(model):
            hidden_1TD = backbone(model)(**unpadded.inputs(batch)).last_hidden_state
            hidden_ND = hidden_1TD[0, unpadded.predicting(batch)]
        else:
            hidden_BTD = backbone(model)(**unpadded.padded_inputs(batch)).last_hidden_state
            hidden_ND = batch.at_tokens(hidden_BTD[:, batch.prompt_width - 1 : -1])
        with torch.autocast(hidden_ND.device.type, enabled=False):  # near 45 a bfloat16 moves in steps of 0.25
            values_N: Tensor = head(hidden_ND.float()).squeeze(-1)  # type: ignore[operator]
        return values_N

    def _recomputing(self) -> tuple[AbstractContextManager[None], AbstractContextManager[None]]:
        """Around a checkpointed layer's forward pass, and around its repetition: by then the other adapter is active."""
        adapter = self.policy.active_adapter if isinstance(self.policy, PeftModel) else None
        return nullcontext(), self._under(adapter)

    @contextmanager
    def _under(self, adapter: str | None) -> Iterator[None]:
        if adapter is not None and self.policy.active_adapter != adapter:
            self._activate(adapter)
        yield

    def _activate(self, adapter: str) -> None:
        assert isinstance(self.policy, PeftModel)
        self.policy.set_adapter(adapter)
        self._mark_trainable()

    def _mark_trainable(self) -> None:
        # PEFT freezes the adapters that are not active; here both learn, and their optimizer state must stay.
        if isinstance(self.policy, PeftModel):
            for name, parameter in self.policy.named_parameters():
                parameter.requires_grad_("lora_" in name)


def compute_like_trained(frozen: nn.Module, dtype: torch.dtype) -> None:
    """Lets a frozen model compute to the bit like one of the same numbers that is trained in float32 under autocast.

    Autocast casts what enters a matrix product, so those weights may stay in `dtype`. Embeddings and norms it leaves alone:
    they decide what the residual stream is summed in.
    """
    if dtype == torch.float32:
        return
    for module in frozen.modules():
        if not isinstance(module, nn.Linear | Conv1D):
            for parameter in module.parameters(recurse=False):
                parameter.data = parameter.data.float()


def disable_dropout(model: nn.Module) -> None:
    """Probability 0 everywhere, and evaluation mode: PPO compares forward passes with each other."""
    for module in model.modules():
        for name, value in list(vars(module).items()):
            if isinstance(value, float) and _is_dropout(module, name):
                setattr(module, name, 0.0)
    model.eval()


def fuse_gelu(model: nn.Module) -> None:
    """GPT-2's GELU as one operation: transformers writes it as eight, each with a tensor kept for the backward pass."""
    for module in model.modules():
        for name, child in list(module.named_children()):
            if isinstance(child, NewGELUActivation):
                setattr(module, name, GELUTanh())


def _is_dropout(module: nn.Module, name: str) -> bool:
    return "dropout" in name or (name == "p" and "Dropout" in type(module).__name__)


def _plain(model: nn.Module) -> nn.Module:
    """The transformers model, whatever PEFT put around it."""
    return model.get_base_model() if isinstance(model, PeftModel) else model


def backbone(model: nn.Module) -> nn.Module:
    """The model below its head."""
    found = getattr(model, str(model.base_model_prefix))
    assert isinstance(found, nn.Module)
    return found


def _hidden_size(policy: nn.Module) -> int:
    return int(policy.config.get_text_config().hidden_size)  # type: ignore[union-attr, operator]


def _is_value(name: str) -> bool:
    return name.startswith(("value.", "value_head.")) or f".{VALUE_ADAPTER}." in name
