"""What becomes of each prompt: its tokens for the policy, and its text for reward models."""

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from raytrl.config.runs.rollout import RolloutRun
from raytrl.config.sections.reward import RewardSection
from raytrl.errors import ConfigError, DataError
from raytrl.plan.checks.common import Facts, tokenizer_at
from raytrl.plan.checks.rows import Batch, Found, Tell, go_through, in_silence
from raytrl.plan.checks.told import left_out_notices, twice_notice
from raytrl.plan.checks.tools import check_conversations_of
from raytrl.plan.checks.training_rows import LEFT_OUT, SAID
from raytrl.plan.checks.weights import check_vocabulary
from raytrl.roles.models.rendering import encoded, left_out, rendered, spoken, written
from raytrl.roles.models.tokenizer import identity_of
from raytrl.roles.prompts import PromptTable


@dataclass(frozen=True)
class Judge:
    """A reward model, as far as it can be known without its weights."""

    key: str
    tokenizer: Any
    limit: int | None  # tokens of prompt and response


@dataclass(frozen=True)
class PromptRows:
    """`rows.Check` of prompts, by the rules of `roles.prompts` and `roles.reward.model`."""

    where: str
    table: PromptTable  # of no rows: it knows how a prompt is tokenised and cut
    tokenizer: Any  # the policy's
    judges: tuple[Judge, ...] = ()

    @property
    def identity(self) -> str | None:
        tokenizers = [identity_of(each) for each in (self.tokenizer, *(judge.tokenizer for judge in self.judges))]
        judges = [(judge.key, judge.limit) for judge in self.judges]
        return (
            None
            if None in tokenizers
            else repr((self.where, self.table.max_tokens, self.table.cuts, tokenizers, judges))
        )

    def __call__(self, first: int, batch: Batch) -> Found:
        prompts = batch["prompt"]
        found, start = Found(rows=len(prompts)), self.tokenizer.bos_token_id
        texts = self.table.texts_of(prompts, first - 1)
        many = self.table.token_ids_of(prompts, texts, first - 1)
        for number, (text, ids) in enumerate(zip(prompts, many, strict=True), first):
            found.measure("", number, len(ids))
            if len(ids) > self.table.max_tokens:
                found.tally("cut").add(number)
            if start is not None and tuple(ids[:2]) == (start, start):
                found.tally("twice").add(number)
            if not isinstance(text, str):
                self._read(number, text, texts[number - first], found)
        for judge in self.judges:
            self._judge(judge, first, prompts, many, found)
        return found

    def _read(self, number: int, messages: Sequence[Any], whole: str, found: Found) -> None:
        lost = dict[str, tuple[int, str]]()
        for whose, said in spoken(messages):
            found.count(SAID + whose, written(said))
            if (amount := left_out(said, whole)) > 0:
                lost[whose] = (lost.get(whose, (0, ""))[0] + amount, said)
        for whose, (amount, said) in lost.items():
            found.tally(LEFT_OUT + whose).add(number, amount, said.strip()[:60])

    def _judge(self, judge: Judge, first: int, prompts: Sequence[Any], many: Sequence[Any], found: Found) -> None:
        """Counts what a reward model reads before the response."""
        texts = []
        for number, (prompt, ids) in enumerate(zip(prompts, many, strict=True), first):
            seen = self.table.seen(prompt, ids, number - 1)
            texts.append(seen if isinstance(seen, str) else self._read_by(judge, number, seen))
        special = isinstance(prompts[0], str)
        for number, ids in enumerate(encoded(judge.tokenizer, texts, special), first):
            found.measure(judge.key, number, len(ids))

    def _read_by(self, judge: Judge, number: int, messages: Sequence[Any]) -> str:
        if not judge.tokenizer.chat_template:
            raise DataError(
                f"{judge.key}: its tokenizer has no chat template; found: {self.where}: row {number}: a list of messages; "
                f"expected: prompts that are strings, or a reward model with a chat template"
            )
        try:
            return rendered(judge.tokenizer, [*messages, {"role": "assistant", "content": "a"}])
        except Exception as error:  # a template is a program; it may raise anything
            roles = ", ".join(str(message.get("role")) for message in messages)
            raise DataError(
                f"{self.where}: row {number}: the chat template of {judge.key} cannot render the prompt and an answer: "
                f"{error}; found: turns of {roles}; expected: turns that its template takes"
            ) from error


