"""Prompts and responses as padded tensors, and their packing into micro-batches.

B sequences, P prompt width (left-padded), C width of all that comes behind a prompt (right-padded), T = P + C. Of what comes
behind it the policy has sampled all, or, in a conversation, all but what tools said: R counts sampled tokens alone, so all
that is learned is (B, R), right-padded and without gaps, and what tools said is attended and nothing else.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

Spans = Sequence[tuple[int, int]]


@dataclass(frozen=True)
class Sequences:
    """Token ids with explicit lengths: no mask is ever read off a pad id, which a policy may well sample."""

    input_ids_BT: Tensor  # int64
    prompt_lengths_B: Tensor
    tail_lengths_B: Tensor  # of all that comes behind the prompt
    sampled_BC: Tensor  # True where the policy sampled the token, the end token included
    prompt_width: int

    @classmethod
    def of(
        cls,
        prompts: Sequence[Sequence[int]],
        tails: Sequence[Sequence[int]],
        device: torch.device,
        sampled: Sequence[Spans] | None = None,
    ) -> "Sequences":
        """Padded from token ids; without any row, widths are 1.

        Args:
            tails: what comes behind each prompt.
            sampled: of each, [first, last) of the tokens that the policy sampled. None: it sampled all of them.
        """
        prompt_width = max([len(ids) for ids in prompts], default=1)
        tail_width = max([len(ids) for ids in tails], default=1)
        input_ids_BT = torch.zeros(len(prompts), prompt_width + tail_width, dtype=torch.long)
        sampled_BC = torch.zeros(len(prompts), tail_width, dtype=torch.bool)
        for i, (prompt, tail) in enumerate(zip(prompts, tails, strict=True)):
            real = torch.tensor([*prompt, *tail], dtype=torch.long)
            start = prompt_width - len(prompt)
            input_ids_BT[i, start : start + len(real)] = real
            for first, last in [(0, len(tail))] if sampled is None else sampled[i]:
                sampled_BC[i, first:last] = True
        lengths = [torch.tensor([len(ids) for ids in side], dtype=torch.long) for side in (prompts, tails)]
        return cls(
            input_ids_BT.to(device), lengths[0].to(device), lengths[1].to(device), sampled_BC.to(device), prompt_width
        )

    @classmethod
    def filler(cls, device: torch.device) -> "Sequences":
        """One row of two tokens, for a worker that has run out of rows while others have not."""
        return cls.of([[0]], [[0]], device)

    def __len__(self) -> int:
        return len(self.input_ids_BT)

    @property
    def response_lengths_B(self) -> Tensor:
        """Sampled tokens of each."""
        return self.sampled_BC.sum(-1)

    @property
    def response_width(self) -> int:
        """R."""
        return int(self.response_lengths_B.max()) if len(self) else 1

    @property
    def tail_width(self) -> int:
        """C."""
        return self.sampled_BC.shape[1]

    @property
    def response_mask_BR(self) -> Tensor:
        """True on sampled tokens, the end token included; False on padding."""
        columns_R = torch.arange(self.response_width, device=self.input_ids_BT.device)
        return columns_R < self.response_lengths_B.unsqueeze(-1)

    @property
    def rows_N(self) -> Tensor:
        """The row of each of the N sampled tokens, row after row: int64."""
        return self.response_mask_BR.nonzero()[:, 0]

    @property
    def columns_N(self) -> Tensor:
        """The column of each of the N sampled tokens, in (B, R)."""
        return self.response_mask_BR.nonzero()[:, 1]

    @property
    def tokens_N(self) -> Tensor:
        return self.at_tokens(self.input_ids_BT[:, self.prompt_width :])

    def at_tokens(self, x_BC: Tensor) -> Tensor:
        """(B, C, …) → (N, …): what stands at the sampled tokens, row after row."""
        return x_BC[self.sampled_BC]

    @property
    def attention_mask_BT(self) -> Tensor:
        """int64: 1 on the prompt and all that comes behind it."""
        columns_P = torch.arange(self.prompt_width, device=self.input_ids_BT.device)
        prompt_mask_BP = columns_P >= self.prompt_width - self.prompt_lengths_B.unsqueeze(-1)
        columns_C = torch.arange(self.tail_width, device=self.input_ids_BT.device)
        tail_mask_BC = columns_C < self.tail_lengths_B.unsqueeze(-1)
        return torch.cat([prompt_mask_BP, tail_mask_BC], dim=1).long()

    @property
    def position_ids_BT(self) -> Tensor:
        """0 at each row's first real token; models with absolute positions are wrong without."""
        return (self.attention_mask_BT.cumsum(-1) - 1).clamp(min=0)

    def take(self, rows_B: Tensor) -> "Sequences":
        """These rows, without the columns that are padding in all of them."""
        if not len(rows_B):
            return Sequences.of([], [], rows_B.device)
        prompt_lengths_B, tail_lengths_B = self.prompt_lengths_B[rows_B], self.tail_lengths_B[rows_B]
        prompt_width, tail_width = int(prompt_lengths_B.max()), int(tail_lengths_B.max())
        start = self.prompt_width - prompt_width
        input_ids_BT = self.input_ids_BT[rows_B, start : self.prompt_width + tail_width]
        return Sequences(
            input_ids_BT, prompt_lengths_B, tail_lengths_B, self.sampled_BC[rows_B, :tail_width], prompt_width
        )


def pack(
    rows: Sequence[int],
    prompt_lengths: Sequence[int],
    tail_lengths: Sequence[int],
    max_tokens: int,
    *,
    padded: bool,
) -> list[list[int]]:
    """Rows in micro-batches of at most `max_tokens` tokens, those of like length together.

    Args:
        rows: which rows to pack.
        prompt_lengths, tail_lengths: tokens of every row, and behind its prompt, indexed by row.
        max_tokens: a single row that is longer gets a micro-batch of its own.
        padded: each side is padded to its longest, and padding counts. Else only attention pads, to the longest row,
            and may pad to twice `max_tokens`.
    """
    packed: list[list[int]] = []
    prompt_width = tail_width = longest = real = 0
    for row in sorted(rows, key=lambda row: (-prompt_lengths[row] - tail_lengths[row], row)):
        length = prompt_lengths[row] + tail_lengths[row]
        prompt_width = max(prompt_width, prompt_lengths[row])
        tail_width = max(tail_width, tail_lengths[row])
        count = len(packed[-1]) + 1 if packed else 1
        fits = (
            count * (prompt_width + tail_width) <= max_tokens
            if padded
            else real + length <= max_tokens and count * longest <= 2 * max_tokens
        )
        if packed and fits:
            packed[-1].append(row)
            real += length
        else:
            packed.append([row])
            prompt_width, tail_width, longest, real = prompt_lengths[row], tail_lengths[row], length, length
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
