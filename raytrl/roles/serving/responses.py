"""Responses while they are sampled, and the calls that wait for them."""

import asyncio
from collections import deque
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from raytrl.errors import RunError
from raytrl.roles.serving.answers import RefusalError
from raytrl.roles.serving.sampling import Sampling
from raytrl.roles.serving.text_stream import StopStrings, TextStream


@dataclass(frozen=True)
class TokenLogprob:
    """Of a token in the model's own distribution (temperature 1), in nats."""

    text: str
    logprob: float
    likeliest: Sequence[tuple[str, float]]  # (text, logprob), descending
    offset: int  # characters of the response before its own


@dataclass
class Piece:
    """What a response has gained."""

    text: str = ""
    tokens: list[TokenLogprob] = field(default_factory=list)  # where log-probs are asked for
    finish: str | None = None  # stop or length: it was the last
    sampled: int = 0  # tokens so far, its end included


class Row:
    """One response. The event loop makes it; from then on the sampling thread has it."""

    def __init__(
        self,
        token_ids: Sequence[int],
        sampling: Sampling,
        *,
        room: int,
        seed: int,
        ends: frozenset[int],
        before: Sequence[int],
    ) -> None:
        """
        Args:
            room: tokens at most.
            ends: tokens that end it; they are not part of the text.
            before: tokens that its text goes on from.
        """
        self.token_ids, self.sampling = token_ids, sampling
        self.finish: str | None = None
        self._room, self._seed, self._ends, self._before = room, seed, ends, before
        self._sampled, self._characters = 0, 0

    def begin(self, tokenizer: Any) -> None:
        """It is in a batch now; the tokenizer is the sampling thread's."""
        self._text, self._stop = TextStream(tokenizer, self._before), StopStrings(self.sampling.stop)
        self._generator = torch.Generator().manual_seed(self._seed)

    def draw(self) -> float:
        """The uniform number of the next token, by its own seed and its place alone."""
        return torch.rand((), dtype=torch.float64, generator=self._generator).item()

    def take(self, token: int, logprob: TokenLogprob | None) -> Piece:
        """The next token."""
        self._sampled += 1
        is_end, is_full = token in self._ends, self._sampled == self._room
        new = "" if is_end else self._text.add(token)
        if is_end or is_full:
            new += self._text.rest()
        said, is_stopped = self._stop.add(new)
        if is_end or is_stopped:
            self.finish = "stop"
        elif is_full:
            self.finish = "length"
        if self.finish and not is_stopped:
            said += self._stop.rest()
        piece = Piece(said, [] if logprob is None else [logprob], self.finish, self._sampled)
        self._characters += len(new)
        return piece

    @property
    def characters(self) -> int:
        """Of its text so far."""
        return self._characters


class Call:
    """The rows of one request, and its way back to the event loop that waits for them."""

    def __init__(self, rows: Sequence[Row], adapter: str | None, streams: bool) -> None:
        """
        Args:
            adapter: None: the model itself.
            streams: whether pieces go as they come; else each row goes as one, at its end.
        """
        self.adapter, self.streams, self.is_wanted, self._may_come_again = adapter, streams, True, False
        self.waiting = deque(enumerate(rows))
        self._whole = None if streams else {i: Piece() for i in range(len(rows))}
        self._left = len(rows)
        self._loop, self._inbox = asyncio.get_running_loop(), asyncio.Queue[tuple[int, Piece] | None]()

    def say(self, index: int, piece: Piece) -> None:
        """From the sampling thread: what the row with this index has gained."""
        if self._whole is not None:
            whole = self._whole[index]
            whole.text += piece.text
            whole.tokens += piece.tokens
            whole.finish, whole.sampled = piece.finish, piece.sampled
            piece = whole
        if piece.finish or (self._whole is None and (piece.text or piece.tokens)):
            self._send((index, piece))

    def fail(self, by_another: bool = False) -> None:
        """From the sampling thread: nothing more will come. `by_another`: maybe of what another call asked."""
        self.is_wanted, self._may_come_again = False, by_another
        self._send(None)

    async def pieces(self) -> AsyncIterator[tuple[int, Piece]]:
        """(row, what it has gained), until all rows have ended.

        Raises:
            RunError: sampling failed.
            RefusalError: it did, and may not if it is asked for again.
        """
        while self._left:
            found = await self._inbox.get()
            if found is None and self._may_come_again:
                raise RefusalError(503, "batch_failed", "sampling failed for all that was asked together", again=True)
            if found is None:
                raise RunError("serve: sampling failed")
            self._left -= found[1].finish is not None
            yield found

    def _send(self, found: tuple[int, Piece] | None) -> None:
        if not self._loop.is_closed():
            self._loop.call_soon_threadsafe(self._inbox.put_nowait, found)