def check_prompts_of(
    run: RolloutRun, dataset: Any, where: str, embeddings: Mapping[str, int], tell: Tell = in_silence
) -> Facts:
    """Goes through every prompt of a dataset.

    Args:
        embeddings: rows of each model that was looked at, by key.

    Raises:
        ConfigError: the tokenizer cannot be used for prompts, or the longest do not fit into a model.
        DataError: a prompt that cannot be used, with its row.
    """
    if run.rollout.converses:
        return check_conversations_of(run, dataset, where, tell)
    from raytrl.data import check_columns, choose_columns  # datasets: 1.3 s
    from raytrl.roles.models.positions import positions_at
    from raytrl.roles.models.tokenizer import turn_end

    check_columns(dataset, run, where)
    trust = run.model.trust_remote_code
    tokenizer = tokenizer_at(run.tokenizer_path, None, trust)
    beyond = check_vocabulary(tokenizer, embeddings.get("model.path"), "model.tokenizer")
    check_for_prompts(tokenizer, dataset[0]["prompt"], where)
    judges, new = judges_of(run.reward), run.rollout.sampling.max_new_tokens
    for judge in judges:
        check_vocabulary(judge.tokenizer, embeddings.get(judge.key), judge.key)
    check = PromptRows(where, PromptTable([], tokenizer, run.rollout, where), tokenizer, judges)
    found = go_through(dataset, ["prompt"], check, alone=trust, tell=tell)
    longest = found.longest[""][0]
    kept, positions = (
        min(longest, run.rollout.max_prompt_length),
        positions_at(str(run.model.path), None, trust, "model.path"),
    )
    if positions is not None and kept + new > positions.most:
        raise ConfigError(
            f"{where}: the longest prompt and its response do not fit the model; found: {kept} tokens + "
            f"rollout.sampling.max_new_tokens {new} = {kept + new}; expected: at most {positions.most}; lower "
            f"max_new_tokens or rollout.max_prompt_length"
        )
    notices = [*judged(found, judges, run, where), *left_out_notices(found, where)]
    if (twice := found.tally("twice")).rows:
        notices.append(twice_notice(twice, found, where, str(tokenizer.bos_token)))
    num_cut = found.tally("cut").rows
    cut = f", {num_cut:,} cut to rollout.max_prompt_length" if num_cut else ""
    turn = turn_end(tokenizer) if not isinstance(dataset[0]["prompt"], str) else None
    ends = (
        "" if turn is None or turn[0] == tokenizer.eos_token_id else f"; a turn's end, {turn[1]}, ends a response too"
    )
    words = f"{len(dataset):,} prompts of up to {longest} tokens{cut}{ends}{beyond}"
    return Facts(
        {where: len(dataset)}, {where: words}, notices, {where: choose_columns(dataset, run, where).in_words()}
    )


def check_for_prompts(tokenizer: Any, first: Any, where: str) -> None:
    """What a policy's tokenizer needs; `first` is the first prompt.

    Raises:
        ConfigError: it has no end token, no chat template for conversations, or ends every prompt.
    """
    if tokenizer.eos_token_id is None:
        raise ConfigError(
            "model.tokenizer: has no end token, so no response would ever end; expected: one with eos_token"
        )
    if not isinstance(first, str) and not tokenizer.chat_template:
        raise ConfigError(
            f"model.tokenizer: {where} has conversations, but the tokenizer has no chat template; expected: one that "
            f"has, or prompts that are strings"
        )
    if tokenizer("a")["input_ids"][-1:] == [tokenizer.eos_token_id]:
        raise ConfigError("model.tokenizer: puts its end token behind every prompt, so the policy would go on after it")


