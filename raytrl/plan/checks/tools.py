"""What is checked of tools and environments before the start: they load, the template carries them, each row can begin."""

from collections.abc import Iterator
from concurrent.futures import Future
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from raytrl.config.runs.rollout import RolloutRun
from raytrl.errors import ConfigError, DataError
from raytrl.plan.checks.common import Facts, tokenizer_at
from raytrl.plan.checks.rows import Batch, Found, Tell, go_through, in_silence
from raytrl.records.tools import ConversationError, Schema, Start, Toolbox
from raytrl.roles.environment.tools import Tools
from raytrl.roles.models.chat import Chat
from raytrl.roles.prompts import NO_PROMPT


@dataclass(frozen=True)
class ConversationRows:
    """`rows.Check` of prompts that begin a conversation with tools."""

    where: str
    chat: Chat
    toolbox: Toolbox
    limit: int  # tokens

    @property
    def identity(self) -> None:
        """What a tool's schema follows from cannot be said."""
        return None

    def __call__(self, first: int, batch: Batch) -> Found:
        count = len(next(iter(batch.values())))
        found = Found(rows=count)
        for i in range(count):
            messages: Any = batch["prompt"][i] if "prompt" in batch else NO_PROMPT
            name = batch["environment"][i] if self.toolbox.is_by_name else None
            number = first + i
            if name not in self.toolbox.kinds:
                raise DataError(
                    f"{self.where}: row {number}: column environment: none of rollout.environment; found: {name!r}; expected: "
                    f"one of {', '.join(map(str, self.toolbox.kinds))}"
                )
            self._check(messages, number)
            try:
                ids = self.chat.prompt(messages, self.toolbox.kinds[name].tools, None)
            except Exception as error:  # a template is a program; it may raise anything
                raise DataError(
                    f"{self.where}: row {number}: the chat template cannot render the prompt: {error}"
                ) from error
            if len(ids) > self.limit:
                raise DataError(
                    f"{self.where}: row {number}: the prompt is too long; found: {len(ids)} tokens, those that describe its "
                    f"tools included; expected: at most {self.limit} (rollout.max_prompt_length): a cut would take the tools "
                    f"away"
                )
            found.measure("", number, len(ids))
        return found

    def _check(self, messages: Any, number: int) -> None:
        if isinstance(messages, str):
            raise DataError(
                f"{self.where}: row {number}: tools need a conversation; found: a prompt that is text; expected: a list of "
                f"messages with role and content"
            )
        if messages[-1]["role"] == "assistant":
            raise DataError(
                f"{self.where}: row {number}: the prompt ends with the assistant's words; found: role assistant; expected: a "
                f"conversation in which it is the assistant's turn"
            )


def check_conversations_of(run: RolloutRun, dataset: Any, where: str, tell: Tell = in_silence) -> Facts:
    """Goes through every row of a dataset, and lets the first of each environment begin.

    Raises:
        ConfigError: a tool, an environment or the chat template cannot be used.
        DataError: a row that cannot begin.
    """
    from raytrl.data import check_columns, choose_columns  # datasets: 1.3 s

    layout = check_columns(dataset, run, where)
    with opened(run) as (tools, chat):
        toolbox = tools.toolbox
        check_rewards(run, toolbox)
        by_name = toolbox.is_by_name
        if by_name and "environment" not in dataset.column_names:
            raise DataError(
                f"{where}: rollout.environment has several classes, and each row says which is its own; found: columns "
                f"{', '.join(dataset.column_names)}; expected: a column environment with one of "
                f"{', '.join(map(str, toolbox.kinds))}"
            )
        columns = [*layout, *(["environment"] if by_name else [])] or dataset.column_names[:1]
        check = ConversationRows(where, chat, toolbox, run.rollout.max_prompt_length)
        found = go_through(dataset, columns, check, alone=True, tell=tell)
        if toolbox.has_environment:
            _begin(dataset, where, tools)
    longest, words = found.longest[""][0], f"{len(dataset):,} conversations, which begin with up to"
    _check_positions(run, where, longest)
    return Facts(
        {where: len(dataset)},
        {where: f"{words} {longest} tokens, those that describe their tools included"},
        columns={where: choose_columns(dataset, run, where).in_words()},
        tools=tuple(described(toolbox)),
    )


