"""A chat template that carries tools: tokens of what is said to the policy, and calls in what it has sampled.

What the policy has sampled is never decoded and encoded again: of each turn only what tools said is rendered and encoded, and
comes behind the tokens that are there (token in, token out).
"""

import re
import threading
from collections.abc import Sequence
from typing import Any

from raytrl.errors import ConfigError, RunError
from raytrl.records.samples import Message
from raytrl.records.tools import Content, Schema, longest_text

_VEIL = "raytrlveil{}x"  # in the place of a special token's text while a template renders it
_VEILED = re.compile(r"raytrlveil(\d+)x")
_DUMMY = "dummy"


class Chat:
    """A tokenizer whose template renders tools, calls and results, and whose responses can be parsed."""

    def __init__(self, tokenizer: Any, end_token_ids: Sequence[int], max_result_tokens: int) -> None:
        """
        Args:
            tokenizer: the policy's; it is given TRL's response template where it has none.
            end_token_ids: what ends a turn.
            max_result_tokens: of what a tool says, so many are kept.

        Raises:
            ConfigError: its template cannot carry tools, and what to do.
        """
        self._tokenizer, self._ends = tokenizer, frozenset(end_token_ids)
        self._one_at_a_time = threading.RLock()  # whether special tokens are split is state of a fast tokenizer
        self._max_result_tokens, self._longest_text = max_result_tokens, longest_text(max_result_tokens)
        self._template = _template_for_tools(tokenizer)
        special = [
            *tokenizer.all_special_tokens,
            *(str(t) for t in tokenizer.added_tokens_decoder.values() if t.special),
        ]
        self._special = sorted(set(filter(None, special)), key=lambda token: (-len(token), token))
        self._in_text = re.compile("|".join(map(re.escape, self._special))) if self._special else re.compile(r"(?!)")
        try:
            self.suffix([{"role": "tool", "name": _DUMMY, "content": _DUMMY}])
        except Exception as error:  # a template is a program; it may raise anything
            raise ConfigError(
                f"model.tokenizer: its chat template cannot go on after a tool's answer: {error}"
            ) from None

    def prompt(self, messages: Sequence[Message], tools: Sequence[Schema], said: Content | None) -> list[int]:
        """Token ids of a prompt, its last message with what an environment said first (see `with_said`)."""
        veiled = messages if said is None else with_said(messages, self._veil(said))
        text = self._rendered(veiled, tools=list(tools) or None, add_generation_prompt=True)  # []: Llama writes of none
        return self._encoded(text)

    def suffix(self, results: Sequence[Message]) -> list[int]:
        """What comes behind a turn that made calls, up to the next turn's beginning; `results` are the tools' messages.

        Raises:
            RunError: the template writes a turn in another way when something comes behind it.
        """
        # With the real name: some templates write it at the head of the result.
        call = {"type": "function", "function": {"name": results[0]["name"], "arguments": {}}}
        turns: list[Message] = [
            {"role": "user", "content": _DUMMY},
            {"role": "assistant", "content": "", "tool_calls": [call]},
        ]
        before = self._encoded(self._rendered(turns))
        veiled = [{**message, "content": self._veil(message["content"])} for message in results]
        whole = self._encoded(self._rendered([*turns, *veiled], add_generation_prompt=True))
        # A template may write a line break behind the end of a turn: the policy has not sampled it.
        ends = [place for place, token in enumerate(before) if token in self._ends]
        before = before[: ends[-1] + 1] if ends else before
        if whole[: len(before)] != before:
            raise RunError(
                "the chat template writes an earlier turn in another way when a tool's answer comes behind it"
            )
        return whole[len(before) :]

    def parsed(self, token_ids: Sequence[int], context: Sequence[int], tools: Sequence[Schema]) -> dict[str, Any]:
        """The assistant's message, with `tool_calls` where it made any; what cannot be parsed is its content."""
        from trl.chat_template_utils import parse_response

        with self._one_at_a_time:
            found: dict[str, Any] = parse_response(
                self._tokenizer, list(token_ids), prefix=list(context), tools=list(tools)
            )
        return found

    def shortened(self, content: Content) -> Content:
        """A result of at most `max_result_tokens` tokens, its beginning, and where it was longer a mark behind it."""
        if isinstance(content, str):
            return self._shortened(content, self._max_result_tokens)[0]
        blocks, left = [], self._max_result_tokens
        for block in content:
            if left <= 0:
                break
            text, used = self._shortened(str(block["text"]), left)
            blocks.append({**block, "text": text})
            left -= used
        return blocks

    def num_special(self, content: Content) -> int:
        """Special tokens whose text is in it. They are taken apart: what a tool says can neither end a turn nor begin one."""
        texts = [content] if isinstance(content, str) else [str(block["text"]) for block in content]
        return sum(len(self._in_text.findall(text)) for text in texts)

    def _shortened(self, text: str, limit: int) -> tuple[str, int]:
        ids = self._plain(text)
        if len(ids) <= limit and len(text) < self._longest_text:
            return text, len(ids)
        kept = self._tokenizer.decode(ids[:limit], clean_up_tokenization_spaces=False)
        # The last character may be cut in two; and the kept text may have other tokens than the whole has.
        return f"{str(kept).rstrip('�')} [cut after {limit} tokens]", limit

    def _plain(self, text: str) -> list[int]:
        """Its ids, special tokens in it taken apart."""
        with self._one_at_a_time:
            ids: list[int] = self._tokenizer(text, add_special_tokens=False, split_special_tokens=True)["input_ids"]
        return ids

    def _veil(self, content: Content) -> Content:
        if isinstance(content, str):
            return self._in_text.sub(lambda found: _VEIL.format(self._special.index(found[0])), content)
        return [{**block, "text": self._veil(str(block["text"]))} for block in content]

    def _rendered(self, messages: Sequence[Message], **options: Any) -> str:
        if self._template is not None:
            options["chat_template"] = self._template
        return str(self._tokenizer.apply_chat_template(list(messages), tokenize=False, **options))

    def _encoded(self, text: str) -> list[int]:
        """The template's special tokens are tokens; those that are veiled are taken apart."""
        ids: list[int] = []
        for place, piece in enumerate(_VEILED.split(text)):
            if place % 2:
                ids += self._plain(self._special[int(piece)])
            elif piece:
                with self._one_at_a_time:
                    ids += self._tokenizer(piece, add_special_tokens=False)["input_ids"]
        return ids


