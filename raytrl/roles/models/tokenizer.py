"""Tokenizers: train one on a run's text, and check one before a run starts. Imports no torch."""

import os
from collections.abc import Iterator
from typing import Any

import xxhash
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from raytrl.config.foreign.native import native_fields
from raytrl.config.runs.supervised import SupervisedRun
from raytrl.config.sections.model import TokenizerSpec
from raytrl.errors import ConfigError


def train_tokenizer(texts: Iterator[str], spec: TokenizerSpec) -> PreTrainedTokenizerFast:
    """A byte-level BPE tokenizer: any text can be encoded, none needs an unknown token.

    Raises:
        ConfigError: the text is too small for the vocabulary asked for.
    """
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=spec.vocab_size,
        special_tokens=[spec.pad_token, spec.eos_token, *spec.special_tokens],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    if tokenizer.get_vocab_size() < spec.vocab_size:
        raise ConfigError(
            f"model.tokenizer.vocab_size: the training text gives only {tokenizer.get_vocab_size()} entries; "
            f"found: {spec.vocab_size}; expected: at most that"
        )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        eos_token=spec.eos_token,
        pad_token=spec.pad_token,
        extra_special_tokens=spec.special_tokens,
        clean_up_tokenization_spaces=False,
    )


def load_tokenizer(place: str, revision: str | None, trust_remote_code: bool) -> Any:
    """The tokenizer of a folder or hub id, without importing torch where its files allow that."""
    if os.path.isfile(os.path.join(place, "tokenizer.json")) and not trust_remote_code:
        return PreTrainedTokenizerFast.from_pretrained(place)
    from transformers import AutoTokenizer  # imports torch: 2 s more, so only for the tokenizers that need it

    return AutoTokenizer.from_pretrained(place, revision=revision, trust_remote_code=trust_remote_code)


def identity_of(tokenizer: Any) -> str | None:
    """What its tokens and its template's texts follow from; None where it cannot be told, or they follow from the day."""
    template = str(tokenizer.chat_template)
    if not tokenizer.is_fast or "strftime_now" in template:
        return None
    said = (type(tokenizer).__name__, tokenizer.backend_tokenizer.to_str(), template, tokenizer.special_tokens_map)
    return xxhash.xxh3_128_hexdigest(repr(said).encode())


def turn_end(tokenizer: Any) -> tuple[int, str] | None:
    """The special token that the chat template puts behind an assistant's text, as id and text.

    None: there is no template, or it ends a turn with nothing special, or cannot render two plain turns.
    """
    if not getattr(tokenizer, "chat_template", None):
        return None
    marker = "raytrl"
    try:
        text = tokenizer.apply_chat_template(
            [{"role": "user", "content": "a"}, {"role": "assistant", "content": marker}], tokenize=False
        )
    except Exception:  # a template is a program, and may want other turns than these
        return None
    _, found, after = str(text).rpartition(marker)
    special = {index: str(token) for index, token in tokenizer.added_tokens_decoder.items() if token.special}
    behind = after.lstrip()
    ends = [(index, token) for index, token in special.items() if token and behind.startswith(token)]
    return max(ends, key=lambda end: len(end[1])) if found and ends else None


def check_tokenizer(tokenizer: Any, run: SupervisedRun, conversation: list[dict[str, Any]] | None) -> None:
    """Refuses what would train silently wrong: no template, a template that ends no turn, padding that hides the end.

    Args:
        tokenizer: the run's own.
        run: the run; its `training` may name another template or end token.
        conversation: the messages of the first training row; None where rows are plain text.

    Raises:
        ConfigError: with the token or the rendered text.
    """
    eos = run.training.get("eos_token") or tokenizer.eos_token
    if eos is None:
        raise ConfigError(f"model.tokenizer: has no end token; {_remedy(run, 'eos_token')}")
    if run.training.get("eos_token") and eos not in tokenizer.get_vocab():
        raise ConfigError(f"training.eos_token: found: {eos!r}, which is not in the tokenizer's vocabulary")
    pad = run.training.get("pad_token") or run.model.pad_token or tokenizer.pad_token
    if run.head == "score" and (pad is None or pad == eos):
        raise ConfigError(
            f"model.pad_token: a reward model reads its score at the last token that is not padding, so padding and "
            f"end token must differ; found: pad {pad!r}, end {eos!r}; expected: model.pad_token set to another token, "
            f"such as '<|pad|>' (it is added to the tokenizer)"
        )
    if conversation is not None:
        _check_template(tokenizer, run, conversation, eos)
    if run.training.get("assistant_only_loss"):
        _check_assistant_only(tokenizer, run, conversation)


