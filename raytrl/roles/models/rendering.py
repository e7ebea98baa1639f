"""What a chat template makes of messages, and what it leaves out of them. Imports no torch."""

from bisect import bisect_left
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

Messages = Sequence[Mapping[str, Any]]
ASSISTANTS = ("assistant", "gpt", "model")
_SPEAKERS = (*ASSISTANTS, "user", "human", "system")  # what tools say is written in many ways
_REASONING = ("reasoning_content", "reasoning", "thinking")
_ONE_END, _BOTH_ENDS = 4, 8  # characters that count as kept; fewer are in every text


def as_messages(messages: Messages) -> list[dict[str, Any]]:
    """With role and content, as TRL makes them of from and value; the names of the roles stay what they are."""
    return [
        {"role": m["from"], "content": m["value"]} if m.get("from") is not None and "value" in m else dict(m)
        for m in messages
    ]


def rendered(tokenizer: Any, messages: Messages, **options: Any) -> str:
    """The text; raises whatever the template raises."""
    return str(tokenizer.apply_chat_template(list(messages), tokenize=False, **options))


def rendered_all(tokenizer: Any, conversations: Sequence[Messages], **options: Any) -> list[str]:
    """The texts of many, by one call."""
    return list(tokenizer.apply_chat_template(list(map(list, conversations)), tokenize=False, **options))


def encoded(tokenizer: Any, texts: Sequence[str], special: bool) -> list[Sequence[int]]:
    """Token ids of many texts, whole; by the fast tokenizer itself, which is several times quicker than its wrapper."""
    if not tokenizer.is_fast:
        return list(tokenizer(list(texts), add_special_tokens=special)["input_ids"]) if texts else []
    backend = tokenizer.backend_tokenizer
    backend.no_truncation()
    backend.no_padding()
    return [each.ids for each in backend.encode_batch_fast(list(texts), add_special_tokens=special)]


def spoken(messages: Messages) -> Iterator[tuple[str, str]]:
    """(whose, text) of all that a template should write: contents, reasoning, names of called functions."""
    for message in messages:
        role = str(message.get("role"))
        if role not in _SPEAKERS:
            continue
        whose = "the assistant's" if role in ASSISTANTS else f"the {role}'s"
        content = message.get("content")
        parts = [content] if isinstance(content, str) else content if isinstance(content, list) else []
        for part in parts:
            text = part.get("text") if isinstance(part, Mapping) else part
            if isinstance(text, str):
                yield whose, text
        for key in _REASONING:
            if isinstance(message.get(key), str):
                yield whose, message[key]
        for call in message.get("tool_calls") or ():
            function = call.get("function") if isinstance(call, Mapping) else None
            if isinstance(function, Mapping) and isinstance(function.get("name"), str):
                yield whose, function["name"]


def written(text: str) -> int:
    """Characters, blanks and line breaks apart."""
    return len(text) - text.count(" ") - text.count("\n")


def left_out(said: str, text: str) -> int:
    """Characters of `said` that are not in the text, blanks and line breaks apart.

    What is kept is the longest beginning and the longest end that the text has.
    """
    if said.strip() in text:
        return 0
    said, text = "".join(said.split()), "".join(text.split())
    if said in text:
        return 0
    sizes = range(1, len(said) + 1)
    start = bisect_left(sizes, True, key=lambda size: said[:size] not in text)
    end = bisect_left(sizes, True, key=lambda size: said[-size:] not in text)
    fewer, more = sorted((start, end))
    kept = (more if more >= _ONE_END else 0) + (fewer if fewer >= _BOTH_ENDS else 0)
    return max(1, len(said) - kept)
