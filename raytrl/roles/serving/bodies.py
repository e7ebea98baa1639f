"""Answers of OpenAI's API: completions and chats, whole or in chunks."""

import json
import time
import uuid
from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any

from raytrl.roles.serving.responses import Piece, TokenLogprob
from raytrl.roles.serving.text_stream import UNKNOWN

DONE = b"data: [DONE]\n\n"


class Bodies(ABC):
    """What is said to one request."""

    _prefix: str
    _whole: str  # its object
    _chunk: str

    def __init__(self, model: str, prompt_tokens: int, with_usage: bool, tells_logprobs: bool) -> None:
        """
        Args:
            with_usage: whether a stream ends with it.
            tells_logprobs: whether the request asked for them.
        """
        self._said = {"id": f"{self._prefix}-{uuid.uuid4().hex}", "created": int(time.time()), "model": model}
        self._prompt_tokens, self._with_usage, self._tells_logprobs = prompt_tokens, with_usage, tells_logprobs
        self._sampled: dict[int, int] = {}  # tokens of each choice so far

    def whole(self, pieces: Sequence[Piece]) -> dict[str, Any]:
        """All choices, in their order."""
        for index, piece in enumerate(pieces):
            self._sampled[index] = piece.sampled
        choices = [
            {"index": index, **self._content(piece), "logprobs": self._logprobs(piece), "finish_reason": piece.finish}
            for index, piece in enumerate(pieces)
        ]
        return {**self._said, "object": self._whole, "choices": choices, "usage": self._usage()}

    def chunk(self, index: int, piece: Piece) -> bytes:
        """What a choice has gained, as an event."""
        self._sampled[index] = piece.sampled
        return self._event(index, self._delta(piece), self._logprobs(piece), piece.finish)

    def begin(self, index: int) -> bytes:
        """Said of each choice before its text."""
        return b""

    def end(self) -> bytes:
        """The last events of a stream."""
        if not self._with_usage:
            return DONE
        return _event({**self._said, "object": self._chunk, "choices": [], "usage": self._usage()}) + DONE

    def _event(self, index: int, content: dict[str, Any], logprobs: Any, finish: str | None) -> bytes:
        choice = {"index": index, **content, "logprobs": logprobs, "finish_reason": finish}
        usage = {"usage": None} if self._with_usage else {}
        return _event({**self._said, "object": self._chunk, "choices": [choice], **usage})

    def _usage(self) -> dict[str, int]:
        sampled = sum(self._sampled.values())
        return {
            "prompt_tokens": self._prompt_tokens,
            "completion_tokens": sampled,
            "total_tokens": self._prompt_tokens + sampled,
        }

    def _logprobs(self, piece: Piece) -> Any:
        return self._told(piece.tokens) if self._tells_logprobs else None

    @abstractmethod
    def _content(self, piece: Piece) -> dict[str, Any]: ...

    @abstractmethod
    def _delta(self, piece: Piece) -> dict[str, Any]: ...

    @abstractmethod
    def _told(self, tokens: Sequence[TokenLogprob]) -> dict[str, Any]: ...


class CompletionBodies(Bodies):
    """Of /v1/completions."""

    _prefix, _whole, _chunk = "cmpl", "text_completion", "text_completion"

    def _content(self, piece: Piece) -> dict[str, Any]:
        return {"text": piece.text}

    _delta = _content

    def _told(self, tokens: Sequence[TokenLogprob]) -> dict[str, Any]:
        return {
            "tokens": [token.text for token in tokens],
            "token_logprobs": [token.logprob for token in tokens],
            "top_logprobs": [_by_text(token) for token in tokens],
            "text_offset": [token.offset for token in tokens],
        }


class ChatBodies(Bodies):
    """Of /v1/chat/completions."""

    _prefix, _whole, _chunk = "chatcmpl", "chat.completion", "chat.completion.chunk"

    def begin(self, index: int) -> bytes:
        return self._event(index, {"delta": {"role": "assistant", "content": ""}}, None, None)

    def _content(self, piece: Piece) -> dict[str, Any]:
        return {"message": {"role": "assistant", "content": piece.text, "refusal": None}}

    def _delta(self, piece: Piece) -> dict[str, Any]:
        return {"delta": {"content": piece.text} if piece.text else {}}

    def _told(self, tokens: Sequence[TokenLogprob]) -> dict[str, Any]:
        content = [
            {
                **_with_bytes(token.text, token.logprob),
                "top_logprobs": [_with_bytes(text, logprob) for text, logprob in token.likeliest],
            }
            for token in tokens
        ]
        return {"content": content, "refusal": None}


def _by_text(token: TokenLogprob) -> dict[str, float]:
    """The likeliest, and the token itself; of parts of characters, which look alike, the likeliest."""
    found: dict[str, float] = {}
    for text, logprob in (*token.likeliest, (token.text, token.logprob)):
        found.setdefault(text, logprob)
    return found


def _with_bytes(text: str, logprob: float) -> dict[str, Any]:
    """A part of a character has no text that bytes could be told of."""
    return {"token": text, "logprob": logprob, "bytes": None if UNKNOWN in text else list(text.encode())}


def _event(said: dict[str, Any]) -> bytes:
    return f"data: {json.dumps(said, ensure_ascii=False, separators=(',', ':'))}\n\n".encode()
