"""The peer that `raytrl ppo` is measured against: TRL 1.12's PPOTrainer, in an environment of its own.

python trl_ppo.py FOLDER STEPS SEED OUT     one process; under torchrun, one of several
"""

import gc
import json
import os
import sys
import time
from collections import defaultdict
from collections.abc import Callable
from typing import Any

from datasets import load_dataset
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    TrainerCallback,
)
from trl.experimental.ppo import PPOConfig, PPOTrainer, ppo_trainer

BUSY: dict[str, float] = defaultdict(float)  # seconds so far by phase
STEPS: list[dict[str, float]] = []
LENGTHS: list[float] = []  # mean response length of each batch; empty where responses never end


def timed(phase: str, function: Callable[..., Any]) -> Callable[..., Any]:
    def call(*arguments: Any, **names: Any) -> Any:
        began = time.perf_counter()
        result = function(*arguments, **names)
        BUSY[phase] += time.perf_counter() - began
        return result

    return call


class StepTimes(TrainerCallback):
    def __init__(self) -> None:
        self._since, self._cpu = time.perf_counter(), time.process_time()

    def on_train_begin(self, *_: object, **__: object) -> None:
        self._since, self._cpu = time.perf_counter(), time.process_time()

    def on_step_end(self, *_: object, **__: object) -> None:
        now = time.perf_counter()
        cpu = time.process_time()
        STEPS.append({"step": now - self._since, "cpu": cpu - self._cpu, **BUSY})
        self._since, self._cpu = now, cpu
        BUSY.clear()


def main() -> None:
    folder, steps, seed, out = sys.argv[1], int(sys.argv[2]), int(sys.argv[3]), sys.argv[4]
    with open(f"{folder}/workload.json") as file:
        load = json.load(file)
    world = int(os.environ.get("WORLD_SIZE", "1"))
    tokenizer = AutoTokenizer.from_pretrained(f"{folder}/policy", padding_side="left")
    rows = load_dataset("json", data_files=f"{folder}/prompts.jsonl", split="train")
    rows = rows.map(lambda row: {"input_ids": tokenizer(row["prompt"])["input_ids"]}, remove_columns=rows.column_names)
    value = AutoModelForSequenceClassification.from_pretrained(f"{folder}/reward", num_labels=1)
    reward = AutoModelForSequenceClassification.from_pretrained(f"{folder}/reward", num_labels=1)
    ppo_trainer.batch_generation = timed("generate", ppo_trainer.batch_generation)
    ppo_trainer.get_reward = timed("values and scores", ppo_trainer.get_reward)
    truncate = ppo_trainer.truncate_response

    def truncated(*arguments: Any) -> Any:
        responses = truncate(*arguments)
        LENGTHS.append(float((responses != tokenizer.pad_token_id).sum(1).float().mean()))
        return responses

    ppo_trainer.truncate_response = truncated
    ppo_trainer.gc.collect = timed("garbage collection", gc.collect)
    trainer = PPOTrainer(
        args=PPOConfig(
            output_dir=f"{out}.scratch",
            total_episodes=steps * load["batch_size"],
            per_device_train_batch_size=load["batch_size"] // world,
            gradient_accumulation_steps=1,
            num_mini_batches=load["minibatches"],
            num_ppo_epochs=load["epochs"],
            local_rollout_forward_batch_size=load["batch_size"] // world,
            response_length=load["max_new_tokens"],
            stop_token="eos" if load["ends"] else None,
            temperature=1.0,
            learning_rate=load["learning_rate"],
            num_sample_generations=0,
            save_strategy="no",
            report_to=[],
            use_cpu=True,
            bf16=False,
            disable_tqdm=True,
            dataloader_pin_memory=False,
            seed=seed,
        ),
        processing_class=tokenizer,
        model=AutoModelForCausalLM.from_pretrained(f"{folder}/policy"),
        ref_model=AutoModelForCausalLM.from_pretrained(f"{folder}/policy"),
        reward_model=reward,
        value_model=value,
        train_dataset=rows,
        callbacks=[StepTimes()],
    )
    logged: list[dict[str, float]] = []
    trainer.log = lambda metrics, *_, **__: logged.append(dict(metrics))
    trainer.accelerator.backward = timed("backward", trainer.accelerator.backward)
    trainer.optimizer.step = timed("optimizer", trainer.optimizer.step)
    trainer.train()
    with open(f"{out}.{os.environ.get('RANK', '0')}", "w") as file:
        json.dump({"steps": STEPS, "metrics": logged, "lengths": LENGTHS}, file)


main()
