"""The run files: one frozen model per kind. CONFIG of a run = these keys, their types and their defaults."""

import math
import re
from typing import Any, ClassVar, Literal, TypeVar

from pydantic import ConfigDict, Field, field_validator, model_validator

from raytrl.config.base import Placement, Section
from raytrl.config.deepspeed import check_deepspeed, read_deepspeed, zero_stage
from raytrl.config.native import (
    DATASET_BUILDERS,
    LORA_CLASS,
    TRAINING_CLASSES,
    NativeClass,
    check_values,
    native_default,
    native_fields,
)
from raytrl.config.nearest import OWNED, unknown_key

T = TypeVar("T")

# What transformers can report to, by its names for them.
TRACKERS = (
    *("tensorboard", "wandb", "mlflow", "trackio", "comet_ml", "clearml", "neptune", "swanlab", "dvclive"),
    *("dagshub", "codecarbon", "azure_ml", "flyte", "kubeflow", "all"),
)
LOAD_DATASET_KEYS = ("path", "name", "data_dir", "data_files", "split", "revision")


class TokenizerSpec(Section):
    """A byte-level BPE tokenizer, trained on the run's own training text before it starts."""

    vocab_size: int = Field(gt=260, description="entries, the 256 bytes and the special tokens included")
    eos_token: str = "<|end|>"
    pad_token: str = "<|pad|>"
    special_tokens: list[str] = Field(default=[], description="more tokens that are never split, e.g. chat markers")

    @model_validator(mode="after")
    def _distinct(self) -> "TokenizerSpec":
        if self.eos_token == self.pad_token:
            raise ValueError("eos_token and pad_token must differ: padding would otherwise hide the end of a text")
        return self


class ModelSection(Section):
    """The network to train: a Hugging Face folder or id, or one made from a config with random weights."""

    path: str | None = Field(default=None, description="Hugging Face id or local folder")
    config: dict[str, Any] | None = Field(
        default=None, description="model_type and its config fields: a model with random weights"
    )
    tokenizer: str | TokenizerSpec | None = Field(
        default=None, description="id, folder, or what to train; default: path"
    )
    revision: str | None = None
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    pad_token: str | None = Field(default=None, description="a token to pad with, added where the tokenizer lacks it")
    trust_remote_code: bool = False

    @model_validator(mode="after")
    def _one_source(self) -> "ModelSection":
        if (self.path is None) == (self.config is None):
            found = "neither path nor config" if self.path is None else "both path and config"
            raise ValueError(f"found: {found}; expected: one of path (a model that exists) and config (one to make)")
        if self.config is not None and "model_type" not in self.config:
            raise ValueError(
                "config.model_type: missing; expected: an architecture of transformers such as llama, gpt2"
            )
        if self.config is not None and self.tokenizer is None:
            raise ValueError("tokenizer: missing; a model made from a config needs one: a folder, or {vocab_size: …}")
        if self.path is not None and isinstance(self.tokenizer, TokenizerSpec):
            raise ValueError("tokenizer: a trained tokenizer would not fit the embeddings of the model in path")
        return self


class DataSource(Section):
    """Arguments of `datasets.load_dataset`, and optionally a function that reshapes the rows."""

    model_config = ConfigDict(extra="allow", frozen=True, protected_namespaces=())

    path: str = Field(description="builder (json, csv, parquet, text), saved dataset folder, or hub id")
    name: str | None = None
    data_dir: str | None = None
    data_files: str | list[str] | None = None
    split: str = "train"
    revision: str | None = None
    transform: str | None = Field(default=None, description="file.py:function or module:function, Dataset → Dataset")

    @model_validator(mode="before")
    @classmethod
    def _from_text(cls, value: Any) -> Any:
        if not isinstance(value, str):
            return value
        suffixes = {".json": "json", ".jsonl": "json", ".csv": "csv", ".parquet": "parquet", ".txt": "text"}
        suffix = value[value.rfind(".") :].lower() if "." in value else ""
        return {"path": suffixes[suffix], "data_files": value} if suffix in suffixes else {"path": value}

    @model_validator(mode="after")
    def _builder_options(self) -> "DataSource":
        known = native_fields(DATASET_BUILDERS[self.path]) if self.path in DATASET_BUILDERS else {}
        names = [*LOAD_DATASET_KEYS, "transform", *known]
        unknown = [unknown_key("", key, names) for key in (self.model_extra or {}) if key not in known]
        if unknown:
            raise ValueError("; ".join(unknown))
        if self.path in DATASET_BUILDERS and self.data_files is None and self.data_dir is None:
            raise ValueError(f"data_files: missing; the {self.path} builder reads files")
        if self.transform is not None and not re.fullmatch(r"[^:]+:\w+", self.transform):
            raise ValueError(f"transform: found: {self.transform!r}; expected: file.py:function or module:function")
        return self


class DataSection(Section):
    train: DataSource
    eval: DataSource | None = None


