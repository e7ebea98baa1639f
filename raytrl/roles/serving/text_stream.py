"""The text of a response while its tokens come: whole characters alone, and nothing of a stop string."""

from collections.abc import Sequence
from typing import Any

UNKNOWN = "\N{REPLACEMENT CHARACTER}"  # what tokenizers write for bytes that are no character, or not yet
_KEPT_TOKENS = 24  # decoded again with each new one, at most, where characters are whole now and then
_LOST_TOKENS = 16  # without a whole character: they are bytes of none


class TextStream:
    """Text that tokens add to what was before them.

    A tokenizer may join tokens otherwise than the sum of their texts (SentencePiece drops a first space, characters lie
    across tokens), so each new token is decoded with those before it.
    """

    def __init__(self, tokenizer: Any, before: Sequence[int]) -> None:
        """`before`: the last tokens of the text that goes on; none where a text begins."""
        self._tokenizer, self._ids = tokenizer, list(before)
        if self._decoded().endswith(UNKNOWN):  # it ends within a character, which nobody sees the whole of
            self._ids = []
        self._whole = len(self._ids)  # ids up to here were whole characters once
        self._sent = len(self._decoded())
        self._lost = 0

    def add(self, token: int) -> str:
        """The new whole characters."""
        self._ids.append(token)
        text = self._decoded()
        whole = text.rstrip(UNKNOWN)
        self._lost = 0 if len(whole) > self._sent or whole == text else self._lost + 1
        if self._lost >= _LOST_TOKENS:
            whole, self._lost = text, 0
        new, self._sent = whole[self._sent :], max(self._sent, len(whole))
        if new and whole == text:
            if len(self._ids) > _KEPT_TOKENS:
                del self._ids[: self._whole]
                self._sent = len(self._decoded())
            self._whole = len(self._ids) if self._ids else 0
        return new

    def rest(self) -> str:
        """What was kept back, at the end."""
        text = self._decoded()
        new, self._sent = text[self._sent :], max(self._sent, len(text))
        return new

    def _decoded(self) -> str:
        return str(self._tokenizer.decode(self._ids, skip_special_tokens=True)) if self._ids else ""


class TokenTexts:
    """The text of a token alone, special ones as they are spelt."""

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer
        self._known: dict[int, str] = {}

    def of(self, token: int) -> str:
        """With its first space; a part of a character is the sign for what is unknown."""
        if token not in self._known:
            alone, twice = self._decoded([token]), self._decoded([token, token])
            # SentencePiece drops the space before the first of them alone.
            self._known[token] = alone if UNKNOWN in alone else twice[len(alone) :]
        return self._known[token]

    def _decoded(self, ids: Sequence[int]) -> str:
        return str(self._tokenizer.decode(ids, skip_special_tokens=False))


class StopStrings:
    """Ends a text before the first stop string; what may be the beginning of one is kept back."""

    def __init__(self, words: Sequence[str]) -> None:
        self._words, self._kept = words, ""

    def add(self, text: str) -> tuple[str, bool]:
        """What can be said by now, and whether a stop string came."""
        if not self._words:
            return text, False
        text = self._kept + text
        cuts = [text.index(word) for word in self._words if word in text]
        if cuts:
            self._kept = ""
            return text[: min(cuts)], True
        begun = max(_begun(text, word) for word in self._words)
        self._kept = text[len(text) - begun :]
        return text[: len(text) - begun], False

    def rest(self) -> str:
        """What was kept back, at the end."""
        return self._kept


def _begun(text: str, word: str) -> int:
    """Characters at the end of the text that are the beginning of the word."""
    sizes = range(min(len(text), len(word) - 1), 0, -1)
    return next((size for size in sizes if text.endswith(word[:size])), 0)
