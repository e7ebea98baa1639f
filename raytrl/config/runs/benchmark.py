"""The run file of `raytrl eval` with `benchmark:`: one or two finished models, and lm-eval's tasks."""

from collections.abc import Mapping
from typing import ClassVar, Literal

from pydantic import model_validator

from raytrl.config.runs.base import ModelUse, Processes, Run, or_raise
from raytrl.config.runs.finished import ModelPath, unfinished
from raytrl.config.sections.benchmark import BenchmarkSection
from raytrl.config.sections.engines import Asked, chosen_engine, engine_problems, engine_words
from raytrl.config.sections.model import ModelSection


class BenchmarkRun(Run):
    """lm-eval's tasks, answered by actors that hold the model."""

    launcher: ClassVar[str] = "raytrl.launch.runs.benchmark:BenchmarkKind"
    row_checks: ClassVar[str] = "raytrl.plan.checks.benchmark:try_tasks"

    kind: Literal["eval"] = "eval"
    """Benchmarks of a model, alone or against a second model."""
    model: ModelSection
    """The network that is measured."""
    compare: ModelPath | None = None
    """A second model, with its own tokenizer, on the same documents: Hugging Face id or local folder. null: none."""
    benchmark: BenchmarkSection
    """What it is measured by, and by whom."""

    @property
    def evaluated(self) -> dict[str, tuple[str, str]]:
        """What is measured: key → folders or ids of model and tokenizer."""
        found = {"model": (str(self.model.path), str(self.model.tokenizer or self.model.path))}
        return found if self.compare is None else {**found, "compare": (self.compare, self.compare)}

    @property
    def asked(self) -> Asked:
        paths = [path for path, _ in self.evaluated.values()]
        return Asked(self.benchmark.as_rollout, paths, elsewhere=self._elsewhere)

    @property
    def uses_gpu(self) -> bool:
        return self.benchmark.uses_gpu

    def processes(self) -> tuple[Processes, ...]:
        section = self.benchmark
        return (Processes("benchmark.actors", "benchmark", section, section.actors, section.actors),)

    def models(self) -> tuple[ModelUse, ...]:
        paths = {"model.path": str(self.model.path), "compare": self.compare}
        trust = self.model.trust_remote_code
        return tuple(
            ModelUse(key, path, "causal", ("benchmark.actors",), None, trust)
            for key, path in paths.items()
            if path is not None
        )

    def tokenizers(self) -> Mapping[str, str]:
        return {"model.tokenizer": self.model.tokenizer} if isinstance(self.model.tokenizer, str) else {}

    def in_words(self, rows: Mapping[str, int], microbatch: int | None) -> list[tuple[str, str]]:
        section = self.benchmark
        words = [("engine", _own_keys(engine_words(self.asked)))]
        if section.limit is not None:
            words.append(("limit", f"the first {section.limit:,} documents of each task: no number to report"))
        return words

    def bf16_on_cpu(self) -> list[str]:
        return ["model.dtype"] if self.model.dtype == "bfloat16" and not self.uses_gpu else []

    @model_validator(mode="after")
    def _agreement(self) -> "BenchmarkRun":
        # auto becomes a name here, so that the run file in the run directory says what a run was made with.
        self.__dict__["benchmark"] = self.benchmark.chosen(engine=chosen_engine(self.asked))
        return or_raise(unfinished(self.model) + [_own_keys(line) for line in engine_problems(self.asked)], self)


def _own_keys(text: str) -> str:
    """What is said of an engine's keys, with those of this kind."""
    return text.replace("rollout.", "benchmark.")
