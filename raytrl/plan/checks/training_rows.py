"""What TRL will make of each row that is trained on: its text, its tokens, and what becomes of them."""

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

from raytrl.errors import DataError
from raytrl.plan.checks.rows import Batch, Found
from raytrl.roles.models.positions import Positions
from raytrl.roles.models.rendering import (
    ASSISTANTS,
    as_messages,
    encoded,
    left_out,
    rendered,
    rendered_all,
    spoken,
    written,
)
from raytrl.roles.models.tokenizer import identity_of

LEFT_OUT = "left out: "  # of a template, by whose
SAID = "said: "
Row = Mapping[str, Any]
Job = tuple[int, Any, Mapping[str, Any]]  # the row's number, messages, options of the template


@dataclass(frozen=True)
class Trained:
    """One sequence of tokens that a row becomes: all of it, and what of it is prompt."""

    prompt: Any  # text, messages, or None where nothing is told apart
    whole: Any  # text, messages, or token ids
    answer: Any  # of the messages: those that answer


@dataclass(frozen=True)
class TrainingRows:
    """`rows.Check` of SFT, reward modelling and DPO, by the rules of TRL's `_prepare_dataset`."""

    where: str
    kind: str  # sft, reward, dpo
    columns: tuple[str, ...]
    tokenizer: Any  # as TRL will have it
    max_length: int | None
    keeps_end: bool = False
    packing: str | None = None  # its strategy
    completion_only: bool = False
    multiple: int | None = None  # what rows are padded to
    positions: Positions | None = None
    every: int = 1  # of how many conversations one is rendered as a rollout's prompt, too

    def __call__(self, first: int, batch: Batch) -> Found:
        found = Found(rows=len(next(iter(batch.values()))))
        rows = [dict(zip(batch, values, strict=True)) for values in zip(*batch.values(), strict=True)]
        sequences = [self._sequences(row) for row in rows]
        if self.columns == ("input_ids",):
            ids: Iterator[Sequence[int]] = iter(())
        elif isinstance(sequences[0][0].whole, str):
            texts = [text for each in sequences for s in each for text in (s.prompt, s.whole) if text is not None]
            ids = iter(encoded(self.tokenizer, texts, True))
        else:
            texts = self._conversations(first, rows, sequences, found)
            ids = iter(encoded(self.tokenizer, texts, False))
        for number, each in enumerate(sequences, first):
            self._measure(number, each, ids, found)
            self._look_at_answers(number, rows[number - first], found)
        return found

    def _look_at_answers(self, number: int, row: Row, found: Found) -> None:
        """What nothing can be learned from."""
        answers = [row[column] for column in self.columns if column != "prompt"]
        if any(isinstance(answer, str) and not answer.strip() for answer in answers):
            found.tally("empty").add(number)
        if len(answers) == 2 and answers[0] == answers[1]:
            found.tally("same").add(number, what=str(answers[0])[:60])
        if self.kind == "dpo" and "prompt" not in self.columns and not isinstance(answers[0], str):
            roles = [as_messages(answer)[0].get("role") for answer in answers]
            if answers[0][:1] != answers[1][:1] and any(role not in ASSISTANTS for role in roles):
                found.tally("no prompt").add(number)

    @property
    def identity(self) -> str | None:
        tokenizer = identity_of(self.tokenizer)
        return None if tokenizer is None else repr((tokenizer, replace(self, tokenizer=None)))

    # The tokenizer looks its special tokens up anew each time, which takes longer than all else that a short row needs.
    @cached_property
    def _end(self) -> str:
        return str(self.tokenizer.eos_token)

    @cached_property
    def _start(self) -> int | None:
        start: int | None = self.tokenizer.bos_token_id
        return start

    def _sequences(self, row: Row) -> list[Trained]:
        if self.kind == "sft" and "completion" not in self.columns:
            value = row[self.columns[-1]]
            if self.columns == ("input_ids",):
                return [Trained(None, value, None)]
            return [self._sequence(None, value)]
        if self.kind == "sft":
            return [self._sequence(row["prompt"], row["completion"])]
        prompt, chosen, rejected = row.get("prompt"), row["chosen"], row["rejected"]
        if prompt is None and self.kind == "dpo":
            size = _prompt_size(chosen, rejected)
            prompt, chosen, rejected = chosen[:size], chosen[size:], rejected[size:]
        found = [self._sequence(prompt, answer) for answer in (chosen, rejected)]
        return found if self.kind == "dpo" else [Trained(None, each.whole, each.answer) for each in found]

    def _sequence(self, prompt: Any, answer: Any) -> Trained:
        if not isinstance(answer, str):
            answer = as_messages(answer)
            prompt = None if prompt is None else as_messages(prompt)
            return Trained(prompt, [*(prompt or ()), *answer], answer)
        answer = answer if answer.endswith(self._end) else answer + self._end
        return Trained(prompt, (prompt or "") + answer, answer)

    def _conversations(
        self, first: int, rows: Sequence[Row], sequences: Sequence[Sequence[Trained]], found: Found
    ) -> list[str]:
        """Renders the rows' conversations; returns the texts that are tokenised: of each its prompt, if any, and the whole."""
        jobs = list[Job]()
        for number, (row, each) in enumerate(zip(rows, sequences, strict=True), first):
            tools = row.get("tools")
            options = {} if tools is None else {"tools": json.loads(tools) if isinstance(tools, str) else tools}
            options |= row.get("chat_template_kwargs") or {}
            for sequence in each:
                self._refuse_unanswered(number, sequence)
                if sequence.prompt is not None:
                    jobs.append((number, sequence.prompt, {**options, "add_generation_prompt": True}))
                jobs.append((number, sequence.whole, options))
        texts = self._rendered_all(jobs)
        places = iter(range(len(jobs)))
        for number, each in enumerate(sequences, first):
            lost = dict[str, tuple[int, str]]()
            for sequence in each:
                place = next(places) if sequence.prompt is None else (next(places), next(places))[1]
                whole = texts[place]
                if sequence.prompt is None and self.kind == "sft" and number % self.every == 0:
                    self._try_as_prompt(number, sequence.whole, whole, jobs[place][2], found)
                # What a row's sequences have in common is counted once.
                for whose, said in spoken(sequence.whole if sequence is each[0] else sequence.answer):
                    found.count(SAID + whose, written(said))
                    if (amount := left_out(said, whole)) > 0:
                        lost[whose] = (lost.get(whose, (0, ""))[0] + amount, said)
            for whose, (amount, said) in lost.items():
                found.tally(LEFT_OUT + whose).add(number, amount, said.strip()[:60])
            if (last := each[0].whole[-1].get("role")) not in ASSISTANTS:
                found.tally("open").add(number, what=str(last))
        return texts

    def _refuse_unanswered(self, number: int, sequence: Trained) -> None:
        roles = [str(message.get("role")) for message in sequence.answer]
        if not any(role in ASSISTANTS for role in roles):
            raise DataError(
                f"{self.where}: row {number}: the conversation has no assistant turn; nothing to train on; found: "
                f"{', '.join(roles)}; expected: an answer, or the row left out"
            )

    def _rendered_all(self, jobs: Sequence[Job]) -> list[str]:
        """One call for all that share their options: half of what one conversation costs is the call."""
        kinds = dict[str, list[int]]()
        for place, (_, _, options) in enumerate(jobs):
            kinds.setdefault(repr(options) if options else "", []).append(place)
        texts = [""] * len(jobs)
        try:
            for places in kinds.values():
                many = rendered_all(self.tokenizer, [jobs[place][1] for place in places], **jobs[places[0]][2])
                for place, text in zip(places, many, strict=True):
                    texts[place] = text
        except Exception:  # of which row, and why, is found out one by one
            return [self._rendered(*job) for job in jobs]
        return texts

    def _rendered(self, number: int, messages: Any, options: Mapping[str, Any]) -> str:
        try:
            return rendered(self.tokenizer, messages, **options)
        except Exception as error:  # a template is a program; it may raise anything
            roles = ", ".join(str(message.get("role")) for message in messages)
            raise DataError(
                f"{self.where}: row {number}: the chat template cannot render the conversation: {error}; found: turns of "
                f"{roles}; expected: turns that the template takes, or another template"
            ) from error

    def _try_as_prompt(self, number: int, messages: Any, whole: str, options: Mapping[str, Any], found: Found) -> None:
        """Whether a rollout that waits for the last turn would see what was trained on before it."""
        if len(messages) < 2 or messages[-1].get("role") not in ASSISTANTS:
            return
        try:
            prompt = rendered(self.tokenizer, messages[:-1], **options, add_generation_prompt=True)
        except Exception:  # TRL renders no such thing; a template may refuse a conversation that ends there
            return
        found.count("prompts tried")
        if not whole.startswith(prompt):
            found.tally("unseen").add(number, what=prompt[_common(prompt, whole) :])

    def _measure(self, number: int, sequences: Sequence[Trained], ids: Any, found: Found) -> None:
        sizes, prompt_sizes = list[int](), list[int]()
        for sequence in sequences:
            if self.columns == ("input_ids",):
                sizes.append(len(sequence.whole))
                continue
            prompt = None if sequence.prompt is None else next(ids)
            whole = next(ids)
            sizes.append(len(whole))
            if self._start is not None and sequence is sequences[0] and list(whole[:2]) == [self._start] * 2:
                found.tally("twice").add(number)
            if prompt is not None:
                common = _common(prompt, whole)
                prompt_sizes.append(common)
                if common < len(prompt) and sequence is sequences[0]:
                    name = "merged" if isinstance(sequence.whole, str) else "unseen"
                    found.tally(name).add(number, what=str(self.tokenizer.decode(list(prompt[common:]))))
        if prompt_sizes and not isinstance(sequences[0].whole, str):
            found.count("prompts tried")
        self._judge(number, sizes, min(prompt_sizes, default=0), found)

    def _judge(self, number: int, sizes: Sequence[int], prompt: int, found: Found) -> None:
        longest, most = max(sizes), self.max_length
        found.measure("", number, longest)
        found.tokens += sum(sizes)
        if most is not None and longest > most:
            masked = self.kind == "dpo" or self.completion_only
            if self.kind == "reward" or (masked and prompt >= most and not self.keeps_end and not self.packing):
                found.tally("dropped").add(number, longest)
                return
            found.tally("long").add(number, sum(max(0, size - most) for size in sizes))
            longest = most
        if self.positions is not None and self.packing != "wrapped" and self._padded(longest) > self.positions.most:
            found.tally("beyond").add(number, what=str(longest))

    def _padded(self, tokens: int) -> int:
        return tokens if self.multiple is None else -(-tokens // self.multiple) * self.multiple


def _common(one: Sequence[Any], other: Sequence[Any]) -> int:
    """Length of the beginning that both have."""
    if one[:] == other[: len(one)]:
        return len(one)
    return next((i for i, (a, b) in enumerate(zip(one, other, strict=False)) if a != b), min(len(one), len(other)))


def _prompt_size(chosen: Sequence[Any], rejected: Sequence[Any]) -> int:
    """How much of two answers is their prompt, as TRL's `extract_prompt` has it."""
    size = _common(chosen, rejected)
    if size == min(len(chosen), len(rejected)):
        return size - 1
    return size - 1 if size and chosen[size - 1] == " " else size
