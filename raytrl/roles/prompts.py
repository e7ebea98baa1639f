"""PPO's prompts: dataset rows as token ids, in an order that follows from (seed, step, row) alone."""

import functools
import random
from collections.abc import Sequence
from typing import Any

from raytrl.config.sections.rollout import RolloutSection
from raytrl.errors import DataError
from raytrl.records.samples import Message, Prompt, PromptText
from raytrl.roles.models.rendering import encoded, rendered, rendered_all

NO_PROMPT: PromptText = [{"role": "user", "content": ""}]  # where an environment's reset says it all, as in TRL


class PromptTable:
    """The prompts of one dataset, tokenised when they are asked for."""

    def __init__(self, dataset: Any, tokenizer: Any, rollout: RolloutSection, where: str) -> None:
        """
        Args:
            dataset: rows with `prompt`: a string, or a list of messages with role and content.
            tokenizer: the policy's.
            rollout: what is done with prompts that are too long.
            where: the dataset's key, for error messages.
        """
        self._dataset, self._tokenizer, self._where = dataset, tokenizer, where
        self._converses = rollout.converses
        self.cuts = rollout.long_prompts == "cut"
        self.max_tokens = rollout.max_prompt_length

    def __len__(self) -> int:
        return len(self._dataset)

    def prompt(self, index: int, step: int, row: int) -> Prompt:
        """Dataset row `index` as prompt `row` of a step.

        Raises:
            DataError: naming the dataset row; it is empty, or too long where that is refused.
        """
        columns = dict(self._dataset[index])
        if (
            self._converses
        ):  # its tokens are known where the tools are, and an environment's reset is given the whole row
            return Prompt(step, row, columns.get("prompt", NO_PROMPT), (), columns)
        text = columns.pop("prompt")
        token_ids = self.token_ids(text, index)
        return Prompt(step, row, self.seen(text, token_ids, index), token_ids[-self.max_tokens :], columns)

    def seen(self, text: PromptText, token_ids: Sequence[int], index: int) -> PromptText:
        """What is left of a prompt with so many tokens: reward sources read no more than the policy does."""
        if len(token_ids) <= self.max_tokens:
            return text
        kept, whole = token_ids[-self.max_tokens :], text if isinstance(text, str) else self.rendered(text, index)
        if self._tokenizer.is_fast:
            encoded = self._tokenizer(whole, add_special_tokens=isinstance(text, str), return_offsets_mapping=True)
            start = int(encoded["offset_mapping"][-len(kept)][0])
        else:  # these do not know where their tokens stand
            start = max(0, len(whole) - len(self._tokenizer.decode(kept)))
        return text[start:] if isinstance(text, str) else last_messages(text, whole, start)

    def token_ids(self, text: PromptText, index: int) -> tuple[int, ...]:
        """The whole prompt, before it is cut."""
        return self.token_ids_of([text], self.texts_of([text], index), index)[0]

    def texts_of(self, prompts: Sequence[PromptText], first: int) -> list[str]:
        """What is tokenised of rows from `first` on, all of them strings or all of them messages."""
        texts = [prompt if isinstance(prompt, str) else "" for prompt in prompts]
        conversations = [(place, prompt) for place, prompt in enumerate(prompts) if not isinstance(prompt, str)]
        try:
            for ends_in_answer, options in _AS_PROMPT.items():
                chosen = [(place, turns) for place, turns in conversations if _ends_in_answer(turns) == ends_in_answer]
                if chosen:
                    many = rendered_all(self._tokenizer, [turns for _, turns in chosen], **options)
                    for (place, _), text in zip(chosen, many, strict=True):
                        texts[place] = text
        except Exception:  # of which row, and why, is found out one by one
            return [p if isinstance(p, str) else self.rendered(p, i) for i, p in enumerate(prompts, first)]
        return texts

    def token_ids_of(self, prompts: Sequence[PromptText], texts: Sequence[str], first: int) -> list[tuple[int, ...]]:
        """Those of many, of which `texts_of` gave the texts."""
        many = [tuple(ids) for ids in encoded(self._tokenizer, texts, isinstance(prompts[0], str))]
        for index, (text, ids) in enumerate(zip(prompts, many, strict=True), first):
            if not ids:
                raise DataError(f"{self._where}: row {index + 1}: the prompt has no tokens; found: {str(text)[:80]!r}")
            if len(ids) > self.max_tokens and not self.cuts:
                raise DataError(
                    f"{self._where}: row {index + 1}: the prompt is too long; found: {len(ids)} tokens; expected: at most "
                    f"{self.max_tokens} (rollout.max_prompt_length), or rollout.long_prompts: cut"
                )
        return many

    def rendered(self, messages: Sequence[Any], index: int) -> str:
        try:
            return rendered(self._tokenizer, messages, **_AS_PROMPT[_ends_in_answer(messages)])
        except Exception as error:  # a template is a program; it may raise anything
            raise DataError(
                f"{self._where}: row {index + 1}: the chat template cannot render the prompt: {error}"
            ) from error


