"""A small PPO run: a llama of random weights, and a rule that likes what could be words."""

from pathlib import Path
from typing import Any

from tests.runs import TINY_LLAMA, WORDS, text_rows, write_rows, write_run_file

RULE = '''
def spelling(completions, **columns):
    """The share of letters in a completion."""
    return [sum(letter.isascii() and letter.isalpha() for letter in text) / max(1, len(text)) for text in completions]
'''


def make_policy(folder: Path, family: str = "llama", head_size: int | None = None, spread: float = 0.2) -> str:
    """Writes a model and its tokenizer; the same weights each time. vLLM's CPU attention wants heads of 32 or more."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    from raytrl.config.sections.model import TokenizerSpec
    from raytrl.roles.models.tokenizer import train_tokenizer

    tokenizer = train_tokenizer(iter([" " + " ".join(WORDS)] * 50), TokenizerSpec(vocab_size=300))
    torch.manual_seed(0)
    values = {key: value for key, value in TINY_LLAMA.items() if key != "model_type"}
    if head_size is not None:
        values["hidden_size"] = head_size * TINY_LLAMA["num_attention_heads"]
    if family == "gpt2":
        values = {"n_embd": values["hidden_size"], "n_layer": 2, "n_head": 2, "n_positions": 128}
    config = AutoConfig.for_model(
        family,
        vocab_size=len(tokenizer),
        initializer_range=spread,
        bos_token_id=tokenizer.eos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        **values,
    )
    AutoModelForCausalLM.from_config(config).save_pretrained(folder / "policy")
    tokenizer.save_pretrained(folder / "policy")
    return str(folder / "policy")


def make_files(folder: Path) -> None:
    """Model, prompts and reward rule of every run in the folder."""
    make_policy(folder)
    write_rows(folder / "prompts.jsonl", [{"prompt": row["text"], "topic": "film"} for row in text_rows(40)])
    (folder / "rule.py").write_text(RULE)


def ppo_file(folder: Path, name: str, **sections: Any) -> str:
    """Writes a small run file (2 learners, 2 rollout actors, 8 steps); keyword arguments extend its sections."""
    values: dict[str, Any] = {
        "kind": "ppo",
        "name": name,
        "output_dir": str(folder / "runs"),
        "model": {"path": str(folder / "policy")},
        "data": {"train": str(folder / "prompts.jsonl")},
        "learner": {"workers": 2, "resources": {"CPU": 0.25}},
        "rollout": {
            "engine": "transformers",
            "actors": 2,
            "resources": {"CPU": 0.5},
            "sampling": {"max_new_tokens": 8},
            "chunk_prompts": 4,
        },
        "reward": {
            "resources": {"CPU": 0.5},
            "sources": [{"name": "spelling", "function": f"{folder}/rule.py:spelling"}],
        },
        "ppo": {"steps": 8, "batch_size": 16, "epochs": 2, "minibatches": 2, "learning_rate": 1e-2},
        "checkpoint": {"every": 2},
        "report_to": [],
    }
    return write_run_file(folder, name, values, sections)
