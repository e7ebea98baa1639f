"""The peer of `grpo_against_trl`: TRL's GRPOTrainer as its documentation uses it, timed step by step.

python trl_grpo.py FOLDER STEPS SEED OUT     one process; under torchrun, one of several
"""

import json
import os
import sys
import time
from pathlib import Path
from typing import Any

import torch
from datasets import load_dataset
from transformers import AutoTokenizer, TrainerCallback
from trl import GRPOConfig, GRPOTrainer

GROUP = 8


class StepTimes(TrainerCallback):  # type: ignore[misc]
    def __init__(self) -> None:
        self.ends: list[tuple[float, float]] = []

    def on_step_end(self, *_: Any, **__: Any) -> None:
        self.ends.append((time.time(), time.process_time()))


def low_words(completions: list[str], **columns: Any) -> list[float]:
    """The share of words below w256: what `grpo_against_trl` asks of raytrl, too."""
    return [sum(int(word[1:]) < 256 for word in text.split()) / max(1, len(text.split())) for text in completions]


def main() -> None:
    folder, steps, seed, out = sys.argv[1:]
    world, rank = int(os.environ.get("WORLD_SIZE", "1")), int(os.environ.get("RANK", "0"))
    torch.set_num_threads(max(1, 2 // world))
    work = json.loads(Path(folder, "workload.json").read_text())
    times = StepTimes()
    trainer = GRPOTrainer(
        model=f"{folder}/policy",
        reward_funcs=low_words,
        args=GRPOConfig(
            output_dir=f"{out}.scratch",
            max_steps=int(steps),
            per_device_train_batch_size=work["batch_size"] // world,
            num_generations=GROUP,
            max_completion_length=work["max_new_tokens"],
            learning_rate=work["grpo_learning_rate"],
            logging_steps=1,
            save_strategy="no",
            report_to=[],
            use_cpu=True,
            bf16=False,
            gradient_checkpointing=False,
            dataloader_pin_memory=False,
            disable_tqdm=True,
            seed=int(seed),
        ),
        train_dataset=load_dataset("json", data_files=f"{folder}/prompts.jsonl", split="train"),
        processing_class=AutoTokenizer.from_pretrained(f"{folder}/policy"),
        callbacks=[times],
    )
    trainer.train()
    rows = [row for row in trainer.state.log_history if "reward" in row]
    result = {
        "step": [b[0] - a[0] for a, b in zip(times.ends, times.ends[1:], strict=False)],
        "cpu": [b[1] - a[1] for a, b in zip(times.ends, times.ends[1:], strict=False)],
        "reward": [row["reward"] for row in rows],
        "length": [row["completions/mean_length"] for row in rows],
    }
    Path(f"{out}.{rank}").write_text(json.dumps(result))


main()
