"""The networks of a learner: policy, value function and reference, as one module with one `forward`.

Full fine-tuning: three models, or as many of them as the algorithm needs. LoRA: one base; the policy is an adapter, the
value function a second adapter with a head, the reference the base with adapters off. A shared value function is a head
on what the policy computes anyway.
"""

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any, Literal

import torch
from peft import PeftModel
from torch import Tensor, nn
from transformers.activations import GELUTanh, NewGELUActivation
from transformers.pytorch_utils import Conv1D

from raytrl.config.sections.ppo import LOGIT_BYTES, activation_bytes
from raytrl.roles.learner import unpadded
from raytrl.roles.learner.head import LogProbHead, give_head, head_of, of_logits
from raytrl.roles.learner.mapped import MappedFiles
from raytrl.roles.learner.sequences import Sequences
from raytrl.roles.models.adapters import POLICY_ADAPTER
from raytrl.roles.models.sharded import cast

VALUE_ADAPTER = "value_function"  # "value" is what some attention layers call a projection


Network = Literal["policy", "reference", "value", "policy and value"]


class Networks(nn.Module):
    """Which network runs is an argument of `forward`, so that engines that hook `forward` see them all."""

    def __init__(
        self,
        policy: nn.Module,
        value: nn.Module | None,
        reference: nn.Module | None,
        *,
        dtype: torch.dtype,
        critic: bool = True,
        shared: bool = False,
        gradient_checkpointing: bool = False,
    ) -> None:
        """
        Args:
            policy: a causal language model, or a `PeftModel` with the adapter `POLICY_ADAPTER`.
            value: a sequence classifier with one output, or None: an adapter and a new head on the policy's base.
            reference: a causal language model, or None: the policy's base with adapters off, or there is none.
            critic: False: there is no value function.
            shared: the value function is a new head on the policy's own last hidden state, and trains what is below it, too.
            dtype: what the forward passes compute in, and what rollout engines hold.
            gradient_checkpointing: policy and value function keep only what enters each layer, and compute the rest
                again in the backward pass.
        """
        super().__init__()
        self.policy, self.value, self.reference = policy, value, reference
        self.has_critic, self.is_shared = critic, shared
        self.dtype, self.gradient_checkpointing = dtype, gradient_checkpointing
        self.files = MappedFiles([])  # of what is frozen, where it was read from files
        self.sharding: object = None  # what transformers is told under ZeRO-3, as long as it is held
        self.packed = False
        self.value_head: nn.Linear | None = None
        if value is None and critic:
            self.value_head = nn.Linear(_hidden_size(policy), 1, bias=False)
            nn.init.zeros_(self.value_head.weight)
        if reference is not None:
            reference.requires_grad_(False)
            compute_like_trained(reference, dtype)
        self._mark_trainable()
        for parameter in self.parameters():
            if parameter.requires_grad:  # at a learning rate of 1e-5 a bfloat16 weight would round every update away
                cast(parameter, torch.float32)
        disable_dropout(self)
        fuse_gelu(self)
        for model in (policy, reference):
            if model is not None:
                give_head(_plain(model))
        if gradient_checkpointing:
            for model in (policy, value):
                if model is not None:
                    settings = {"use_reentrant": False, "context_fn": lambda: self._recomputing()}
                    model.gradient_checkpointing_enable(settings)  # type: ignore[operator]
                    model.train()  # transformers checkpoints only then; no dropout is left that it could turn on

    def prepare(self) -> None:
        """Let every network work without padding (see `unpadded`) and without logits (see `head`) that can do so.

        To be called once, on the device that they stay on. `packed` says whether all work without padding.
        """
        models = [_plain(model) for model in (self.policy, self.value, self.reference) if model is not None]
        packed = [unpadded.make_packed(model, self.dtype) for model in models]
        self.packed = all(packed)
        for model in models:
            self._prove_head(model)

    def forward(
        self, network: Network, batch: Sequences, temperature: float = 1.0
    ) -> Tensor | tuple[Tensor, Tensor | None] | tuple[Tensor, Tensor | None, Tensor]:
        """Of the N response tokens, row after row, float32 (N,): policy and reference: their log-probs at `temperature`, and
        entropies where there is a gradient (they carry none); value: the values before each; policy and value, where they
        are shared: all three of one pass."""
        device = batch.input_ids_BT.device
        with unpadded.autocast(device, self.dtype):
            if network == "value":
                return self._values(batch)
            if network == "policy and value":
                return self._policy_and_values(batch, temperature)
            return self._logprobs(network, batch, temperature)

    def token_bytes(self) -> float:
        """What the backward pass of an update needs of a token, by the sum that a plan makes of it."""
        policy = _plain(self.policy)
        trained = [policy]
        if self.has_critic and not self.is_shared:
            trained.append(policy if self.value is None else self.value)
        size, recomputed = self.dtype.itemsize, self.gradient_checkpointing
        found = sum(activation_bytes(*_widths(model), size, recomputed) for model in trained)
        if head_of(policy) is None:  # then also logits and their gradient, both in float32 too
            found += LOGIT_BYTES * int(policy.config.get_text_config().vocab_size)  # type: ignore[union-attr, operator]
        return found

    @property
    def sent_dtype(self) -> torch.dtype:
        """Of the weights that travel. Adapters are small, engines hold them in float32, and merging rounds once."""
        return torch.float32 if isinstance(self.policy, PeftModel) else self.dtype

    def policy_group(self) -> list[nn.Parameter]:
        """The trainable parameters of the policy."""
        return [p for name, p in self.named_parameters() if p.requires_grad and not _is_value(name)]

    def value_group(self) -> list[nn.Parameter]:
        """The trainable parameters of the value function; none where there is none."""
        return [p for name, p in self.named_parameters() if p.requires_grad and _is_value(name)]

    def groups(self) -> list[list[nn.Parameter]]:
        """One a learning rate: the policy's, and the value function's where there is one."""
        return [group for group in (self.policy_group(), self.value_group()) if group]

    def _logprobs(self, network: Network, batch: Sequences, temperature: float) -> tuple[Tensor, Tensor | None]:
        model = self.policy
        if network == "reference" and self.reference is not None:
            model = self.reference
        elif network == "reference" and not isinstance(model, PeftModel):
            raise AssertionError("there is no reference")
        elif isinstance(model, PeftModel):
            if network == "reference":
                with model.disable_adapter():
                    found = _predicted(_plain(model), batch, temperature)
                self._mark_trainable()
                return found
            self._activate(POLICY_ADAPTER)
        return _predicted(_plain(model), batch, temperature)

    def _values(self, batch: Sequences) -> Tensor:
        if self.value is not None:
            return _valued(self.value.score, _hidden(self.value, batch))  # type: ignore[arg-type]
        assert self.value_head is not None
        if isinstance(self.policy, PeftModel):
            self._activate(POLICY_ADAPTER if self.is_shared else VALUE_ADAPTER)
        return _valued(self.value_head, _hidden(_plain(self.policy), batch))

    def _policy_and_values(self, batch: Sequences, temperature: float) -> tuple[Tensor, Tensor | None, Tensor]:
        assert self.is_shared and self.value_head is not None
        if isinstance(self.policy, PeftModel):
            self._activate(POLICY_ADAPTER)
        model = _plain(self.policy)
        head = head_of(model)
        if head is None:  # what its logits are made of is its own affair: a pass for each
            return *_predicted(model, batch, temperature), self._values(batch)
        hidden_ND = _hidden(model, batch)
        logprobs_N, entropies_N = head(hidden_ND, batch.tokens_N, temperature)
        return logprobs_N, entropies_N, _valued(self.value_head, hidden_ND)

    @torch.no_grad()
    def _prove_head(self, model: nn.Module) -> None:
        head = getattr(model, "get_output_embeddings", lambda: None)()
        if not isinstance(head, LogProbHead):
            return
        batch = unpadded.two_rows(model)
        with unpadded.autocast(batch.input_ids_BT.device, self.dtype):
            expected_N, _ = of_logits(_logits(model, batch), batch.tokens_N, 1.0)
            found = head(_hidden(model, batch), batch.tokens_N)
        head.is_proven = float((found[0] - expected_N).abs().max()) <= unpadded.tolerance(self.dtype)

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


