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


def pack(
    rows: Sequence[int],
    prompt_lengths: Sequence[int],
    response_lengths: Sequence[int],
    max_tokens: int,
    max_padding: int | None = None,
) -> list[list[int]]:
    """Rows in micro-batches of at most `max_tokens` tokens, padding counted; longest first, so little is padding.

    Args:
        rows: which rows to pack.
        prompt_lengths, response_lengths: tokens of every row, indexed by row; each side is padded to its longest.
        max_tokens: a single row that is longer gets a micro-batch of its own.
        max_padding: tokens of padding in one micro-batch; None: as many as come.
    """
    packed: list[list[int]] = []
    widths, real = (0, 0), 0
    for row in sorted(rows, key=lambda row: (-prompt_lengths[row] - response_lengths[row], row)):
        length = prompt_lengths[row] + response_lengths[row]
        wider = (max(widths[0], prompt_lengths[row]), max(widths[1], response_lengths[row]))
        tokens = (len(packed[-1]) + 1) * sum(wider) if packed else 0
        if packed and tokens <= max_tokens and (max_padding is None or tokens - real - length <= max_padding):
            packed[-1].append(row)
            widths, real = wider, real + length
        else:
            packed.append([row])
            widths, real = (prompt_lengths[row], response_lengths[row]), length
    return packed


def minibatch_rows(seed: int, step: int, epoch: int, batch_size: int, minibatches: int) -> list[Tensor]:
    """The global rows of each minibatch of an epoch: a shuffle that follows from (seed, step, epoch) alone.

    Of every `minibatches` rows in a row, each minibatch gets one. So a worker that holds a contiguous share of the batch
    has its share of every minibatch, and none waits for another that happened to get more.
    """
    generator = torch.Generator().manual_seed((seed * 1_000_003 + step) * 1_009 + epoch)
    rows = torch.arange(batch_size).view(-1, minibatches)
    shuffles = torch.stack([torch.randperm(minibatches, generator=generator) for _ in rows])
    return list(rows.gather(1, shuffles).T)
