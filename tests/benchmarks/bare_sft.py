"""The peer that `raytrl sft` is measured against: TRL's SFTTrainer as its own documentation uses it.

python bare_sft.py BASE TRAIN STEPS OUT     one process; under torchrun, one of several
"""

import json
import os
import resource
import sys
import time

STARTED = time.time()

from datasets import load_dataset  # noqa: E402
from transformers import AutoTokenizer, TrainerCallback  # noqa: E402
from trl import SFTConfig, SFTTrainer  # noqa: E402


class StepTimes(TrainerCallback):
    def __init__(self) -> None:
        self.ends: list[float] = []

    def on_step_end(self, *_: object, **__: object) -> None:
        self.ends.append(time.time())


def main() -> None:
    base, train, steps, out = sys.argv[1:]
    times = StepTimes()
    trainer = SFTTrainer(
        model=base,
        args=SFTConfig(
            output_dir=f"{out}.scratch",
            max_steps=int(steps),
            per_device_train_batch_size=16,
            learning_rate=2e-3,
            max_length=96,
            logging_steps=1,
            save_strategy="no",
            report_to=[],
            use_cpu=True,
            bf16=False,
            activation_checkpointing=False,
            gradient_checkpointing=False,
            dataloader_pin_memory=False,
            disable_tqdm=True,
            seed=0,
        ),
        train_dataset=load_dataset("json", data_files=train, split="train"),
        processing_class=AutoTokenizer.from_pretrained(base),
        callbacks=[times],
    )
    trainer.train()
    if int(os.environ.get("RANK", "0")) == 0:
        result = {
            "first_step_s": times.ends[0] - STARTED,
            "step_s": [b - a for a, b in zip(times.ends, times.ends[1:], strict=False)],
            "peak_gib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20,
        }
        with open(out, "w") as file:
            json.dump(result, file)


main()
