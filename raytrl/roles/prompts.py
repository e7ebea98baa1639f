"""PPO's prompts: dataset rows as token ids, in an order that follows from (seed, step, row) alone."""

import functools
import random
from collections.abc import Sequence
from typing import Any

from raytrl.config.sections.rollout import RolloutSection
from raytrl.errors import ConfigError, DataError
from raytrl.records.samples import Message, Prompt, PromptText


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
        self._max_tokens, self._cuts = rollout.max_prompt_length, rollout.long_prompts == "cut"

    def __len__(self) -> int:
        return len(self._dataset)

    def prompt(self, index: int, step: int, row: int) -> Prompt:
        """Dataset row `index` as prompt `row` of a step.

        Raises:
            DataError: naming the dataset row; it is empty, or too long where that is refused.
        """
        columns = dict(self._dataset[index])
        text = columns.pop("prompt")
        token_ids = self.token_ids(text, index)
        if len(token_ids) > self._max_tokens:
            token_ids = token_ids[-self._max_tokens :]
            text = self._seen(text, token_ids, index)
        return Prompt(step, row, text, token_ids, columns)

    def _seen(self, text: PromptText, kept: Sequence[int], index: int) -> PromptText:
        """What is left of a prompt that is cut: reward sources read no more than the policy does."""
        whole = text if isinstance(text, str) else self._rendered(text, index)
        if self._tokenizer.is_fast:
            encoded = self._tokenizer(whole, add_special_tokens=isinstance(text, str), return_offsets_mapping=True)
            start = int(encoded["offset_mapping"][-len(kept)][0])
        else:  # these do not know where their tokens stand
            start = max(0, len(whole) - len(self._tokenizer.decode(kept)))
        return text[start:] if isinstance(text, str) else last_messages(text, whole, start)

    def token_ids(self, text: PromptText, index: int) -> tuple[int, ...]:
        """The whole prompt, before it is cut."""
        if isinstance(text, str):
            ids = self._tokenizer(text)["input_ids"]
        else:
            rendered = self._rendered(text, index)
            ids = self._tokenizer(rendered, add_special_tokens=False)["input_ids"]
        if not ids:
            raise DataError(f"{self._where}: row {index + 1}: the prompt has no tokens; found: {str(text)[:80]!r}")
        if len(ids) > self._max_tokens and not self._cuts:
            raise DataError(
                f"{self._where}: row {index + 1}: the prompt is too long; found: {len(ids)} tokens; expected: at most "
                f"{self._max_tokens} (rollout.max_prompt_length), or rollout.long_prompts: cut"
            )
        return tuple(ids)

    def _rendered(self, messages: Sequence[Any], index: int) -> str:
        ends_in_answer = messages[-1]["role"] == "assistant"  # then the response goes on with it, as in TRL
        try:
            text = self._tokenizer.apply_chat_template(
                list(messages),
                tokenize=False,
                add_generation_prompt=not ends_in_answer,
                continue_final_message=ends_in_answer,
            )
        except Exception as error:  # a template is a program; it may raise anything
            raise DataError(
                f"{self._where}: row {index + 1}: the chat template cannot render the prompt: {error}"
            ) from error
        return str(text)


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


def check_prompts(table: PromptTable, tokenizer: Any, where: str) -> tuple[int, int]:
    """Goes through every prompt before anything is started.

    Returns:
        Tokens of the longest prompt before cutting, and how many prompts are cut.

    Raises:
        ConfigError: the tokenizer has no end token, no chat template for conversations, or ends every prompt.
        DataError: a prompt that cannot be used, with its row.
    """
    if tokenizer.eos_token_id is None:
        raise ConfigError(
            "model.tokenizer: has no end token, so no response would ever end; expected: one with eos_token"
        )
    if not isinstance(table._dataset[0]["prompt"], str) and not tokenizer.chat_template:
        raise ConfigError(
            f"model.tokenizer: {where} has conversations, but the tokenizer has no chat template; expected: one that "
            f"has, or prompts that are strings"
        )
    if tokenizer("a")["input_ids"][-1:] == [tokenizer.eos_token_id]:
        raise ConfigError("model.tokenizer: puts its end token behind every prompt, so the policy would go on after it")
    lengths = [len(table.token_ids(text, i)) for i, text in enumerate(table._dataset["prompt"])]
    return max(lengths), sum(length > table._max_tokens for length in lengths)


def max_positions(model_path: str, trust_remote_code: bool) -> int | None:
    """The longest sequence that a model takes; None where its config does not say."""
    from transformers import AutoConfig

    config = AutoConfig.from_pretrained(model_path, trust_remote_code=trust_remote_code).get_text_config()
    return getattr(config, "max_position_embeddings", None)


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
