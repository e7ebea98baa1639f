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
    def response_mask_BR(self) -> Tensor:
        """True on sampled tokens, the end token included."""
        columns_R = torch.arange(self.response_width, device=self.input_ids_BT.device)
        return columns_R < self.response_lengths_B.unsqueeze(-1)

    @property
    def rows_N(self) -> Tensor:
        """The row of each of the N response tokens, row after row: int64."""
        return self.response_mask_BR.nonzero()[:, 0]

    @property
    def columns_N(self) -> Tensor:
        """The column of each of the N response tokens."""
        return self.response_mask_BR.nonzero()[:, 1]

    @property
    def tokens_N(self) -> Tensor:
        return self.at_tokens(self.input_ids_BT[:, self.prompt_width :])

    def at_tokens(self, x_BR: Tensor) -> Tensor:
        """(B, R, …) → (N, …): what stands at the response tokens."""
        return x_BR[self.response_mask_BR]

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
        if not len(rows_B):
            return Sequences.of([], [], rows_B.device)
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
    *,
    padded: bool,
) -> list[list[int]]:
    """Rows in micro-batches of at most `max_tokens` tokens, those of like length together.

    Args:
        rows: which rows to pack.
        prompt_lengths, response_lengths: tokens of every row, indexed by row.
        max_tokens: a single row that is longer gets a micro-batch of its own.
        padded: each side is padded to its longest, and padding counts. Else only attention pads, to the longest row,
            and may pad to twice `max_tokens`.
    """
    packed: list[list[int]] = []
    prompt_width = response_width = longest = real = 0
    for row in sorted(rows, key=lambda row: (-prompt_lengths[row] - response_lengths[row], row)):
        length = prompt_lengths[row] + response_lengths[row]
        prompt_width = max(prompt_width, prompt_lengths[row])
        response_width = max(response_width, response_lengths[row])
        count = len(packed[-1]) + 1 if packed else 1
        fits = (
            count * (prompt_width + response_width) <= max_tokens
            if padded
            else real + length <= max_tokens and count * longest <= 2 * max_tokens
        )
        if packed and fits:
            packed[-1].append(row)
            real += length
        else:
            packed.append([row])
            prompt_width, response_width, longest, real = prompt_lengths[row], response_lengths[row], length, length
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
