"""Prompts and responses as padded tensors, and their packing into micro-batches.

B sequences, P prompt width (left-padded), R response width (right-padded), T = P + R.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Sequences:
    """Token ids with explicit lengths: no mask is ever read off a pad id, which a policy may well sample."""

    input_ids_BT: Tensor  # int64
    prompt_lengths_B: Tensor
    response_lengths_B: Tensor
    prompt_width: int

    @classmethod
    def of(
        cls, prompts: Sequence[Sequence[int]], responses: Sequence[Sequence[int]], device: torch.device
    ) -> "Sequences":
        """Padded from token ids; without any row, widths are 1."""
        prompt_width = max([len(ids) for ids in prompts], default=1)
        response_width = max([len(ids) for ids in responses], default=1)
        input_ids_BT = torch.zeros(len(prompts), prompt_width + response_width, dtype=torch.long)
        for i, (prompt, response) in enumerate(zip(prompts, responses, strict=True)):
            real = torch.tensor([*prompt, *response], dtype=torch.long)
            start = prompt_width - len(prompt)
            input_ids_BT[i, start : start + len(real)] = real
        lengths = [torch.tensor([len(ids) for ids in side], dtype=torch.long) for side in (prompts, responses)]
        return cls(input_ids_BT.to(device), lengths[0].to(device), lengths[1].to(device), prompt_width)

    @classmethod
    def filler(cls, device: torch.device) -> "Sequences":
        """One row of two tokens, for a worker that has run out of rows while others have not."""
        return cls.of([[0]], [[0]], device)

    def __len__(self) -> int:
        return len(self.input_ids_BT)

    @property
    def response_width(self) -> int:
        return self.input_ids_BT.shape[1] - self.prompt_width

    @property
    def tokens_BR(self) -> Tensor:
        return self.input_ids_BT[:, self.prompt_width :]

    @property
    def response_mask_BR(self) -> Tensor:
        """True on sampled tokens, the end token included."""
        columns_R = torch.arange(self.response_width, device=self.input_ids_BT.device)
        return columns_R < self.response_lengths_B.unsqueeze(-1)

    @property
    def attention_mask_BT(self) -> Tensor:
        """int64: 1 on prompt and response."""
        columns_P = torch.arange(self.prompt_width, device=self.input_ids_BT.device)
        prompt_mask_BP = columns_P >= self.prompt_width - self.prompt_lengths_B.unsqueeze(-1)
        return torch.cat([prompt_mask_BP, self.response_mask_BR], dim=1).long()

    @property
    def position_ids_BT(self) -> Tensor:
        """0 at each row's first real token; models with absolute positions are wrong without."""
        return (self.attention_mask_BT.cumsum(-1) - 1).clamp(min=0)

    def take(self, rows_B: Tensor) -> "Sequences":
        """These rows, without the columns that are padding in all of them."""
        prompt_lengths_B, response_lengths_B = self.prompt_lengths_B[rows_B], self.response_lengths_B[rows_B]
        prompt_width, response_width = int(prompt_lengths_B.max()), int(response_lengths_B.max())
        start = self.prompt_width - prompt_width
        input_ids_BT = self.input_ids_BT[rows_B, start : self.prompt_width + response_width]
        return Sequences(input_ids_BT, prompt_lengths_B, response_lengths_B, prompt_width)


def pack(rows: Sequence[int], lengths: Sequence[int], max_tokens: int) -> list[list[int]]:
    """Rows in micro-batches of at most `max_tokens` tokens, padding counted; longest first, so little is padding.

    Args:
        rows: which rows to pack.
        lengths: tokens of every row, indexed by row.
        max_tokens: a single row that is longer gets a micro-batch of its own.
    """
    packed: list[list[int]] = []
    for row in sorted(rows, key=lambda row: (-lengths[row], row)):
        if packed and lengths[packed[-1][0]] * (len(packed[-1]) + 1) <= max_tokens:
            packed[-1].append(row)
        else:
            packed.append([row])
    return packed


def minibatch_rows(seed: int, step: int, epoch: int, batch_size: int, minibatches: int) -> list[Tensor]:
    """The global rows of each minibatch of an epoch: a permutation that follows from (seed, step, epoch) alone."""
    generator = torch.Generator().manual_seed((seed * 1_000_003 + step) * 1_009 + epoch)
    return list(torch.randperm(batch_size, generator=generator).chunk(minibatches))
