"""Tiny real classifiers with real tokenizers, and (prompt, response) pairs."""

import os

os.environ.setdefault("HF_HUB_OFFLINE", "1")

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from raytrl.records.samples import Message, Prompt, Response

TEXTS = [
    "The plot was moving and the music felt clever.",
    "A dull, clumsy western with an awful ending!",
    "user: did you like it? assistant: I found it rather charming.",
]
CHAT_TEMPLATE = (
    "{% for m in messages %}<|{{ m['role'] }}|>{{ m['content'] }}<eos>\n{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)


@pytest.fixture(autouse=True)
def _short_pauses(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("raytrl.roles.reward.call._FIRST_PAUSE_S", 0.01)


@pytest.fixture
def pair() -> Callable[..., tuple[Prompt, Response]]:
    def make(
        prompt: str | list[Message],
        completion: str,
        /,
        row: int = 0,
        ended: bool = True,
        sample: int = 0,
        **columns: Any,
    ) -> tuple[Prompt, Response]:
        return (
            Prompt(step=7, row=row, text=prompt, token_ids=(1, 2), columns=columns),
            Response(
                step=7,
                row=row,
                sample=sample,
                token_ids=(5, 6, 7),
                text=completion,
                ended=ended,
                sampling_logprobs=(-0.1, -0.2, -0.3),
                policy_version=7,
            ),
        )

    return make


def save_tokenizer(folder: Path, vocab_size: int, pad: str, template: str | None = None) -> Any:
    """A byte-level BPE trained here on TEXTS; `<eos>` is id 0, `<pad>` id 1."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    bytes_first = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = bytes_first
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=["<eos>", "<pad>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(TEXTS, trainer)
    make: Any = PreTrainedTokenizerFast  # untyped in transformers
    fast = make(tokenizer_object=tokenizer, eos_token="<eos>", pad_token=pad)
    fast.chat_template = template
    fast.save_pretrained(folder)
    return fast


def save_classifier(
    folder: Path, vocab_size: int = 300, pad: str = "<pad>", config_pad: Any = "same", **more: Any
) -> Path:
    """A random GPT-2 classifier with large weights, so that every token matters to the score."""
    import torch
    from transformers import GPT2Config, GPT2ForSequenceClassification

    tokenizer = save_tokenizer(folder, vocab_size, pad, more.pop("template", CHAT_TEMPLATE))
    torch.manual_seed(len(tokenizer))
    config = GPT2Config(
        **{"num_labels": 1, "n_positions": 64, "initializer_range": 0.3}
        | {"vocab_size": len(tokenizer), "n_embd": 16, "n_layer": 2, "n_head": 2, "bos_token_id": None}
        | {"eos_token_id": 0, "pad_token_id": tokenizer.pad_token_id if config_pad == "same" else config_pad}
        | more
    )
    GPT2ForSequenceClassification(config).save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def classifier(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., str]:
    """Path of a saved classifier with the given properties, made once a session."""
    made: dict[str, str] = {}

    def get(**properties: Any) -> str:
        key = repr(sorted(properties.items()))
        if key not in made:
            made[key] = str(save_classifier(tmp_path_factory.mktemp("classifier"), **properties))
        return made[key]

    return get
