"""Forward passes without padding: the rows of a micro-batch one after the other, as a single row of tokens.

All that a transformer does token by token then sees real tokens alone, and weights are read once for all rows. Only
attention must keep the rows apart. On a GPU it gets them padded on the right, where a causal mask hides the padding
without being told of it, so that torch's fused kernels take all rows at once; on a CPU, where a call costs little, it
gets them one by one. T here counts the real tokens of all rows.
"""

from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention
from transformers import AttentionInterface

from raytrl.roles.learner.sequences import Sequences

_ATTENTION = "raytrl_packed"
_TOLERANCE = {torch.float32: 1e-4}  # of the largest logit: rows that see each other are off by far more
_HALF_TOLERANCE = 0.05


@dataclass(frozen=True)
class Layout:
    """Where the tokens of each row lie in the single row."""

    places_BL: Tensor  # int64: the place of each row's tokens; any place on the padding
    back_T: Tensor  # int64: the place of each token in a flattened (B, L)
    lengths: list[int]

    @classmethod
    def of(cls, lengths_B: Tensor) -> "Layout":
        width = int(lengths_B.max())
        columns_L = torch.arange(width, device=lengths_B.device)
        starts_B = lengths_B.cumsum(0) - lengths_B
        real_BL = columns_L < lengths_B.unsqueeze(-1)
        places_BL = torch.where(real_BL, starts_B.unsqueeze(-1) + columns_L, 0)
        return cls(places_BL, real_BL.flatten().nonzero().squeeze(-1), lengths_B.tolist())

    def attend(self, query: Tensor, key: Tensor, value: Tensor, **arguments: Any) -> Tensor:
        """Causal attention within each row: (1, H, T, D) → (1, T, H, D)."""
        if query.device.type == "cpu":
            rows = zip(*(torch.split(x, self.lengths, dim=2) for x in (query, key, value)), strict=True)
            found = [scaled_dot_product_attention(q, k, v, is_causal=True, **arguments) for q, k, v in rows]
            return torch.cat(found, dim=2).transpose(1, 2)
        return self._attend_padded(query, key, value, **arguments)

    def _attend_padded(self, query: Tensor, key: Tensor, value: Tensor, **arguments: Any) -> Tensor:
        if arguments.get("enable_gqa") and query.dtype == torch.float32:
            # torch's only kernel on a GPU for grouped heads of float32 holds a number for each pair of tokens.
            key, value = (x.repeat_interleave(query.shape[1] // x.shape[1], dim=1) for x in (key, value))
            arguments["enable_gqa"] = False
        q, k, v = self._padded(query), self._padded(key), self._padded(value)
        found_BHLD = scaled_dot_product_attention(q, k, v, is_causal=True, **arguments)
        return found_BHLD.transpose(1, 2).flatten(0, 1).index_select(0, self.back_T).unsqueeze(0)

    def _padded(self, x_1HTD: Tensor) -> Tensor:
        """(B, H, L, D)."""
        x_THD = x_1HTD[0].transpose(0, 1)
        return (
            x_THD.index_select(0, self.places_BL.flatten())
            .view(*self.places_BL.shape, *x_THD.shape[1:])
            .transpose(1, 2)
        )


def inputs(batch: Sequences) -> dict[str, Any]:
    """What a model that `make_packed` changed is called with."""
    mask_BT = batch.attention_mask_BT.bool()
    return {
        "input_ids": batch.input_ids_BT[mask_BT].unsqueeze(0),
        "position_ids": batch.position_ids_BT[mask_BT].unsqueeze(0),
        "use_cache": False,
        "layout": Layout.of(batch.prompt_lengths_B + batch.tail_lengths_B),
    }


def predicting(batch: Sequences) -> Tensor:
    """The places, in the single row, of the tokens before each sampled token: int64, (N,)."""
    places_BT = batch.attention_mask_BT.flatten().cumsum(0).view_as(batch.input_ids_BT) - 1
    return batch.at_tokens(places_BT[:, batch.prompt_width - 1 : -1])


def is_packed(model: nn.Module) -> bool:
    """Whether the model takes `inputs`, and not `padded_inputs`."""
    return bool(model.config._attn_implementation == _ATTENTION)  # type: ignore[union-attr]


def make_packed(model: nn.Module, dtype: torch.dtype = torch.float32) -> bool:
    """Change the model's attention so that it takes packed rows; False, and no change, where it cannot.

    It can where all its attention is full and causal and goes through transformers' interface: GPT-2, Llama, Qwen and
    most of today's. Sliding windows, capped logits, state spaces and attention of a model's own stay padded. Not by the
    configuration alone: two rows must come out the same packed and apart.

    Args:
        dtype: what its forward passes will compute in.
    """
    if not _looks_packable(model):
        return False
    before = str(model.config._attn_implementation)  # type: ignore[union-attr]
    batch = two_rows(model)
    alone = [
        _hidden(model, dtype, padded_inputs(batch.take(torch.tensor([i], device=batch.input_ids_BT.device))))
        for i in (0, 1)
    ]
    model.set_attn_implementation(_ATTENTION)  # type: ignore[operator]
    try:
        packed = _hidden(model, dtype, inputs(batch))
    except (TypeError, ValueError, NotImplementedError):  # it does not hand the layout on, or wants other attention
        packed = None
    expected = torch.cat([hidden[0] for hidden in alone])
    if packed is not None:
        limit = tolerance(_coarser(dtype, expected.dtype)) * float(expected.abs().max())
        if float((packed[0] - expected).abs().max()) <= limit:
            return True
    model.set_attn_implementation(before)  # type: ignore[operator]
    return False


def padded_inputs(batch: Sequences) -> dict[str, Any]:
    """What any causal model is called with."""
    return {
        "input_ids": batch.input_ids_BT,
        "attention_mask": batch.attention_mask_BT,
        "position_ids": batch.position_ids_BT,
        "use_cache": False,
    }


def _attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *,
    layout: Layout,
    scaling: float | None = None,
    dropout: float = 0.0,
    **others: Any,
) -> tuple[Tensor, None]:
    """transformers' attention function for packed rows; query (1, H, T, D), key and value with H or fewer heads."""
    unknown = [name for name in ("sliding_window", "softcap", "s_aux", "position_bias") if others.get(name) is not None]
    if unknown or attention_mask is not None or dropout:
        raise NotImplementedError(
            f"packed attention: {type(module).__name__} asks for {unknown or 'a mask or dropout'}"
        )
    several = query.shape[1] != key.shape[1]
    return layout.attend(query, key, value, scale=scaling, enable_gqa=several), None


AttentionInterface.register(_ATTENTION, _attention)


def _looks_packable(model: nn.Module) -> bool:
    if not getattr(model, "_supports_attention_backend", False) or not model._can_set_attn_implementation():  # type: ignore[operator]
        return False
    config: Any = model.config.get_text_config()  # type: ignore[union-attr, operator]
    kinds = set(getattr(config, "layer_types", None) or ["full_attention"])
    return kinds == {"full_attention"} and getattr(config, "attn_logit_softcapping", None) is None


def two_rows(model: nn.Module) -> Sequences:
    """A batch to compare two ways of computing by."""
    device = next(model.parameters()).device
    return Sequences.of([[1, 0], [0]], [[1, 0, 1], [1, 1]], device)


@torch.no_grad()
def _hidden(model: nn.Module, dtype: torch.dtype, arguments: dict[str, Any]) -> Tensor:
    with autocast(next(model.parameters()).device, dtype):
        hidden: Tensor = model(**arguments, output_hidden_states=True).hidden_states[-1]
    return hidden


def autocast(device: torch.device, dtype: torch.dtype) -> AbstractContextManager[Any]:
    """In which matrix products are computed in `dtype`."""
    # No cache: each weight is cast once a pass anyway, and the casts of all layers would be held until its end, also of
    # layers that are recomputed, and under ZeRO-3 of all workers' parts.
    context: AbstractContextManager[Any] = torch.autocast(
        device.type, dtype=dtype, enabled=dtype != torch.float32, cache_enabled=False
    )
    return context


def tolerance(dtype: torch.dtype) -> float:
    """How far two ways of computing the same in `dtype` may be apart, as a share of the largest number."""
    return _TOLERANCE.get(dtype, _HALF_TOLERANCE)


def _coarser(one: torch.dtype, other: torch.dtype) -> torch.dtype:
    return max(one, other, key=lambda dtype: torch.finfo(dtype).eps)
