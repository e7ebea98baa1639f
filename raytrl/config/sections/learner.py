"""`learner`, `cluster`, `checkpoint`: the workers that train, where, and what they keep."""

from typing import Any

from pydantic import Field, field_validator, model_validator

from raytrl.config.foreign.deepspeed import read_deepspeed, zero_stage
from raytrl.config.sections.base import ProcessSection, Section


class LearnerSection(ProcessSection):
    """The Ray Train workers that hold and update the network."""

    workers: int | tuple[int, int] = 1
    """How many, or [min, max]: elastic, as many as the cluster has room for at the moment."""
    deepspeed: dict[str, Any] | None = None
    """A DeepSpeed JSON file, or its keys. null: plain data parallelism (DDP)."""
    max_failures: int = Field(default=3, ge=0)
    """How often the workers are started again from the last checkpoint; one failure more and the run fails."""
    start_timeout_s: float = Field(default=120, gt=0)
    """Seconds for all workers to be placed and started."""
    stall_timeout_s: float = Field(default=1800, gt=0)
    """Seconds in which no worker does anything, not a micro-batch nor a part of an upload, before the run fails."""

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

    @model_validator(mode="after")
    def _sane(self) -> "LearnerSection":
        if not 1 <= self.min_workers <= self.max_workers:
            raise ValueError(f"workers: found: {self.workers}; expected: at least 1, or [min, max] with min <= max")
        if self.gpus > 1:
            raise ValueError(
                f"resources.GPU: a worker computes on one GPU; found: {self.gpus:g}; expected: at most 1, and more workers"
            )
        if 0 < self.gpus < 1 and self.max_workers > 1:
            raise ValueError(
                f"resources.GPU: NCCL takes no two workers on one GPU; found: {self.gpus:g} for {self.max_workers} workers; "
                f"expected: 1 for each, or one worker"
            )
        if self.min_workers != self.max_workers and zero_stage(self.deepspeed) is not None:
            raise ValueError(
                "workers: an elastic number cannot go with deepspeed: a ZeRO checkpoint loads only on as many workers "
                "as wrote it; give one number, or leave deepspeed out"
            )
        return self


class ClusterSection(Section):
    """The Ray that a run's processes are started in."""

    address: str | None = None
    """auto: the Ray that runs on this machine; host:port or ray://host:port: another. null: in a sweep what
    the base says; else the one that RAY_ADDRESS names, as in a Ray job; else a local Ray for this run."""


class CheckpointSection(Section):
    """What a run that was cut off goes on from."""

    every: int = Field(default=50, ge=1)
    """Steps between two checkpoints: optimizer steps, in PPO steps of the loop. The last step always has one."""
    keep: int = Field(default=2, ge=1)
    """How many of the latest complete checkpoints stay."""