def _remedy(run: SupervisedRun, name: str) -> str:
    """What to do about an end token or a template; TRL's DPO has no keys for them."""
    if name in native_fields(run.native_class):
        return f"set training.{name}"
    return f"choose a model.tokenizer that has one (raytrl {run.kind} has no training.{name})"


_FROM_HUB = "<hub>"  # TRL fetches it in the worker


def _template(tokenizer: Any, run: SupervisedRun) -> Any:
    """The chat template that rows will be written with; raises FileNotFoundError with the path."""
    path = run.training.get("chat_template_path")
    if path is None:
        return tokenizer.chat_template
    if str(path).endswith((".jinja", ".j2")):
        if not os.path.isfile(path):
            raise FileNotFoundError(path)
        with open(path, encoding="utf-8") as file:
            return file.read()
    return load_tokenizer(path, None, False).chat_template if os.path.isdir(path) else _FROM_HUB


def as_trained(tokenizer: Any, run: SupervisedRun) -> Any | None:
    """The tokenizer as TRL's trainer will have it, changed in place; None where a part of it is on the hub.

    Call it after `check_tokenizer`.
    """
    template = _template(tokenizer, run)
    if template is _FROM_HUB:
        return None
    if run.model.pad_token is not None:
        tokenizer.add_special_tokens({"pad_token": run.model.pad_token})
    if run.training.get("eos_token"):
        tokenizer.eos_token = run.training["eos_token"]
    path = run.training.get("chat_template_path")
    if path is not None and os.path.isdir(path):  # as TRL's `clone_chat_template`
        source = load_tokenizer(path, None, False)
        known = tokenizer.get_vocab()
        tokenizer.add_tokens([t for t in source.added_tokens_decoder.values() if t.content not in known])
        tokenizer.eos_token = source.eos_token
    tokenizer.chat_template = template
    return tokenizer


def _check_assistant_only(tokenizer: Any, run: SupervisedRun, conversation: Any) -> None:
    """TRL can tell the assistant's tokens from the others, and the end of its turn is among them."""
    key = "training.assistant_only_loss"
    if conversation is None:
        raise ConfigError(
            f"{key}: trains on the assistant's turns alone; found: rows that are no conversations; expected: messages, or "
            f"training.completion_only_loss with prompt and completion"
        )
    own, template = tokenizer.chat_template, _template(tokenizer, run)
    if template is _FROM_HUB:
        return
    from trl.chat_template_utils import (  # torch
        get_training_chat_template,
        has_generation_markers,
        is_chat_template_stop_token_trained,
    )

    try:
        tokenizer.chat_template = template
        marked = template if has_generation_markers(template) else get_training_chat_template(tokenizer)
        ends = is_chat_template_stop_token_trained(tokenizer, chat_template=marked)
    except ValueError as error:  # TRL marks the templates that it knows
        raise ConfigError(f"{key}: {str(error).splitlines()[0]}") from None
    finally:
        tokenizer.chat_template = own
    if not ends:
        raise ConfigError(
            f"{key}: the template's {{% generation %}} leaves out the token that ends a turn: a model trained on it never "
            f"learns to stop; expected: that token between {{% generation %}} and {{% endgeneration %}}"
        )


def _check_template(tokenizer: Any, run: SupervisedRun, conversation: list[dict[str, Any]], eos: str) -> None:
    key = (
        "training.chat_template_path" if "chat_template_path" in native_fields(run.native_class) else "model.tokenizer"
    )
    try:
        template = _template(tokenizer, run)
    except FileNotFoundError as error:
        raise ConfigError(f"{key}: no such file; found: {str(error)!r}") from None
    if template is _FROM_HUB:
        return
    if template is None:
        raise ConfigError(
            f"{key}: the rows are conversations, but the tokenizer has no chat template; "
            f"{_remedy(run, 'chat_template_path')}"
        )
    if not any(message["role"] == "assistant" for message in conversation):
        roles = ", ".join(str(message["role"]) for message in conversation)
        raise ConfigError(
            f"data.train: row 1: the conversation has no assistant turn; nothing to train on; found: turns of {roles}"
        )
    try:
        text = tokenizer.apply_chat_template(conversation, chat_template=template, tokenize=False)
    except Exception as error:  # a template is a program; it may raise anything
        raise ConfigError(f"{key}: the template cannot render the first row: {error}") from error
    # Templates such as Llama's strip the content; one that changes it more is judged by all it renders.
    content = str(next(m["content"] for m in reversed(conversation) if m["role"] == "assistant")).strip()
    after = text.rpartition(content)[2] if content else text
    if eos not in after:
        raise ConfigError(
            f"{key}: the template ends no turn: a model trained on it never learns to stop; found: {after!r} after the "
            f"assistant's text; expected: the end token {eos!r} there; if something else ends a turn, "
            f"{_remedy(run, 'eos_token')}"
        )