def with_said(messages: Sequence[Message], said: Content) -> list[Message]:
    """A prompt whose last message goes on with what an environment said, as TRL does it."""
    content: Content = messages[-1].get("content") or ""
    if isinstance(content, str) and isinstance(said, str):
        whole: Content = content + said
    else:
        whole = [*_blocks(content), *_blocks(said)]
    return [*messages[:-1], {**messages[-1], "content": whole}]


def _blocks(content: Content) -> list[dict[str, Any]]:
    return [{"type": "text", "text": content}] if isinstance(content, str) else content


def _template_for_tools(tokenizer: Any) -> str | None:
    """The template that turns are written with; None: the tokenizer's own."""
    from trl.chat_template_utils import (
        add_response_schema,
        get_training_chat_template,
        is_chat_template_prefix_preserving,
        supports_tool_calling,
    )

    where = "model.tokenizer: its chat template"
    remedy = "expected: a tokenizer of a model that was trained to use tools, such as Qwen 2.5 or 3, Llama 3.1 or GLM 4"
    if not tokenizer.chat_template:
        raise ConfigError(f"model.tokenizer: has no chat template, so it cannot carry tools; {remedy}")
    if not supports_tool_calling(tokenizer):
        raise ConfigError(
            f"{where} cannot carry tools: a call, its arguments or its result are missing in what it writes; {remedy}"
        )
    if getattr(tokenizer, "response_template", None) is None and getattr(tokenizer, "response_schema", None) is None:
        try:
            add_response_schema(tokenizer)
        except ValueError:
            raise ConfigError(
                f"{where} is none that TRL knows how to parse calls of; expected: a tokenizer that says it, in the "
                f"`response_template` of its tokenizer_config.json (transformers' documentation: response parsing)"
            ) from None
    if is_chat_template_prefix_preserving(tokenizer):
        return None
    try:
        found: str | None = get_training_chat_template(tokenizer)
    except ValueError:
        raise ConfigError(
            f"{where} writes earlier turns in another way when more comes behind them, and TRL has no other for it; "
            f"expected: one that only adds at the end"
        ) from None
    return found
