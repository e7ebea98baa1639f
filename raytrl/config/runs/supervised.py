"""The run files of `raytrl sft`, `reward` and `dpo`: one TRL trainer on Ray Train workers."""

import math
from typing import Any, ClassVar, Literal

from pydantic import Field, field_validator, model_validator

from raytrl.config.foreign.deepspeed import check_deepspeed
from raytrl.config.foreign.native import (
    TRAINING_CLASSES,
    NativeClass,
    check_values,
    native_default,
    native_fields,
)
from raytrl.config.renamed import OWNED, unknown_key
from raytrl.config.runs.base import TrainingRun, or_raise


class SupervisedRun(TrainingRun):
    """SFT, reward modelling or DPO: one TRL trainer on Ray Train workers."""

    training: dict[str, Any] = Field(default={})
    """Fields of TRL's config class for this kind: SFTConfig, RewardConfig or DPOConfig."""

    native_class: ClassVar[NativeClass]

    @field_validator("training", mode="after")
    @classmethod
    def _native_training(cls, training: dict[str, Any]) -> dict[str, Any]:
        problems = [f"{key}: is set by {OWNED[key]}" for key in training if key in OWNED]
        # YAML reads a bare `no` as false; the strategies mean the word.
        training = {
            key: "no" if value is False and key.endswith("_strategy") else value
            for key, value in training.items()
            if key not in OWNED
        }
        known = native_fields(cls.native_class)
        problems += [unknown_key("", k, set(known) - set(OWNED)) for k in training if k not in known]
        problems += [p.removeprefix(".") for p in check_values("", cls.native_class, training)]
        return or_raise(problems, training)

    def native(self, name: str) -> Any:
        """A field of `training`, or TRL's default for it."""
        return self.training[name] if name in self.training else native_default(self.native_class, name)

    @property
    def rows_a_pass(self) -> int:
        """Rows of one worker's forward pass."""
        return int(self.native("per_device_train_batch_size"))

    @property
    def accumulated(self) -> int:
        """Forward passes of one worker to an optimizer step, when there are `learner.max_workers`."""
        return int(self.native("gradient_accumulation_steps"))

    @property
    def recompute(self) -> Any:
        """`training`'s switch for recomputed activations, under its new name or its old one; TRL's default is on."""
        names = ("activation_checkpointing", "gradient_checkpointing")
        return next((self.training[name] for name in names if name in self.training), True)

    def accumulation(self, world_size: int) -> int:
        """Microbatches that a worker adds up to a step when there are so many workers.

        The rows of a step are those of `learner.max_workers` workers: an elastic run has the same batches, in the same
        order, however many workers it has at the moment.
        """
        return self.accumulated * self.learner.max_workers // world_size

    @model_validator(mode="after")
    def _agreement(self) -> "SupervisedRun":
        problems = []
        steps = self.accumulated
        counts = range(self.learner.min_workers, self.learner.max_workers + 1)
        if any(steps * self.learner.max_workers % count for count in counts):
            least = math.lcm(*counts) // math.gcd(math.lcm(*counts), self.learner.max_workers)
            problems.append(
                f"learner.workers: found: {list(counts)[:: len(counts) - 1]} with training.gradient_accumulation_steps "
                f"{steps}; an elastic run keeps its batch by accumulating more on fewer workers, and "
                f"{steps} x {counts[-1]} cannot be shared evenly by each number of workers in between; expected: "
                f"gradient_accumulation_steps a multiple of {least}, or other workers"
            )
        if self.learner.deepspeed is not None:
            problems += check_deepspeed(
                self.learner.deepspeed, self.training, self.native_class, self.learner.max_workers
            )
        strategy = self.training.get("eval_strategy", "no")
        if strategy != "no" and self.data.eval is None:
            problems.append(
                f"training.eval_strategy: is {strategy!r}, but data.eval is missing: nothing to evaluate on"
            )
        if self.training.get("bf16") and self.training.get("fp16"):
            problems.append("training.fp16: is on, and so is training.bf16; choose one")
        if self.training.get("fp16") and not self.learner.uses_gpu:
            problems.append(
                "training.fp16: needs a GPU; found: learner.resources without GPU; expected: bf16 or float32"
            )
        if not self.learner.uses_gpu and self.training.get("tf32"):
            problems.append("training.tf32: does nothing without a GPU; found: learner.resources without GPU")
        or_raise(problems, None)
        return self


class SftRun(SupervisedRun):
    """Supervised fine-tuning."""

    kind: Literal["sft"] = "sft"
    """Supervised fine-tuning with TRL's SFTTrainer."""
    native_class: ClassVar[NativeClass] = TRAINING_CLASSES["sft"]


class RewardRun(SupervisedRun):
    """Reward modelling."""

    kind: Literal["reward"] = "reward"
    """A reward model from preference pairs, with TRL's RewardTrainer."""
    native_class: ClassVar[NativeClass] = TRAINING_CLASSES["reward"]


class DpoRun(SupervisedRun):
    """Direct preference optimisation."""

    kind: Literal["dpo"] = "dpo"
    """Direct preference optimisation with TRL's DPOTrainer."""
    native_class: ClassVar[NativeClass] = TRAINING_CLASSES["dpo"]
