"""What TRL will make of each row that is trained on: its text, its tokens, and what becomes of them."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from raytrl.errors import DataError
from raytrl.plan.checks.rows import Batch, Found
from raytrl.roles.models.positions import Positions
from raytrl.roles.models.rendering import ASSISTANTS, as_messages, encoded, left_out, rendered, spoken, written

LEFT_OUT = "left out: "  # of a template, by whose
SAID = "said: "
Row = Mapping[str, Any]


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
        texts, special = list[str](), True
        for number, (row, each) in enumerate(zip(rows, sequences, strict=True), first):
            for sequence in each:
                if isinstance(sequence.whole, str):
                    texts += [sequence.whole] if sequence.prompt is None else [sequence.prompt, sequence.whole]
                elif self.columns != ("input_ids",):
                    special = False
            if not special:
                texts += self._conversations(number, row, each, found)
        ids = iter(encoded(self.tokenizer, texts, special))
        for number, each in enumerate(sequences, first):
            self._measure(number, each, ids, found)
        return found

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
        end = self.tokenizer.eos_token
        answer = answer if answer.endswith(end) else answer + end
        return Trained(prompt, (prompt or "") + answer, answer)

    def _conversations(self, number: int, row: Row, sequences: Sequence[Trained], found: Found) -> list[str]:
        """Renders a row's conversations; returns the texts that are tokenised: prompt and whole, or the whole."""
        tools = row.get("tools")
        options = {"tools": json.loads(tools) if isinstance(tools, str) else tools}
        options |= row.get("chat_template_kwargs") or {}
        texts, lost = list[str](), dict[str, tuple[int, str]]()
        for sequence in sequences:
            self._refuse_unanswered(number, sequence)
            whole = self._rendered(number, sequence.whole, options)
            if sequence.prompt is not None:
                texts.append(self._rendered(number, sequence.prompt, {**options, "add_generation_prompt": True}))
            elif self.kind == "sft" and number % self.every == 0:
                self._try_as_prompt(number, sequence.whole, whole, options, found)
            texts.append(whole)
            # What a row's sequences have in common is counted once.
            for whose, said in spoken(sequence.whole if sequence is sequences[0] else sequence.answer):
                found.count(SAID + whose, written(said))
                if (amount := left_out(said, whole)) > 0:
                    lost[whose] = (lost.get(whose, (0, ""))[0] + amount, said)
        for whose, (amount, said) in lost.items():
            found.tally(LEFT_OUT + whose).add(number, amount, said.strip()[:60])
        if (last := sequences[0].whole[-1].get("role")) not in ASSISTANTS:
            found.tally("open").add(number, what=str(last))
        return texts

    def _refuse_unanswered(self, number: int, sequence: Trained) -> None:
        roles = [str(message.get("role")) for message in sequence.answer]
        if not any(role in ASSISTANTS for role in roles):
            raise DataError(
                f"{self.where}: row {number}: the conversation has no assistant turn; nothing to train on; found: "
                f"{', '.join(roles)}; expected: an answer, or the row left out"
            )

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
            start = self.tokenizer.bos_token_id
            if start is not None and sequence is sequences[0] and list(whole[:2]) == [start, start]:
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
