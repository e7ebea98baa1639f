"""Conversations with tools and environments on a rollout engine: many at a time, turn by turn.

On an engine with a continuous batch each conversation goes on as soon as it can, so that the batch is full while tools run.
On one that samples batch by batch all of a chunk's conversations take their turns together: what shares a batch then follows
from what was said, and not from the clock.
"""

import logging
from collections.abc import Callable, Generator, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, wait
from typing import Any, Protocol

from raytrl.config.sections.rollout import RolloutSection
from raytrl.errors import StaleAttemptError
from raytrl.records.samples import Message, Prompt, Response, chunks
from raytrl.records.tools import Call, Content, ConversationError, Result, ScoreRequest, Scores, Start, Toolbox
from raytrl.roles.models.chat import Chat, with_said
from raytrl.roles.rollout.conversation import Conversation, failed_response
from raytrl.roles.rollout.engine import RolloutEngine, Turn, Wanted, response_seed

_log = logging.getLogger(__name__)
_BEAT_S = 1.0
# What a conversation waits for: a turn of the policy, or something of its tools. It is sent what came, or thrown why not.
_Talk = Generator["Turn | Future[Any]", Any, Response]


class Room(Protocol):
    """The process of one conversation (`roles.environment.tools.Room`). The futures raise ConversationError."""

    def call(self, calls: Sequence[Call]) -> "Future[list[Result]]": ...
    def score(self, request: ScoreRequest) -> "Future[Scores]": ...
    def close(self) -> None: ...


class Tools(Protocol):
    """The user's tools and environments (`roles.environment.tools.Tools`)."""

    @property
    def toolbox(self) -> Toolbox: ...
    def start(self, start: Start) -> "Future[Any]":
        """A `Room`, and what its environment says first (`Content` or None)."""
        ...


class Episodes:
    """Turns prompts into conversations, and these into responses."""

    def __init__(self, tools: Tools, chat: Chat, rollout: RolloutSection, seed: int) -> None:
        """`seed` is the run's."""
        self._tools, self._chat, self._rollout, self._seed = tools, chat, rollout, seed

    def responses(
        self, engine: RolloutEngine, prompts: Sequence[Prompt], version: int, samples: int, greedy: bool, wanted: Wanted
    ) -> list[Response]:
        """As `RolloutEngine.generate`; a conversation whose environment failed has `episode.end` failed."""
        together = [sorted(prompts, key=lambda prompt: prompt.row)] if engine.concurrent else None
        found: list[Response] = []
        for chunk in together or chunks(prompts, self._rollout.chunk_prompts):
            talks = [self._talk(prompt, sample, version) for prompt in chunk for sample in range(samples)]
            try:
                found += _all(talks, engine, version, greedy, wanted)
            finally:
                for talk in talks:
                    talk.close()
        return found

    def _talk(self, prompt: Prompt, sample: int, version: int) -> _Talk:
        """One conversation, from its environment's reset to its scores."""
        room: Room | None = None
        conversation: Conversation | None = None
        name, columns = self._tools.toolbox.named(prompt.columns)
        kind = self._tools.toolbox.kinds[name]
        seed = response_seed(self._seed, prompt.step, prompt.row, sample)
        row_seed = response_seed(self._seed, prompt.step, prompt.row, -1)
        start = Start(name, columns, row_seed, seed)
        try:
            said: Content | None = None
            if kind.environment is not None:
                room, said = yield from _started(self._tools.start(start))
            conversation = self._begun(prompt, kind.tools, said)
            while conversation.end is None:
                turn = yield Turn(prompt, conversation.context, seed, conversation.room)
                seed += 1
                calls = conversation.took(turn)
                if conversation.end is not None:
                    break
                if calls and room is None:
                    room, _ = yield from _started(self._tools.start(start))
                results = (yield room.call(calls)) if calls and room is not None else ()
                conversation.answer(results)
            scores = Scores()
            if room is not None and kind.environment is not None and self._is_scored:
                others = {key: value for key, value in columns.items() if key != "prompt"}
                request = ScoreRequest(
                    conversation.prompt, conversation.messages, conversation.token_ids, others, prompt.step
                )
                scores = yield room.score(request)
            every = dict.fromkeys((*self._tools.toolbox.rewards, *self._tools.toolbox.functions))
            return conversation.response(prompt, sample, version, Scores({**every, **scores.values}, scores.problems))
        except ConversationError as error:
            _log.warning("step %d, row %d, sample %d: failed: %s", prompt.step, prompt.row, sample, error)
            return failed_response(prompt, sample, version, str(error), error.timed_out, conversation)
        finally:
            if room is not None:
                room.close()

    @property
    def _is_scored(self) -> bool:
        return bool(self._tools.toolbox.rewards or self._tools.toolbox.functions)

    def _begun(self, prompt: Prompt, tools: Any, said: Content | None) -> Conversation:
        messages: Sequence[Message] = prompt.text  # type: ignore[assignment]  # strings are refused before the start
        said = None if said is None else self._chat.shortened(said)
        ids, limit = self._chat.prompt(messages, tools, said), self._rollout.max_prompt_length
        if len(ids) > limit:  # a cut would take the tools away
            raise ConversationError(
                f"reset: the prompt and what it said are too long; found: {len(ids)} tokens; expected: at most {limit} "
                f"(rollout.max_prompt_length)"
            )
        return Conversation(
            self._chat,
            messages if said is None else with_said(messages, said),
            ids,
            tools,
            budget=self._rollout.sampling.max_new_tokens,
            max_turns=self._rollout.max_turns,
        )


def _started(future: "Future[Any]") -> Generator["Future[Any]", Any, tuple[Room, Content | None]]:
    """Waits for a process; nobody's is closed as soon as it is there."""
    try:
        room, said = yield future
    except GeneratorExit:
        future.add_done_callback(lambda done: done.result()[0].close() if not done.exception() else None)
        raise
    return room, said


def _all(talks: Sequence[_Talk], engine: RolloutEngine, version: int, greedy: bool, wanted: Wanted) -> list[Response]:
    """Their responses, in order, once all have ended."""
    found: dict[int, Response] = {}
    turns: dict[int, Turn] = {}
    waiting: dict[Future[Any], int] = {}

    def go_on(number: int, step: Callable[[], Turn | Future[Any]]) -> None:
        try:
            next_ = step()
        except StopIteration as done:
            found[number] = done.value
            return
        if isinstance(next_, Turn):
            turns[number] = next_
        else:
            waiting[next_] = number

    for number, talk in enumerate(talks):
        go_on(number, lambda talk=talk: next(talk))  # type: ignore[misc]
    while turns or waiting:
        if turns and (engine.concurrent or not waiting):
            asked: Mapping[int, Turn] = dict(sorted(turns.items()))
            turns.clear()
            waiting |= zip(engine.submit(list(asked.values()), version, greedy, wanted), asked, strict=True)
        done, _ = wait(waiting, timeout=_BEAT_S, return_when=FIRST_COMPLETED)
        if not wanted():
            raise StaleAttemptError("rollout engine: not wanted any more")
        for future in sorted(done, key=lambda future: waiting[future]):
            number = waiting.pop(future)
            talk, error = talks[number], future.exception()
            if isinstance(error, ConversationError):
                go_on(number, lambda talk=talk, error=error: talk.throw(error))  # type: ignore[misc]
            elif error is not None:
                raise error
            else:
                go_on(number, lambda talk=talk, future=future: talk.send(future.result()))  # type: ignore[misc]
    return [found[number] for number in range(len(talks))]
