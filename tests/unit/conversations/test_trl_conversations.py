"""Conversations come out as in TRL's own tool loop, with the same turns of the model: tokens, masks, messages, counts."""

import copy
from collections.abc import Iterator, Sequence
from concurrent.futures import Future
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from trl import GRPOTrainer
from trl.chat_template_utils import add_response_schema, get_training_chat_template, is_chat_template_prefix_preserving
from trl.chat_template_utils import parse_response as parse

from raytrl.config.sections.rollout import RolloutSection
from raytrl.records.samples import Prompt, Response
from raytrl.roles.environment.tools import Tools
from raytrl.roles.models.chat import Chat
from raytrl.roles.rollout.engine import RolloutEngine, Sampled, Turn, Wanted
from raytrl.roles.rollout.episodes import Episodes
from tests import user_tools
from tests.chats import encoded, tokenizer, turn

FILE = str(Path(user_tools.__file__))
PROMPT = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "What is 6 times 7?"}]
NAMES = ["qwen2.5", "qwen3", "llama3.1"]
CALL = ("multiply", {"a": 6, "b": 7})


class Scripted(RolloutEngine):
    """Says what it was told to, a turn after the other, as far as there is room."""

    def __init__(self, turns: Sequence[Sequence[int]], ends: int) -> None:
        super().__init__()
        self._turns, self._end = iter(turns), ends
        self._versions = [0]
        self.contexts: list[list[int]] = []

    def submit(self, turns: Sequence[Turn], version: int, greedy: bool, wanted: Wanted) -> "list[Future[Sampled]]":
        found = []
        for asked in turns:
            self.contexts.append(list(asked.token_ids))
            ids = tuple(next(self._turns))[: asked.room]
            future: Future[Sampled] = Future()
            future.set_result(Sampled(ids, (-1.0,) * len(ids), ids[-1] == self._end))
            found.append(future)
        return found

    def _begin(self) -> None: ...
    def _take(self, bucket: Any) -> str: ...
    def _finish(self, version: int) -> None: ...
    def _generate(self, *_: Any) -> list[Response]: ...
    def _logprobs(self, *_: Any) -> list[float]: ...


@pytest.fixture(scope="module")
def tools() -> Iterator[Tools]:
    found = Tools(RolloutSection(tools=[f"{FILE}:{name}" for name in ("multiply", "wait", "fail")]))
    yield found
    found.close()


def ours(name: str, tools: Tools, turns: Sequence[str], budget: int, max_turns: int) -> Response:
    chat = tokenizer(name)
    section = RolloutSection(
        tools=["a.py:b"], sampling={"max_new_tokens": budget}, max_turns=max_turns, max_prompt_length=10_000
    )
    engine = Scripted([encoded(chat, text) for text in turns], chat.eos_token_id)
    engine.conversations = Episodes(tools, Chat(chat, [chat.eos_token_id], 1024), section, 0)
    (response,) = engine.generate([Prompt(0, 0, PROMPT, (), {"prompt": PROMPT})], 0)
    episode = response.episode
    assert episode is not None
    for context, (first, _) in zip(engine.contexts, episode.sampled, strict=True):
        assert context == [*episode.prompt_token_ids, *response.token_ids[:first]], "the very tokens of the row"
    return response


def theirs(name: str, turns: Sequence[str], budget: int, max_turns: int) -> dict[str, Any]:
    """`GRPOTrainer._tool_call_loop` itself, with the generation scripted."""
    chat = add_response_schema(tokenizer(name))
    functions = [user_tools.multiply, user_tools.wait, user_tools.fail]
    script = iter(encoded(chat, text) for text in turns)
    trainer: Any = object.__new__(GRPOTrainer)
    trainer.processing_class = trainer._tokenizer = chat
    trainer.chat_template = None if is_chat_template_prefix_preserving(chat) else get_training_chat_template(chat)
    trainer.chat_template_kwargs, trainer._is_vlm, trainer.use_vllm = {}, False, False
    trainer.tools, trainer.environment_factories = functions, None
    trainer.max_completion_length, trainer.max_tool_calling_iterations = budget, max_turns
    trainer.model = SimpleNamespace(config=SimpleNamespace(max_position_embeddings=100_000))
    trainer._sync_tool_dicts = [{f.__name__: f for f in (user_tools.multiply, user_tools.fail)}]
    trainer._async_tool_dicts = [{"wait": user_tools.wait}]
    trainer._generate_single_turn = lambda ids, *_, **__: ([next(script)[:budget] for _ in ids], None)
    prompt_ids, _, _ = trainer._tokenize_prompts([PROMPT])
    first = next(script)[:budget]
    completions = [[parse(chat, first, prefix=prompt_ids[0], tools=functions)]]
    mask, completions, ids, _, calls, failures, _ = trainer._tool_call_loop(
        copy.deepcopy([PROMPT]), prompt_ids, [first], completions, None, None, {}
    )
    return {
        "prompt": prompt_ids[0],
        "ids": ids[0],
        "mask": mask[0],
        "messages": completions[0],
        "calls": calls,
        "failures": failures,
    }


