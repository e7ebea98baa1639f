"""`learner`, `cluster`, `checkpoint`: the workers that train, where, and what they keep."""

from typing import Any

from pydantic import Field, field_validator, model_validator

from raytrl.config.foreign.deepspeed import read_deepspeed, zero_stage
from raytrl.config.sections.base import ProcessSection, Section


class LearnerSection(ProcessSection):
    """The Ray Train workers that hold and update the network."""

    workers: int | tuple[int, int] = Field(default=1, description="a number, or [min, max]: elastic")
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

    @model_validator(mode="after")
    def _sane(self) -> "LearnerSection":
        if not 1 <= self.min_workers <= self.max_workers:
            raise ValueError(f"workers: found: {self.workers}; expected: at least 1, or [min, max] with min <= max")
        if self.min_workers != self.max_workers and zero_stage(self.deepspeed) is not None:
            raise ValueError(
                "workers: an elastic number cannot go with deepspeed: a ZeRO checkpoint loads only on as many workers "
                "as wrote it; give one number, or leave deepspeed out"
            )
        return self


class ClusterSection(Section):
    address: str | None = Field(
        default=None, description="null: a local Ray, or the job's cluster; auto; ray://host:port"
    )


class CheckpointSection(Section):
    every: int = Field(default=50, ge=1, description="optimizer steps between two checkpoints")
    keep: int = Field(default=2, ge=1, description="how many complete ones stay")
