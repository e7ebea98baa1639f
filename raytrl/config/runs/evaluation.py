"""The run file of `raytrl eval`: one or two finished models, prompts, and what scores the responses."""

from collections.abc import Mapping
from typing import ClassVar, Literal

from pydantic import PositiveInt, model_validator

from raytrl.config.runs.base import ModelUse, or_raise
from raytrl.config.runs.finished import ModelPath, unfinished
from raytrl.config.runs.rollout import RolloutRun
from raytrl.config.sections.base import Section
from raytrl.config.sections.data import DataSource
from raytrl.config.sections.engines import Asked, chosen_engine, engine_problems
from raytrl.config.sections.rollout import RolloutSection


class EvalData(Section):
    """What is evaluated on."""

    eval: DataSource
    """The rows to evaluate on: arguments of datasets.load_dataset, or one string, a file or a hub id."""


class EvalRun(RolloutRun):
    """Evaluation: rollout and reward actors as in PPO, and nothing is trained."""

    launcher: ClassVar[str] = "raytrl.launch.runs.evaluation:EvalKind"
    row_checks: ClassVar[str] = "raytrl.plan.checks.evaluation:try_data"

    kind: Literal["eval"] = "eval"
    """Scores of a model's responses, alone or against a second model."""
    compare: ModelPath | None = None
    """A second model, with its own tokenizer, on the same prompts: Hugging Face id or local folder. null: none."""
    data: EvalData
    """Where the prompts come from."""
    rows: PositiveInt | None = 64
    """The first rows of data.eval. null: all."""
    greedy: bool = False
    """true: the likeliest token each time. false: sampled, with the same random numbers for both models."""

    @property
    def evaluated(self) -> dict[str, tuple[str, str]]:
        """What is evaluated: key → folders or ids of model and tokenizer."""
        found = {"model": (str(self.model.path), self.tokenizer_path)}
        return found if self.compare is None else {**found, "compare": (self.compare, self.compare)}

    @property
    def versions(self) -> list[str]:
        """The models that engines load one after the other, the reference last: what each version stands for."""
        paths = [path for path, _ in self.evaluated.values()]
        return paths if self.reference.path is None else [*paths, self.reference.path]

    @property
    def asked(self) -> Asked:
        logprobs = self.reference.path is not None
        return Asked(self.rollout, self.versions, logprobs=logprobs, elsewhere=self._elsewhere)

    @property
    def uses_gpu(self) -> bool:
        return self.rollout.uses_gpu

    @property
    def prompts_at_a_time(self) -> int | None:
        return self.rows

    def data_sources(self) -> Mapping[str, DataSource]:
        return {"data.eval": self.data.eval}

    def models(self) -> tuple[ModelUse, ...]:
        held_by = ("rollout.actors",)
        paths = {"model.path": str(self.model.path), "compare": self.compare, "reference.path": self.reference.path}
        own = tuple(self._use(key, path, held_by) for key, path in paths.items() if path is not None)
        return (*own, *self._reward_models())

    def in_words(self, rows: Mapping[str, int], microbatch: int | None) -> list[tuple[str, str]]:
        known = [count for count in (self.rows, rows.get("data.eval")) if count is not None]
        count = f"{min(known):,}" if known else "all"
        how = "greedy" if self.greedy else f"sampled at temperature {self.rollout.sampling.temperature:g}"
        words = [
            self._rewards_in_words(),
            self._engine_in_words(),
            *self._tools_in_words(),
            ("prompts", f"{count}, in chunks of {self.rollout.chunk_prompts}; responses are {how}"),
        ]
        if self.reference.path is not None:
            words.append(("KL to", self.reference.path))
        return words

    def idle_settings(self, steps: int | None) -> list[str]:
        return self._idle_actors()

    @model_validator(mode="after")
    def _agreement(self) -> "EvalRun":
        # auto becomes a name here, so that the run file in the run directory says what a run was made with.
        self.__dict__["rollout"] = self.rollout.chosen(engine=chosen_engine(self.asked))
        rollout, problems = self.rollout, unfinished(self.model)
        problems += self._reward_problems() + engine_problems(self.asked)
        if rollout.samples != RolloutSection().samples:
            problems.append(
                f"rollout.samples: does nothing for eval, which writes every response; found: {rollout.samples}; leave "
                f"it out"
            )
        if rollout.weight_transfer != "auto":
            problems.append(
                f"rollout.weight_transfer: does nothing for eval, whose engines read finished models; found: "
                f"{rollout.weight_transfer}; leave it out"
            )
        if rollout.versions is not None:
            problems.append(
                f"rollout.versions: does nothing for eval, whose engines hold one model after the other; found: "
                f"{rollout.versions}; leave it out"
            )
        if self.greedy and rollout.sampling.temperature != 1.0:
            problems.append(
                f"rollout.sampling.temperature: does nothing with greedy: true; found: {rollout.sampling.temperature}; "
                f"leave it out"
            )
        if self.greedy and self.reference.path is not None:
            problems.append(
                "reference.path: the KL is a mean over sampled responses, and greedy ones are no sample; found: greedy: "
                "true; expected: greedy: false, or no reference"
            )
        return or_raise(problems, self)