@contextmanager
def opened(run: RolloutRun) -> Iterator[tuple[Tools, Chat]]:
    """The tools of a run and its chat, for as long as they are looked at."""
    from raytrl.roles.models.tokenizer import turn_end

    tokenizer = tokenizer_at(run.tokenizer_path, None, run.model.trust_remote_code)
    if tokenizer.eos_token_id is None:
        raise ConfigError("model.tokenizer: has no end token, so no turn would ever end; expected: one with eos_token")
    turn = turn_end(tokenizer)
    ends = [tokenizer.eos_token_id, *([] if turn is None else [turn[0]])]
    chat = Chat(tokenizer, ends, run.rollout.max_result_tokens)
    tools = Tools(run.rollout, run.functions_by_source())
    try:
        yield tools, chat
    finally:
        tools.close()


def check_rewards(run: RolloutRun, toolbox: Toolbox) -> None:
    """Something scores every response, and what is named after a class is one's.

    Raises:
        ConfigError: nothing does, or a name is nobody's, or two have it.
    """
    sources, owned = run.reward.sources, toolbox.rewards
    for i, source in enumerate(sources):
        if source.kind == "environment" and source.name not in owned:
            raise ConfigError(
                f"reward.sources.{i}: source {source.name!r}; found: none of model, function, url; expected: exactly one of "
                f"them, or the name of a class with a get_reward ({', '.join(owned) or 'rollout.environment has none'})"
            )
        if source.kind != "environment" and source.name in owned:
            raise ConfigError(
                f"reward.sources.{i}.name: {source.name!r} is what the get_reward of rollout.environment is called; expected: "
                f"another name"
            )
    if not sources and not owned:
        raise ConfigError(
            "reward.sources: nothing scores a response; found: no sources, and no get_reward in rollout.environment; expected: "
            "one of the two"
        )


def described(toolbox: Toolbox) -> Iterator[tuple[str, str]]:
    """(subject, sentence) of each tool: what a model is told of it."""
    seen = set[str]()
    for name, kind in toolbox.kinds.items():
        for schema in kind.tools:
            sentence = _in_words(schema)
            whose = "tool" if name is None else f"tool of {name}"
            if (key := f"{whose} {sentence}") not in seen:
                seen.add(key)
                yield whose, sentence


def _in_words(schema: Schema) -> str:
    function = schema["function"]
    parameters = function.get("parameters", {})
    needed, texts = parameters.get("required", ()), []
    for name, each in parameters.get("properties", {}).items():
        kind = each.get("type", "any")
        kind = " or ".join(kind) if isinstance(kind, list) else kind
        choices = f" of {', '.join(map(str, each['enum']))}" if "enum" in each else ""
        texts.append(f"{name}{'' if name in needed else '?'}: {kind}{choices}")
    returned = function.get("return", {}).get("type")
    result = f" -> {returned}" if returned else ""
    return f"{function['name']}({', '.join(texts)}){result}: {' '.join(str(function.get('description', '')).split())}"


def _begin(dataset: Any, where: str, tools: Tools) -> None:
    """The first row of each environment."""
    first: dict[Any, int] = {}
    for number, name in enumerate(dataset["environment"] if tools.toolbox.is_by_name else [None]):
        first.setdefault(name, number)
    started: dict[int, Future[Any]] = {}
    for number in first.values():
        started[number] = tools.start(Start(*tools.toolbox.named(dataset[number]), 0, 0))
    for number, future in started.items():
        try:
            future.result()[0].close()
        except ConversationError as error:
            raise DataError(f"{where}: row {number + 1}: its environment cannot begin: {error}") from None


def _check_positions(run: RolloutRun, where: str, longest: int) -> None:
    from raytrl.roles.models.positions import positions_at

    positions = positions_at(str(run.model.path), None, run.model.trust_remote_code, "model.path")
    new, whole = run.rollout.sampling.max_new_tokens, run.rollout.max_prompt_length
    begins = whole if run.rollout.environment is not None else longest  # reset may add to it
    if positions is not None and begins + new > positions.most:
        raise ConfigError(
            f"{where}: a conversation may not fit the model; found: {begins} tokens to begin with + "
            f"rollout.sampling.max_new_tokens {new} = {begins + new}; expected: at most {positions.most}; lower max_new_tokens "
            f"or rollout.max_prompt_length"
        )