def check_readers(run: RolloutRun, others: Mapping[str, str | None], embeddings: Mapping[str, int]) -> None:
    """Models that read the policy's tokens know them by the same ids; one without a tokenizer of its own is believed.

    Args:
        others: their places, by key.
        embeddings: rows of each model that was looked at, by key.

    Raises:
        ConfigError: one has another token of the same id, or too few embeddings.
    """
    from raytrl.roles.models.tokenizer import load_tokenizer

    places = {key: place for key, place in others.items() if place is not None}
    if not places:
        return
    trust = run.model.trust_remote_code
    tokenizer = tokenizer_at(run.tokenizer_path, None, trust)
    own = sorted(tokenizer.get_vocab().items())
    for key, place in places.items():
        check_vocabulary(tokenizer, embeddings.get(key), key)
        try:
            theirs = {number: token for token, number in load_tokenizer(place, None, trust).get_vocab().items()}
        except (OSError, ValueError):
            continue
        other = [n for token, n in own if theirs.get(n, token) != token]
        if other:
            raise ConfigError(
                f"{key}: reads the policy's tokens, so it needs the same ids; found: id {other[0]} is "
                f"{theirs[other[0]]!r} in {place!r} and {tokenizer.convert_ids_to_tokens(other[0])!r} in "
                f"{run.tokenizer_path!r}, and {len(other)} like it; expected: a model with the same tokenizer"
            )


def judges_of(section: RewardSection) -> tuple[Judge, ...]:
    """The reward models of a run.

    Raises:
        ConfigError: one has no tokenizer or config.
    """
    from raytrl.roles.models.positions import positions_at
    from raytrl.roles.models.tokenizer import load_tokenizer

    judges = []
    for i, source in enumerate(section.sources):
        if source.model is None:
            continue
        key, folders = (
            f"reward.sources.{i}.model",
            (source.model, f"{source.model}/merged", f"{source.model}/../merged"),
        )
        place = next((f for f in folders if os.path.isfile(os.path.join(f, "config.json"))), source.model)
        try:
            tokenizer = load_tokenizer(place, None, source.trust_remote_code)
        except (OSError, ValueError) as error:
            raise ConfigError(f"{key}: its tokenizer cannot be loaded: {str(error).splitlines()[0]}") from None
        positions = positions_at(place, None, source.trust_remote_code, key)
        limits = [None if positions is None else positions.most, int(tokenizer.model_max_length)]
        judges.append(Judge(key, tokenizer, min(limit for limit in limits if limit is not None)))
    return tuple(judges)


def judged(found: Found, judges: Sequence[Judge], run: RolloutRun, where: str) -> list[str]:
    """Whether reward models can read the longest prompts, and responses behind them; words where that is not sure.

    Raises:
        DataError: one cannot read a prompt, and a failed score ends the run.
    """
    notices, new = [], run.rollout.sampling.max_new_tokens
    for judge in judges:
        tokens, row = found.longest.get(judge.key, (0, 0))
        if judge.limit is None or tokens + new <= judge.limit:
            continue
        if tokens >= judge.limit and run.reward.on_error == "fail":
            raise DataError(
                f"{where}: row {row}: the prompt does not fit the reward model {judge.key}; found: {tokens} of its tokens; "
                f"expected: fewer than {judge.limit}; lower rollout.max_prompt_length, or take another reward model"
            )
        notices.append(
            f"{where}: row {row}: the prompt has {tokens} tokens of {judge.key}, which takes {judge.limit}: with a response "
            f"of rollout.sampling.max_new_tokens {new} it may be too long, and a response that is gets no score "
            f"(reward.on_error: {run.reward.on_error})"
        )
    return notices
