"""The run file of `raytrl eval` with `pairs:`: one or two reward models, and pairs of which one is the better."""

from collections.abc import Mapping
from typing import ClassVar, Literal

from pydantic import model_validator

from raytrl.config.runs.base import Columns, ModelUse, Processes, RowKind, Run, or_raise
from raytrl.config.runs.finished import ModelPath, unfinished
from raytrl.config.runs.supervised import OF_TEMPLATES
from raytrl.config.sections.benchmark import PairsSection
from raytrl.config.sections.data import DataSource
from raytrl.config.sections.model import ModelSection


class PairsRun(Run):
    """How often a reward model scores the better response higher."""

    launcher: ClassVar[str] = "raytrl.launch.runs.pairs:PairsKind"
    row_checks: ClassVar[str] = "raytrl.plan.checks.pairs:try_data"
    also_taken: ClassVar[Columns] = ("prompt",)

    kind: Literal["eval"] = "eval"
    """How often a reward model scores the better of two responses higher, alone or against a second reward model."""
    model: ModelSection
    """The reward model: a sequence classifier."""
    compare: ModelPath | None = None
    """A second reward model, with its own tokenizer, on the same pairs: Hugging Face id or local folder. null: none."""
    pairs: PairsSection
    """The pairs, and who scores them."""

    @property
    def evaluated(self) -> dict[str, str]:
        """What is measured: key → folder or id."""
        found = {"model": str(self.model.path)}
        return found if self.compare is None else {**found, "compare": self.compare}

    @property
    def uses_gpu(self) -> bool:
        return self.pairs.uses_gpu

    def processes(self) -> tuple[Processes, ...]:
        return (Processes("pairs.actors", "pairs", self.pairs, self.pairs.actors, self.pairs.actors),)

    def models(self) -> tuple[ModelUse, ...]:
        paths = {"model.path": str(self.model.path), "compare": self.compare}
        trust = self.model.trust_remote_code
        return tuple(
            ModelUse(key, path, "score", ("pairs.actors",), None, trust, adapters=True)
            for key, path in paths.items()
            if path is not None
        )

    def data_sources(self) -> Mapping[str, DataSource]:
        return {"pairs.data": self.pairs.data}

    def layouts(self) -> tuple[Columns, ...]:
        return (("chosen", "rejected"),)

    def taken_beside(self, rows: RowKind) -> Columns:
        named = () if self.pairs.category is None else (self.pairs.category,)
        return (*named, *(OF_TEMPLATES if rows == "chat" else ()))

    def in_words(self, rows: Mapping[str, int], microbatch: int | None) -> list[tuple[str, str]]:
        return [] if self.pairs.rows is None else [("limit", f"the first {self.pairs.rows:,} pairs")]

    def bf16_on_cpu(self) -> list[str]:
        return ["model.dtype"] if self.model.dtype == "bfloat16" and not self.uses_gpu else []

    @model_validator(mode="after")
    def _agreement(self) -> "PairsRun":
        problems = unfinished(self.model)
        if self.model.tokenizer is not None and not problems:
            problems.append(
                f"model.tokenizer: does nothing for a reward model, which has one of its own; found: "
                f"{self.model.tokenizer!r}; leave it out"
            )
        if self.pairs.gpus > 1:
            problems.append(
                f"pairs.resources.GPU: a reward model computes on one GPU; found: {self.pairs.gpus:g}; expected: at most 1, "
                f"and more actors"
            )
        if isinstance(self.pairs.label, bool):
            problems.append(f"pairs.label: found: {self.pairs.label}; expected: a number, or a name in quotes")
        return or_raise(problems, self)