def _predicted(model: nn.Module, batch: Sequences, temperature: float) -> tuple[Tensor, Tensor | None]:
    head = head_of(model)
    if head is None:
        return of_logits(_logits(model, batch), batch.tokens_N, temperature)
    found: tuple[Tensor, Tensor | None] = head(_hidden(model, batch), batch.tokens_N, temperature)
    return found


def _valued(head: nn.Module, hidden_ND: Tensor) -> Tensor:
    with torch.autocast(hidden_ND.device.type, enabled=False):  # near 45 a bfloat16 moves in steps of 0.25
        values_N: Tensor = head(hidden_ND.float()).squeeze(-1)
    return values_N


def _logits(model: nn.Module, batch: Sequences) -> Tensor:
    """(N, V), before each response token."""
    if unpadded.is_packed(model):
        logits_1NV: Tensor = model(**unpadded.inputs(batch), logits_to_keep=unpadded.predicting(batch)).logits
        return logits_1NV[0]
    out = model(**unpadded.padded_inputs(batch), logits_to_keep=batch.tail_width + 1)
    return batch.at_tokens(out.logits[:, :-1])  # the last one predicts a token that nobody sampled


def _hidden(model: nn.Module, batch: Sequences) -> Tensor:
    """(N, D): the last hidden state before each response token."""
    if unpadded.is_packed(model):
        hidden_1TD: Tensor = backbone(model)(**unpadded.inputs(batch)).last_hidden_state
        return hidden_1TD[0, unpadded.predicting(batch)]
    hidden_BTD = backbone(model)(**unpadded.padded_inputs(batch)).last_hidden_state
    return batch.at_tokens(hidden_BTD[:, batch.prompt_width - 1 : -1])


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
                cast(parameter, torch.float32)


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


def _widths(model: nn.Module) -> tuple[int, int, int]:
    """Inputs and outputs of all linear layers below the head but those of adapters; hidden size; layers."""
    text: Any = model.config.get_text_config()  # type: ignore[union-attr, operator]
    below = [module for name, module in backbone(model).named_modules() if "lora_" not in name]
    features = [(m.nx, m.nf) for m in below if isinstance(m, Conv1D)]
    features += [(m.in_features, m.out_features) for m in below if isinstance(m, nn.Linear)]
    return sum(map(sum, features)), int(text.hidden_size), int(text.num_hidden_layers)


def _hidden_size(policy: nn.Module) -> int:
    return int(policy.config.get_text_config().hidden_size)  # type: ignore[union-attr, operator]


def _is_value(name: str) -> bool:
    return name.startswith(("value.", "value_head.")) or f".{VALUE_ADAPTER}." in name
