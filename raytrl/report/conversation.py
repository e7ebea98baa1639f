"""A conversation as people read it: who said what, which call was made, what came back."""

import html
import json
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from rich.markup import escape

Messages = Sequence[Mapping[str, Any]]


def lines_of(messages: Messages) -> Iterator[tuple[str, str]]:
    """(who, what): the role, "call" for each call, and a tool by its name."""
    for message in messages:
        role, text = str(message["role"]), text_of(message)
        if message.get("reasoning_content"):
            yield f"{role} thinks", str(message["reasoning_content"])
        if text.strip() or not message.get("tool_calls"):
            yield (str(message.get("name", role)) if role == "tool" else role), text
        for call in message.get("tool_calls") or ():
            function = call.get("function", call)
            yield "call", f"{function['name']}({_arguments(function.get('arguments'))})"


def text_of(message: Mapping[str, Any]) -> str:
    """Its content, blocks one after the other."""
    content = message.get("content") or ""
    return content if isinstance(content, str) else "".join(str(block.get("text", "")) for block in content)


def as_markup(messages: Messages) -> str:
    """For the terminal."""
    return "\n".join(f"[dim]{escape(who)}:[/] {escape(what.strip())}" for who, what in lines_of(messages))


def as_html(messages: Messages) -> str:
    """For a page."""
    return "".join(
        f"<div><span class=who>{html.escape(who)}</span> {html.escape(what.strip())}</div>"
        for who, what in lines_of(messages)
    )


def _arguments(arguments: Any) -> str:
    if not isinstance(arguments, Mapping):
        return "" if arguments is None else json.dumps(arguments, ensure_ascii=False)
    return ", ".join(f"{name}={json.dumps(value, ensure_ascii=False)}" for name, value in arguments.items())
