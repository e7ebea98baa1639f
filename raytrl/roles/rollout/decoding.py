"""A token at a time for a batch of rows: the model's forward pass, its key-value cache, and rows that leave."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor


def left_padded(prompts: Sequence[Sequence[int]], device: torch.device) -> tuple[Tensor, Tensor]:
    """Ids and attention mask, both int64 (B, P). Padding holds id 0, which only the mask tells from a real 0."""
    width = max(len(ids) for ids in prompts)
    input_ids = torch.zeros(len(prompts), width, dtype=torch.long)
    mask = torch.zeros_like(input_ids)
    for i, ids in enumerate(prompts):
        input_ids[i, width - len(ids) :] = torch.tensor(ids, dtype=torch.long)
        mask[i, width - len(ids) :] = 1
    return input_ids.to(device), mask.to(device)


class Decoding:
    """Rows of one batch, each at its next token. What the tokens are, and when a row has ended, is its caller's."""

    def __init__(self, model: Any, prompts: Sequence[Sequence[int]], device: torch.device) -> None:
        """`prompts`: token ids of each row, none of them empty."""
        self._model = model
        self._ids, self._mask = left_padded(prompts, device)
        self._positions = (self._mask.cumsum(-1) - 1).clamp(min=0)
        self._past: dict[str, Any] = {}  # the cache, by the name that the model knows it by

    def logits(self) -> Tensor:
        """Of the next token of each row, float32 (B, V)."""
        out = self._model(
            input_ids=self._ids,
            attention_mask=self._mask,
            position_ids=self._positions,
            use_cache=True,
            logits_to_keep=1,
            **self._past,
        )
        name = "cache" if "cache" in out else "past_key_values"  # the word of transformers before 5.24
        self._past = {name: out[name]}
        return out.logits[:, -1].float()  # type: ignore[no-any-return]

    def append(self, tokens_B: Tensor) -> None:
        """These were chosen, one a row."""
        self._ids = tokens_B.unsqueeze(-1)
        self._mask = torch.cat([self._mask, self._mask.new_ones(len(tokens_B), 1)], dim=-1)
        self._positions = self._positions[:, -1:] + 1

    def keep(self, kept_K: Tensor) -> None:
        """Only these rows go on, by their places in the batch; the cache is copied for it."""
        self._ids, self._mask, self._positions = self._ids[kept_K], self._mask[kept_K], self._positions[kept_K]
        for cache in self._past.values():
            cache.reorder_cache(kept_K)  # beam search's way to choose rows, which every kind of layer has
