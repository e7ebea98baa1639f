"""What every run file has, and what every one that trains has; and what each answers about itself."""

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, TypeVar

from pydantic import Field, field_validator

from raytrl.config.foreign.deepspeed import zero_stage
from raytrl.config.foreign.native import (
    LORA_CLASS,
    NativeClass,
    check_values,
    native_fields,
)
from raytrl.config.renamed import unknown_key
from raytrl.config.sections.base import ProcessSection, Section
from raytrl.config.sections.data import DataSection, DataSource
from raytrl.config.sections.learner import CheckpointSection, ClusterSection, LearnerSection
from raytrl.config.sections.model import ModelSection

T = TypeVar("T")


# What transformers can report to, by its names for them.
TRACKERS = (
    *("tensorboard", "wandb", "mlflow", "trackio", "comet_ml", "clearml", "neptune", "swanlab", "dvclive"),
    *("dagshub", "codecarbon", "azure_ml", "flyte", "kubeflow", "all"),
)


Head = Literal["causal", "score"]
Columns = tuple[str, ...]
RowKind = Literal["text", "chat", "input_ids"]


@dataclass(frozen=True)
class Processes:
    """Equal processes of a run, and the section of the run file that says what each of them takes."""

    key: str  # of their number in the run file
    role: Literal["trainer", "learner", "rollout", "reward", "benchmark", "pairs", "server"]
    section: ProcessSection
    count: int  # that the run cannot do without
    most: int  # that it can use

    @property
    def section_name(self) -> str:
        return self.key.partition(".")[0]

    @property
    def resources_written(self) -> bool:
        """Whether somebody said what each process takes."""
        return "resources" in self.section.model_fields_set


@dataclass(frozen=True)
class ModelUse:
    """A network that a run loads, and the processes that hold it."""

    key: str
    path: str | None  # None: it is made from model.config
    head: Head
    held_by: tuple[str, ...]  # keys of `Processes`
    revision: str | None = None
    trust_remote_code: bool = False
    new_head: bool = False  # a head that its folder lacks is made new
    adapters: bool = False  # of an adapter's folder, the merged model beside it will do
    retrained: bool = False  # all of it, by transformers' Trainer, which saves it with its generation config


class Run(Section):
    """What every kind of run has."""

    also_taken: ClassVar[Columns] = ()  # columns that go before a layout's own where the data have them
    gives_columns_to_rewards: ClassVar[bool] = False  # those that are no layout's
    launcher: ClassVar[str]  # what in `launch` runs it: package.module:name
    row_checks: ClassVar[str]  # what in `plan.checks` tries its rows: package.module:name
    _elsewhere: bool = False  # it is looked at for machines that are not this one

    kind: str
    """What the run does; the command of the same name runs it."""
    name: str
    """The run directory is <output_dir>/<name>."""
    output_dir: str = "runs"
    """Where run directories go: a local or shared path, or a URI such as s3://bucket/path."""
    seed: int = Field(default=0, ge=0)
    """What all random numbers of the run follow from: new weights, the order of rows, responses, a sweep's values."""
    cluster: ClusterSection = ClusterSection()
    """Which Ray the run joins."""

    def model_post_init(self, context: Any) -> None:
        """`load_run` says in the context of its validation whether the run will be elsewhere."""
        self._elsewhere = bool((context or {}).get("elsewhere"))

    @field_validator("name")
    @classmethod
    def _one_folder(cls, name: str) -> str:
        if not re.fullmatch(r"[\w][\w.\-]*", name):
            raise ValueError(f"found: {name!r}; expected: a folder name of letters, digits, '.', '_' and '-'")
        return name

    @classmethod
    def foreign(cls) -> Mapping[str, NativeClass]:
        """The keys below which another library's fields stand, and its class that has them."""
        return {}

    def processes(self) -> tuple[Processes, ...]:
        """All of them, in the order in which they are started."""
        return ()

    def models(self) -> tuple[ModelUse, ...]:
        """Every network that is loaded, the one that the run is about first."""
        return ()

    def tokenizers(self) -> Mapping[str, str]:
        """Folders, files or ids of what makes tokens of its rows, by key; none where a model's own serves."""
        return {}

    def data_sources(self) -> Mapping[str, DataSource]:
        """Its datasets, by key."""
        return {}

    def user_functions(self) -> Mapping[str, str]:
        """Places of the user's own code that a run calls: reward functions, tools, environments; by key."""
        return {}

    def layouts(self) -> tuple[Columns, ...]:
        """The columns that it can work on (TRL's dataset types); the first that are all there are taken."""
        return ()

    def taken_beside(self, rows: RowKind) -> Columns:
        """The columns that go along with the layout's own where the data have them.

        Args:
            rows: what the layout's columns hold.
        """
        return ()

    def steps(self, rows: Mapping[str, int]) -> int | None:
        """Optimizer or PPO steps of the whole run; None where nothing trains, or the rows are not there to be counted.

        Args:
            rows: of each dataset, by its key.
        """
        return None

    def too_few_rows(self, rows: Mapping[str, int]) -> list[str]:
        """Datasets that are too small for what is asked of them, one line each.

        Args:
            rows: of each dataset, by its key.
        """
        return []

    def in_words(self, rows: Mapping[str, int], microbatch: int | None) -> list[tuple[str, str]]:
        """(subject, sentence) pairs for people: what it does, how large a step is, how many there are.

        Args:
            rows: of each dataset, by its key.
            microbatch: tokens in one forward pass of a learner; None where that is not known, or is no setting of the kind.
        """
        return []

    def origin_of_default(self, key: str) -> str:
        """Where the value of a dotted key comes from that nobody wrote."""
        return "default"

    def idle_settings(self, steps: int | None) -> list[str]:
        """Settings that would change nothing, one line each; what can never make sense is refused when it is read.

        Args:
            steps: of the whole run, where they are known.
        """
        return []

    def savings(self) -> Iterator[Mapping[str, Any]]:
        """Settings that save memory, as dotted keys, the least intrusive first."""
        yield from ()

    def bf16_on_cpu(self) -> list[str]:
        """The keys that ask for arithmetic in bfloat16 in processes without a GPU."""
        return []

    def assumed(self) -> list[str]:
        """What is taken to be so on machines that are not this one."""
        return []

    @property
    def uses_gpu(self) -> bool:
        """Whether its network computes on a GPU: `model.dtype: auto` follows from it."""
        return False

    @property
    def travelling_model(self) -> str | None:
        """The model whose weights go to rollout actors at every step; None where none do, or adapters alone."""
        return None


