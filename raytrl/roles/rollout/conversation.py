"""The state of one conversation: its tokens, whose they are, its messages, and why it ends. No engine, no process."""

from collections.abc import Sequence
from typing import Any, Protocol

from raytrl.records.samples import End, Episode, Message, Prompt, Response
from raytrl.records.tools import Call, Content, Result, Schema, Scores
from raytrl.roles.rollout.engine import Sampled


class Chat(Protocol):
    """`roles.models.chat.Chat`, as much of it as a conversation needs."""

    def suffix(self, results: Sequence[Message]) -> list[int]: ...
    def parsed(self, token_ids: Sequence[int], context: Sequence[int], tools: Sequence[Schema]) -> dict[str, Any]: ...
    def shortened(self, content: Content) -> Content: ...
    def num_special(self, content: Content) -> int: ...


class Conversation:
    """What the policy and its tools have said to each other so far, as TRL's `GRPOTrainer` counts it.

    All tokens behind the prompt count towards the budget, those of tools too. A result for which there is no room is taken
    back, though the tool has run; and a call is only made of a turn that ended by itself.
    """

    def __init__(
        self,
        chat: Chat,
        prompt: Sequence[Message],
        prompt_ids: Sequence[int],
        tools: Sequence[Schema],
        *,
        budget: int,
        max_turns: int,
    ) -> None:
        """
        Args:
            budget: tokens behind the prompt at most.
            max_turns: how often calls are answered at most.
        """
        self._chat, self._prompt, self._tools = chat, list(prompt), tools
        self._prompt_ids, self._budget, self._max_turns = list(prompt_ids), budget, max_turns
        self._token_ids: list[int] = []
        self._sampled: list[tuple[int, int]] = []
        self._logprobs: list[float] = []
        self._messages: list[Message] = []
        self._pending: list[Call | Result] = []  # what the last turn asked for; a result where nobody need be asked
        self._names: list[str] = []
        self._answered = self._calls = self._failed = self._special = 0
        self.end: End | None = None

    @property
    def context(self) -> list[int]:
        """What the next turn goes on from: the very tokens of the row up to there."""
        return self._prompt_ids + self._token_ids

    @property
    def room(self) -> int:
        """Tokens that the next turn may have."""
        return self._budget - len(self._token_ids)

    @property
    def prompt(self) -> Sequence[Message]:
        return self._prompt

    @property
    def messages(self) -> Sequence[Message]:
        return self._messages

    @property
    def token_ids(self) -> Sequence[int]:
        """Behind the prompt."""
        return self._token_ids

    def took(self, turn: Sampled) -> list[Call]:
        """A turn was sampled; the calls that are to be made, none where the conversation has ended or they need no asking."""
        message = self._chat.parsed(turn.token_ids, self.context, self._tools)
        start = len(self._token_ids)
        self._token_ids += turn.token_ids
        self._sampled.append((start, len(self._token_ids)))
        self._logprobs += turn.logprobs
        self._messages.append(message)
        calls = message.get("tool_calls") or ()
        if not turn.ended:
            self.end = "length"
        elif not calls:
            self.end = "ended"
        elif self._answered == self._max_turns:
            self.end = "turns"
        if self.end is not None:
            return []
        self._names, self._pending = [], []
        for call in calls:
            name, pending = _asked(call)
            self._names.append(name)
            self._pending.append(pending)
        return [call for call in self._pending if isinstance(call, Call)]

    def answer(self, results: Sequence[Result]) -> None:
        """What the calls brought, in their order; afterwards the conversation goes on, or has ended."""
        given = iter(results)
        all_results = [pending if isinstance(pending, Result) else next(given) for pending in self._pending]
        said = [self._chat.shortened(result.content) for result in all_results]
        self._calls += len(all_results)
        self._failed += sum(result.failed for result in all_results)
        messages: list[Message] = [
            {"role": "tool", "name": name, "content": content} for name, content in zip(self._names, said, strict=True)
        ]
        suffix = self._chat.suffix(messages)
        if len(suffix) > self.room:
            self.end = "budget"
            return
        self._answered += 1
        self._special += sum(map(self._chat.num_special, said))
        self._messages += messages
        self._token_ids += suffix
        if not self.room:
            self.end = "budget"

    def response(self, prompt: Prompt, sample: int, version: int, scores: Scores) -> Response:
        """It has ended, and this is what came of it."""
        assert self.end is not None
        last = next((m for m in reversed(self._messages) if m["role"] == "assistant"), None)
        assert sum(last - first for first, last in self._sampled) == len(self._logprobs)
        return Response(
            step=prompt.step,
            row=prompt.row,
            sample=sample,
            token_ids=tuple(self._token_ids),
            text=str(last["content"]) if last else "",
            ended=self.end in ("ended", "turns"),
            sampling_logprobs=tuple(self._logprobs),
            policy_version=version,
            episode=Episode(
                prompt=self._prompt,
                prompt_token_ids=tuple(self._prompt_ids),
                messages=self._messages,
                sampled=tuple(self._sampled),
                end=self.end,
                scores=scores.values,
                problems=scores.problems,
                calls=self._calls,
                failed_calls=self._failed,
                split_tokens=self._special,
            ),
        )


def failed_response(
    prompt: Prompt,
    sample: int,
    version: int,
    reason: str,
    timed_out: bool,
    conversation: Conversation | None,
) -> Response:
    """Of a conversation whose environment failed: it is counted, and neither scored nor trained."""
    assert not isinstance(prompt.text, str)
    episode = Episode(
        prompt=list(conversation.prompt if conversation else prompt.text),
        prompt_token_ids=(),
        messages=list(conversation.messages if conversation else ()),
        sampled=(),
        end="failed",
        failure=reason,
        timed_out=timed_out,
    )
    return Response(prompt.step, prompt.row, sample, (), "", False, (), version, episode)


def _asked(call: Any) -> tuple[str, Call | Result]:
    """The name of what is called, and the call, or what TRL answers to one that cannot be made."""
    if call.get("type", "function") != "function":
        error = {"error": f"Unsupported tool call type: {call['type']}"}
        return str(call.get("name", "unknown")), Result(str(error), failed=True)
    function = call.get("function", call)
    name, arguments = str(function["name"]), function.get("arguments") or {}
    if not isinstance(arguments, dict):
        error = {"error": f"{name}() takes named arguments, not {type(arguments).__name__}"}
        return name, Result(str(error), failed=True)
    return name, Call(name, arguments)
