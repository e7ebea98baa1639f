"""The run files of `raytrl sft`, `reward` and `dpo`: one TRL trainer on Ray Train workers."""

import math
from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import Any, ClassVar, Literal

from pydantic import Field, field_validator, model_validator

from raytrl.config.foreign.deepspeed import check_deepspeed, zero_stage
from raytrl.config.foreign.native import NativeClass, check_values, native_default, native_fields
from raytrl.config.renamed import OWNED, unknown_key
from raytrl.config.runs.base import Columns, Head, ModelUse, Processes, RowKind, TrainingRun, or_raise

OF_TEMPLATES: Columns = ("tools", "chat_template_kwargs")  # what TRL hands to the chat template beside the messages

_STRATEGIES = ("no", "steps", "epoch")


class SupervisedRun(TrainingRun):
    """SFT, reward modelling or DPO: one TRL trainer on Ray Train workers."""

    launcher: ClassVar[str] = "raytrl.launch.runs.supervised:SupervisedKind"
    row_checks: ClassVar[str] = "raytrl.plan.checks.supervised:try_data"
    native_class: ClassVar[NativeClass]
    head: ClassVar[Head] = "causal"  # of the network
    sequences_a_row: ClassVar[int] = 1

    training: dict[str, Any] = Field(default={})
    """Fields of TRL's config class for this kind: SFTConfig, RewardConfig or DPOConfig."""

    @field_validator("training", mode="after")
    @classmethod
    def _native_training(cls, training: dict[str, Any]) -> dict[str, Any]:
        problems = [f"{key}: is set by {OWNED[key]}" for key in training if key in OWNED]
        training = {key: value for key, value in training.items() if key not in OWNED}
        known = native_fields(cls.native_class)
        problems += [unknown_key("", k, set(known) - set(OWNED)) for k in training if k not in known]
        problems += [p.removeprefix(".") for p in check_values("", cls.native_class, training)]
        if not problems:
            problems += _no_steps(training)
        for key in ("eval_strategy", "logging_strategy"):
            if isinstance(value := training.get(key, "no"), str) and value not in _STRATEGIES:
                problems.append(f"{key}: found: {value!r}; expected: {' | '.join(_STRATEGIES)}")
        return or_raise(problems, training)

    @classmethod
    def foreign(cls) -> Mapping[str, NativeClass]:
        return {**super().foreign(), "training": cls.native_class}

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
        if self.model.dtype == "bfloat16" and self.training.get("bf16") is False and self.holds_float32:
            problems.append(
                "training.bf16: is off, and model.dtype is bfloat16: the run would hold its weights in float32 and compute so, "
                "too; expected: training.bf16 left out, or model.dtype=float32"
            )
        if self.training.get("fp16") and not self.learner.uses_gpu:
            problems.append(
                "training.fp16: needs a GPU; found: learner.resources without GPU; expected: bf16 or float32"
            )
        if not self.learner.uses_gpu and self.training.get("tf32"):
            problems.append("training.tf32: does nothing without a GPU; found: learner.resources without GPU")
        or_raise(problems, None)
        return self

    def processes(self) -> tuple[Processes, ...]:
        learner = self.learner
        return (Processes("learner.workers", "trainer", learner, learner.min_workers, learner.max_workers),)

    @property
    def holds_float32(self) -> bool:
        """Whether all weights are trained and nothing keeps a float32 copy of them: then they are held so, as in TRL."""
        has_master = zero_stage(self.learner.deepspeed) in (1, 2, 3)
        return self.lora is None and not has_master

    def models(self) -> tuple[ModelUse, ...]:
        model = self.model
        held_by = ("learner.workers",)
        own = ModelUse("model.path", model.path, self.head, held_by, model.revision, model.trust_remote_code)
        retrained = self.head == "causal" and self.lora is None
        return (replace(own, new_head=self.head == "score", retrained=retrained),)

    def tokenizers(self) -> Mapping[str, str]:
        places = {
            "model.tokenizer": self.model.tokenizer,
            "training.chat_template_path": self.training.get("chat_template_path"),
        }
        return {key: place for key, place in places.items() if isinstance(place, str)}

    @property
    def has_reference(self) -> bool:
        """Whether a frozen copy of the whole model lies beside the one that learns."""
        return False

    @property
    def rows_a_worker(self) -> int:
        return self.rows_a_pass * self.accumulated

    def steps(self, rows: Mapping[str, int]) -> int | None:
        if self._max_steps > 0:
            return self._max_steps
        per_epoch = self._steps_an_epoch(rows)
        return None if per_epoch is None else math.ceil(self._epochs * per_epoch)

    def too_few_rows(self, rows: Mapping[str, int]) -> list[str]:
        if self.training.get("packing") or self.training.get("eval_packing"):
            return []  # which makes other rows: the worker counts those
        return self.without_batch(rows)

    def without_batch(self, rows: Mapping[str, int]) -> list[str]:
        """Datasets, as the trainer has them, that do not fill one batch where only full ones count, one line each."""
        keys = {"data.train": "per_device_train_batch_size", "data.eval": "per_device_eval_batch_size"}
        problems = []
        for key, count in rows.items() if self.training.get("dataloader_drop_last") else ():
            a_pass, workers = int(self.native(keys[key])), self.learner.max_workers
            if count < a_pass * workers:
                what = "an epoch has no step" if key == "data.train" else "nothing is evaluated"
                on = f" on {workers} workers" if workers > 1 else ""
                problems.append(
                    f"{key}: training.dataloader_drop_last drops the only, incomplete batch, so {what}; found: {count} rows "
                    f"for batches of {a_pass * workers} (training.{keys[key]} {a_pass}{on}); expected: at least "
                    f"{a_pass * workers} rows, smaller batches, or dataloader_drop_last: false"
                )
        return problems

    @property
    def _max_steps(self) -> int:
        return int(self.training.get("max_steps", -1))

    @property
    def _epochs(self) -> float:
        return float(self.native("num_train_epochs"))

    def _steps_an_epoch(self, rows: Mapping[str, int]) -> int | None:
        """As transformers' Trainer counts them; packing makes fewer and longer rows, how many is known only afterwards."""
        count = rows.get("data.train")
        if count is None or self.training.get("packing"):
            return None
        batch = self.rows_a_pass * self.learner.max_workers
        batches = count // batch if self.training.get("dataloader_drop_last") else -(-count // batch)
        return -(-batches // self.accumulated)

    def in_words(self, rows: Mapping[str, int], microbatch: int | None) -> list[tuple[str, str]]:
        batch, accumulate, most = self.rows_a_pass, self.accumulated, self.learner.max_workers
        accumulated = f" x {accumulate} accumulated" if accumulate > 1 else ""
        workers = "one worker" if most == 1 else f"{most} workers"
        fewer = "; fewer accumulate more" if self.learner.min_workers < most else ""
        step = batch * accumulate * most
        return [
            ("training", self.how_trained),
            ("step", f"{step} rows = {batch} a forward pass{accumulated} x {workers}{fewer}"),
            ("backward", "activations are recomputed" if self.recompute else "activations are kept"),
            self._steps_in_words(rows, step),
        ]

    def _steps_in_words(self, rows: Mapping[str, int], step: int) -> tuple[str, str]:
        count, per_epoch, steps = rows.get("data.train"), self._steps_an_epoch(rows), self.steps(rows)
        if self._max_steps > 0:
            share = f", {self._max_steps * step / count:.2g} epochs of {count:,} rows" if count else ""
            return "steps", f"{steps:,} optimizer steps{share}"
        if per_epoch is not None and count is not None:
            return "steps", f"{steps:,} optimizer steps = {per_epoch:,} an epoch ({count:,} rows) x {self._epochs:g}"
        why = "rows are packed" if self.training.get("packing") else "the rows are not here to be counted"
        return "epochs", f"{self._epochs:g}; how many steps is not known: {why}"

    def idle_settings(self, steps: int | None) -> list[str]:
        lines, training = super().idle_settings(steps), self.training
        if training.get("max_steps", 0) > 0 and "num_train_epochs" in training:
            lines.append(f"training.num_train_epochs: does nothing beside training.max_steps {training['max_steps']}")
        if training.get("eval_strategy", "no") == "no":
            lines += [
                f"training.{key}: does nothing with training.eval_strategy: no"
                for key in ("eval_steps", "eval_delay")
                if key in training
            ]
        if self.data.eval is None:
            lines += [
                f"training.{key}: does nothing without data.eval"
                for key in ("per_device_eval_batch_size", "eval_accumulation_steps", "eval_on_start", "bf16_full_eval")
                if training.get(key)
            ]
        if training.get("lr_scheduler_type") == "constant" and training.get("warmup_steps"):
            lines.append(
                "training.warmup_steps: does nothing with lr_scheduler_type: constant (constant_with_warmup uses it)"
            )
        return lines

    def savings(self) -> Iterator[Mapping[str, Any]]:
        if not self.recompute:
            yield {"training.gradient_checkpointing": True}
        if self.rows_a_pass > 1:
            yield {
                "training.per_device_train_batch_size": 1,
                "training.gradient_accumulation_steps": self.rows_a_worker,
            }
        yield from super().savings()

    def bf16_on_cpu(self) -> list[str]:
        asked = [f"training.{key}" for key in ("bf16", "bf16_full_eval") if self.training.get(key)]
        return super().bf16_on_cpu() + ([] if self.uses_gpu else asked)


def _no_steps(training: Mapping[str, Any]) -> list[str]:
    steps, epochs = training.get("max_steps", -1), training.get("num_train_epochs", 1)
    if steps == 0:
        return ["max_steps: 0 is a run without a step; found: 0; expected: more, or -1 for num_train_epochs to count"]
    if steps < 0 and not epochs > 0:
        return [f"num_train_epochs: a run without a step; found: {epochs}; expected: more than 0, or max_steps"]
    return []


class SftRun(SupervisedRun):
    """Supervised fine-tuning."""

    task: ClassVar[str] = "supervised fine-tuning"
    trl_trainer: ClassVar[str | None] = "SFTTrainer"
    native_class: ClassVar[NativeClass] = NativeClass("trl", "trainer/sft_config.py", "SFTConfig")

    kind: Literal["sft"] = "sft"
    """Supervised fine-tuning with TRL's SFTTrainer."""

    def layouts(self) -> tuple[Columns, ...]:
        text = str(self.training.get("dataset_text_field", "text"))
        found = (("messages",), ("conversations",), ("prompt", "completion"), (text,), ("input_ids",))
        # Who names the column of the text means that column, whatever others there are.
        return ((text,), *found) if "dataset_text_field" in self.training else found

    def taken_beside(self, rows: RowKind) -> Columns:
        if rows == "input_ids":
            return ("labels", "completion_mask", "assistant_masks")
        return OF_TEMPLATES if rows == "chat" else ()


class RewardRun(SupervisedRun):
    """Reward modelling."""

    task: ClassVar[str] = "reward modelling"
    trl_trainer: ClassVar[str | None] = "RewardTrainer"
    native_class: ClassVar[NativeClass] = NativeClass("trl", "trainer/reward_config.py", "RewardConfig")
    head: ClassVar[Head] = "score"
    sequences_a_row: ClassVar[int] = 2  # chosen and rejected
    also_taken: ClassVar[Columns] = ("prompt",)

    kind: Literal["reward"] = "reward"
    """A reward model from preference pairs, with TRL's RewardTrainer."""

    def layouts(self) -> tuple[Columns, ...]:
        return (("chosen", "rejected"),)

    def taken_beside(self, rows: RowKind) -> Columns:
        return ("margin", *(OF_TEMPLATES if rows == "chat" else ()))


class DpoRun(SupervisedRun):
    """Direct preference optimisation."""

    task: ClassVar[str] = "direct preference optimisation"
    trl_trainer: ClassVar[str | None] = "DPOTrainer"
    native_class: ClassVar[NativeClass] = NativeClass("trl", "trainer/dpo_config.py", "DPOConfig")
    sequences_a_row: ClassVar[int] = 2
    also_taken: ClassVar[Columns] = ("prompt",)

    kind: Literal["dpo"] = "dpo"
    """Direct preference optimisation with TRL's DPOTrainer."""

    def layouts(self) -> tuple[Columns, ...]:
        return (("chosen", "rejected"),)

    def taken_beside(self, rows: RowKind) -> Columns:
        return OF_TEMPLATES if rows == "chat" else ()

    @property
    def has_reference(self) -> bool:
        return self.lora is None and not self.training.get("precompute_ref_log_probs")