class LearnerSection(Section):
    """The Ray Train workers that hold and update the network."""

    workers: int | tuple[int, int] = Field(default=1, description="a number, or [min, max]: elastic")
    resources: dict[str, float] = Field(default={"CPU": 1}, description="of each worker; {GPU: 1} on GPU nodes")
    placement: Placement = Field(default="pack", description="of the workers on the nodes")
    labels: dict[str, str] = Field(default={}, description="only nodes with these labels, in Ray's label selectors")
    deepspeed: dict[str, Any] | None = Field(default=None, description="a DeepSpeed JSON file, or its keys")
    max_failures: int = Field(default=3, ge=0, description="worker-group restarts before the run fails")
    start_timeout_s: float = Field(default=120, gt=0, description="for all workers to be placed and started")
    stall_timeout_s: float = Field(default=1800, gt=0, description="without any progress before the run fails")

    @field_validator("deepspeed", mode="before")
    @classmethod
    def _read_file(cls, value: Any) -> Any:
        return read_deepspeed(value) if isinstance(value, str) else value

    @property
    def min_workers(self) -> int:
        return self.workers if isinstance(self.workers, int) else self.workers[0]

    @property
    def max_workers(self) -> int:
        return self.workers if isinstance(self.workers, int) else self.workers[1]

    @property
    def uses_gpu(self) -> bool:
        return self.resources.get("GPU", 0) > 0

    @model_validator(mode="after")
    def _sane(self) -> "LearnerSection":
        if not 1 <= self.min_workers <= self.max_workers:
            raise ValueError(f"workers: found: {self.workers}; expected: at least 1, or [min, max] with min <= max")
        if self.min_workers != self.max_workers and zero_stage(self.deepspeed) is not None:
            raise ValueError(
                "workers: an elastic number cannot go with deepspeed: a ZeRO checkpoint loads only on as many workers "
                "as wrote it; give one number, or leave deepspeed out"
            )
        if any(amount <= 0 for amount in self.resources.values()) or not self.resources:
            raise ValueError(f"resources: found: {self.resources}; expected: positive amounts, such as {{CPU: 1}}")
        return self


class ClusterSection(Section):
    address: str | None = Field(
        default=None, description="null: a local Ray, or the job's cluster; auto; ray://host:port"
    )


class CheckpointSection(Section):
    every: int = Field(default=50, ge=1, description="optimizer steps between two checkpoints")
    keep: int = Field(default=2, ge=1, description="how many complete ones stay")


class Run(Section):
    """What every kind of run has."""

    kind: str
    name: str = Field(description="the run directory is <output_dir>/<name>")
    output_dir: str = Field(default="runs", description="a local or shared path, or a URI such as s3://bucket/path")
    seed: int = Field(default=0, ge=0)
    cluster: ClusterSection = ClusterSection()

    @field_validator("name")
    @classmethod
    def _one_folder(cls, name: str) -> str:
        if not re.fullmatch(r"[\w][\w.\-]*", name):
            raise ValueError(f"found: {name!r}; expected: a folder name of letters, digits, '.', '_' and '-'")
        return name


class TrainingRun(Run):
    """What every kind has that trains a network on Ray Train workers."""

    model: ModelSection
    lora: dict[str, Any] | None = Field(default=None, description="PEFT LoraConfig fields; absent: full fine-tuning")
    data: DataSection
    learner: LearnerSection = LearnerSection()
    checkpoint: CheckpointSection = CheckpointSection()
    report_to: list[str] = Field(default=["tensorboard"], description="trackers, by their names in transformers")

    @field_validator("report_to", mode="before")
    @classmethod
    def _list(cls, value: Any) -> Any:
        return [] if value in (None, "none") else [value] if isinstance(value, str) else value

    @field_validator("report_to", mode="after")
    @classmethod
    def _known_trackers(cls, trackers: list[str]) -> list[str]:
        unknown = [f"found: {t!r}; expected: some of {', '.join(TRACKERS)}" for t in trackers if t not in TRACKERS]
        return or_raise(unknown[:1], trackers)

    @field_validator("lora", mode="after")
    @classmethod
    def _native_lora(cls, lora: dict[str, Any] | None) -> dict[str, Any] | None:
        if lora is None:
            return None
        lora = dict(lora)
        known = native_fields(LORA_CLASS)
        problems = [unknown_key("", key, known) for key in lora if key not in known]
        problems += [p.removeprefix(".") for p in check_values("", LORA_CLASS, lora)]
        if "task_type" in lora:
            problems.append("task_type: is set by `kind`")
        return or_raise(problems, lora)


class SupervisedRun(TrainingRun):
    """SFT, reward modelling or DPO: one TRL trainer on Ray Train workers."""

    training: dict[str, Any] = Field(default={}, description="fields of TRL's config class for this kind")

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
    kind: Literal["sft"] = "sft"
    native_class: ClassVar[NativeClass] = TRAINING_CLASSES["sft"]


class RewardRun(SupervisedRun):
    kind: Literal["reward"] = "reward"
    native_class: ClassVar[NativeClass] = TRAINING_CLASSES["reward"]


class DpoRun(SupervisedRun):
    kind: Literal["dpo"] = "dpo"
    native_class: ClassVar[NativeClass] = TRAINING_CLASSES["dpo"]


def or_raise(problems: list[str], value: T) -> T:
    """The value, or all its problems as one ValueError with a line each."""
    if problems:
        raise ValueError("\n".join(problems))
    return value
