"""What both PPO trainers of the comparison get: models, tokenizer, prompts and sizes, in one folder."""

import json
import random
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    GPT2Config,
    LlamaConfig,
    PreTrainedConfig,
    PreTrainedTokenizerFast,
)

VOCABULARY, PAD, EOS = 512, 0, 1
SIZES = ("1m", "6m")
WORKLOAD = {
    "batch_size": 64,
    "epochs": 4,
    "minibatches": 4,
    "max_new_tokens": 48,
    "learning_rate": 1e-5,
}
_ENDS_AFTER = 24  # words, on average, where responses end by themselves


def make(folder: Path, size: str, ends: bool) -> None:
    """Writes policy/, reward/, prompts.jsonl and workload.json; nothing where they are there."""
    if (folder / "workload.json").is_file():
        return
    folder.mkdir(parents=True, exist_ok=True)
    vocabulary = {"<pad>": PAD, "<end>": EOS} | {f"w{i}": i for i in range(2, VOCABULARY)}
    backend = Tokenizer(models.WordLevel(vocabulary, unk_token="<pad>"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, pad_token="<pad>", eos_token="<end>")
    torch.manual_seed(0)
    policy = AutoModelForCausalLM.from_config(_config(size))
    if ends:
        _teach_to_end(policy)
    config = _config(size)
    config.num_labels = 1
    reward = AutoModelForSequenceClassification.from_config(config)
    for model, name in ((policy, "policy"), (reward, "reward")):
        model.save_pretrained(folder / name)
        tokenizer.save_pretrained(folder / name)
    rng = random.Random(0)
    rows = [" ".join(f"w{rng.randrange(2, VOCABULARY)}" for _ in range(rng.randint(8, 24))) for _ in range(2048)]
    (folder / "prompts.jsonl").write_text("".join(json.dumps({"prompt": row}) + "\n" for row in rows))
    count = sum(p.numel() for p in policy.parameters())
    (folder / "workload.json").write_text(json.dumps({**WORKLOAD, "ends": ends, "parameters": count}))


def _config(size: str) -> PreTrainedConfig:
    common: dict[str, Any] = {"vocab_size": VOCABULARY, "bos_token_id": None, "eos_token_id": EOS, "pad_token_id": PAD}
    if size == "1m":
        return GPT2Config(n_positions=128, n_embd=128, n_layer=4, n_head=4, **common)
    return LlamaConfig(
        hidden_size=256,
        intermediate_size=640,
        num_hidden_layers=8,
        num_attention_heads=8,
        max_position_embeddings=128,
        **common,
    )


def _teach_to_end(model: torch.nn.Module, steps: int = 40) -> None:
    """A little training on random words, each the last one with probability 1 / _ENDS_AFTER."""
    optimizer = torch.optim.Adam(model.parameters(), lr=2e-3)
    for _ in range(steps):
        words = torch.randint(2, VOCABULARY, (16, 32))
        labels = torch.where(torch.rand(words.shape) < 1 / _ENDS_AFTER, EOS, words)
        loss = model(input_ids=words, labels=labels).loss  # an end teaches only where it may come, it is never read
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