# Where the last turn is the assistant's the response goes on with it, as in TRL.
_AS_PROMPT = {False: {"add_generation_prompt": True}, True: {"continue_final_message": True}}


def _ends_in_answer(messages: Sequence[Any]) -> bool:
    return bool(messages[-1]["role"] == "assistant")


def last_messages(messages: Sequence[Message], rendered: str, start: int) -> list[Message]:
    """The messages that stand in `rendered[start:]`; of one that begins before it, what is behind.

    A message whose content the template changed cannot be found: it counts as seen where the one before it is.
    """
    seen: list[Message] = []
    end = len(rendered)
    for message in reversed(messages):
        content = message.get("content")
        content = content.strip() if isinstance(content, str) else ""
        place = rendered.rfind(content, 0, end) if content else -1
        if place < 0 and end <= start:
            break
        if place >= 0:
            if place + len(content) <= start:
                break
            end = place
            if place < start:
                return [{**message, "content": content[start - place :]}, *seen]
        seen.insert(0, message)
    return seen


class PromptOrder:
    """Which dataset row is prompt `row` of a step: a permutation an epoch, drawn from (seed, epoch).

    There is no cursor to lose: step and row say it all, whatever the number of workers.
    """

    def __init__(self, size: int, per_step: int, seed: int) -> None:
        self._size, self._per_step = size, per_step
        # Two epochs: a step may hold the end of one and the start of the next.
        self._permutation = functools.lru_cache(maxsize=2)(functools.partial(_permutation, seed, size))

    def index(self, step: int, row: int) -> int:
        epoch, place = divmod(step * self._per_step + row, self._size)
        return self._permutation(epoch)[place]


def _permutation(seed: int, size: int, epoch: int) -> list[int]:
    order = list(range(size))
    random.Random(f"prompts {seed} {epoch}").shuffle(order)
    return order


class SharedPrompts:
    """One learner worker's share of each step's prompts (`loop.protocols.PromptSource`).

    A share is a run of whole chunks, so which prompts are sampled together is the same for every number of workers.
    """

    def __init__(
        self,
        train: PromptTable,
        evaluation: PromptTable | None,
        *,
        per_step: int,
        eval_rows: int,
        chunk_prompts: int,
        seed: int,
        rank: int,
        world_size: int,
    ) -> None:
        self._train, self._evaluation = train, evaluation
        self._order = PromptOrder(len(train), per_step, seed)
        self._chunk_prompts, self._rank, self._world_size = chunk_prompts, rank, world_size
        self._rows = self._share(per_step)
        self._eval_rows = self._share(min(eval_rows, len(evaluation))) if evaluation is not None else range(0)

    def next(self, step: int) -> list[Prompt]:
        return [self._train.prompt(self._order.index(step, row), step, row) for row in self._rows]

    def evaluation(self, step: int) -> list[Prompt]:
        """The first rows of the evaluation data, the same at every evaluation."""
        if self._evaluation is None:
            return []
        return [self._evaluation.prompt(row, step, row) for row in self._eval_rows]

    def _share(self, rows: int) -> range:
        num_chunks = -(-rows // self._chunk_prompts)
        first, last = (num_chunks * r // self._world_size for r in (self._rank, self._rank + 1))
        return range(first * self._chunk_prompts, min(last * self._chunk_prompts, rows))