class TrainingRun(Run):
    """What every kind has that trains a network on Ray Train workers."""

    task: ClassVar[str]  # what it does, in words
    step_name: ClassVar[str] = "optimizer steps"
    trl_trainer: ClassVar[str | None] = None  # the class that trains; None: raytrl's own learner

    model: ModelSection
    """The network to train."""
    lora: dict[str, Any] | None = None
    """Fields of PEFT's LoraConfig: an adapter is trained. null: all weights are."""
    data: DataSection
    """Where the rows come from."""
    learner: LearnerSection = LearnerSection()
    """The workers that train."""
    checkpoint: CheckpointSection = CheckpointSection()
    """How often the state of the run is stored, and how many of these stay."""
    report_to: list[str] = Field(default=["tensorboard"])
    """Trackers that metrics go to besides metrics.jsonl, by their names in transformers; one, a list, or null for none."""

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

    @classmethod
    def foreign(cls) -> Mapping[str, NativeClass]:
        return {**super().foreign(), "lora": LORA_CLASS}

    def data_sources(self) -> Mapping[str, DataSource]:
        return {"data.train": self.data.train} | ({} if self.data.eval is None else {"data.eval": self.data.eval})

    @property
    def uses_gpu(self) -> bool:
        return self.learner.uses_gpu

    @property
    def how_trained(self) -> str:
        """`LoRA r=16, DeepSpeed ZeRO-2`."""
        tuning = "full fine-tuning" if self.lora is None else f"LoRA r={self.lora.get('r', 8)}"
        stage = zero_stage(self.learner.deepspeed)
        alone = "one process" if self.learner.max_workers == 1 else "data parallel"
        return f"{tuning}, {f'DeepSpeed ZeRO-{stage}' if stage else alone}"

    @property
    def rows_a_worker(self) -> int | None:
        """Rows of a step for each of `learner.max_workers`; None where a step has as many rows however many share it."""
        return None

    @property
    def responses_a_step(self) -> int | None:
        """Responses that a step samples; None where nothing is sampled."""
        return None

    def why_without(self, metric: str) -> tuple[str, str, str] | None:
        """What a metric comes from that this run has not, what was found and what was expected; None: it may have it."""
        if metric.startswith("eval") and (why := self.why_never_evaluated()) is not None:
            return ("comes from evaluation", *why)
        return None

    def why_never_evaluated(self) -> tuple[str, str] | None:
        """What keeps the run from ever logging a metric of an evaluation (found, expected); None: nothing does."""
        return None if self.data.eval is not None else ("no data.eval", "data.eval, or another metric")

    def idle_settings(self, steps: int | None) -> list[str]:
        lines, every = [], self.checkpoint.every
        if steps is not None and every >= steps:
            lines.append(
                f"checkpoint.every: {every}, and the run has {steps} steps: a run that is cut off would start from the "
                f"beginning"
            )
        zero = (self.learner.deepspeed or {}).get("zero_optimization") or {}
        offloads = zero.get("offload_optimizer") or zero.get("offload_param")
        if zero_stage(self.learner.deepspeed) and self.learner.max_workers == 1 and not offloads:
            lines.append("learner.deepspeed: ZeRO shards over workers, and there is one: it saves nothing")
        return lines

    def savings(self) -> Iterator[Mapping[str, Any]]:
        for zero in ({"stage": 2}, {"stage": 3}, {"stage": 3, "offload_optimizer": {"device": "cpu"}}):
            if self.learner.max_workers > 1 or "offload_optimizer" in zero:
                yield {"learner.deepspeed": {"zero_optimization": zero}}
        if self.lora is None:
            yield {"lora": {"r": 16, "lora_alpha": 32, "target_modules": "all-linear"}}

    def bf16_on_cpu(self) -> list[str]:
        if self.uses_gpu:
            return super().bf16_on_cpu()
        asks = {
            "model.dtype": self.model.dtype == "bfloat16",
            "learner.deepspeed.bf16.enabled": ((self.learner.deepspeed or {}).get("bf16") or {}).get("enabled") is True,
        }
        return [key for key, does in asks.items() if does] + super().bf16_on_cpu()


def or_raise(problems: list[str], value: T) -> T:
    """The value, or all its problems as one ValueError with a line each."""
    if problems:
        raise ValueError("\n".join(problems))
    return value