def size(name: str, *texts: str) -> int:
    return sum(len(encoded(tokenizer(name), text)) for text in texts)


def suffix_size(name: str, tools: Tools) -> int:
    response = ours(name, tools, [turn(name, "", CALL), turn(name, "42")], 10_000, 8)
    assert response.episode is not None
    return response.episode.sampled[1][0] - response.episode.sampled[0][1]


CASES = {
    "no call": (["42"], None, 8, "ended"),
    "one call": ([("", CALL), "It is 42."], None, 8, "ended"),
    "two rounds": ([("", CALL), ("Again. ", ("multiply", {"a": 42, "b": 2})), "84"], None, 8, "ended"),
    "raises": ([("", ("fail", {"why": "no"})), "Sorry."], None, 8, "ended"),
    "unknown tool": ([("", ("divide", {"a": 1})), "Sorry."], None, 8, "ended"),
    "arguments that do not fit": ([("", ("multiply", {"a": 6})), "Sorry."], None, 8, "ended"),
    "turns": ([("", CALL), ("", CALL), ("", CALL)], None, 2, "turns"),
    "cut turn": ([("", CALL), "A very long answer that has no end."], "cut", 8, "length"),
    "exact fit": ([("", CALL), "never"], "exact", 8, "budget"),
    "over budget": ([("", CALL), "never"], "over", 8, "budget"),
}


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("case", CASES)
def test_a_conversation_is_the_one_that_trl_has(name: str, case: str, tools: Tools) -> None:
    said, limit, max_turns, end = CASES[case]
    turns = [turn(name, text) if isinstance(text, str) else turn(name, *text) for text in said]
    budget = 10_000
    if limit is not None:
        budget = size(name, turns[0]) + suffix_size(name, tools) + {"cut": 9, "exact": 0, "over": -1}[limit]
    expected, found = theirs(name, turns, budget, max_turns), ours(name, tools, turns, budget, max_turns)
    episode = found.episode
    assert episode is not None
    mask = [int(any(first <= i < last for first, last in episode.sampled)) for i in range(len(found.token_ids))]
    assert list(episode.prompt_token_ids) == expected["prompt"]
    assert list(found.token_ids) == expected["ids"]
    assert mask == expected["mask"]
    assert list(episode.messages) == expected["messages"]
    assert (episode.calls, episode.failed_calls) == (expected["calls"], expected["failures"])
    assert episode.end == end and found.ended == (end in ("ended", "turns"))
    assert found.num_sampled == sum(mask)


@pytest.mark.parametrize("name", ["qwen2.5", "qwen3"])
def test_several_calls_of_one_message_are_those_of_trl(name: str, tools: Tools) -> None:
    turns = [turn(name, "Both. ", CALL, ("fail", {"why": "no"}), ("multiply", {"a": 2, "b": 2})), turn(name, "So.")]
    expected, found = theirs(name, turns, 10_000, 8), ours(name, tools, turns, 10_000, 8)
    assert found.episode is not None
    assert list(found.token_ids) == expected["ids"] and list(found.episode.messages) == expected["messages"]
    assert (found.episode.calls, found.episode.failed_calls) == (3, 1) == (expected["calls"], expected["failures"])


def test_async_results_keep_their_place(tools: Tools) -> None:
    """Unlike TRL, which puts them behind all others whatever the model asked for first."""
    turns = [turn("qwen2.5", "", ("wait", {"seconds": 0.01}), CALL), turn("qwen2.5", "So.")]
    episode = ours("qwen2.5", tools, turns, 10_000, 8).episode
    assert episode is not None
    assert [message["content"] for message in episode.messages[1:3]] == ["waited 0.01", "42"]


def test_a_call_of_a_turn_that_was_cut_is_not_made(tools: Tools) -> None:
    """Though it parses: TRL makes it."""
    text = turn("qwen2.5", "", CALL, ended=False)
    found = ours("qwen2.5", tools, [text + "x" * 20], size("qwen2.5", text), 8)
    assert found.episode is not None
    assert found.episode.end == "length" and found.episode.calls == 0 and len(found.episode.messages) == 1
