"""The run file of `raytrl eval`: one or two finished models, prompts, and what scores the responses."""

from typing import Literal

from pydantic import PositiveInt, model_validator

from raytrl.config.runs.base import Run, or_raise
from raytrl.config.sections.base import Section
from raytrl.config.sections.data import DataSource
from raytrl.config.sections.engines import Asked, chosen_engine, engine_problems
from raytrl.config.sections.model import ModelSection, TokenizerSpec
from raytrl.config.sections.reward import RewardSection
from raytrl.config.sections.rollout import RolloutSection


class EvalData(Section):
    """What is evaluated on."""

    eval: DataSource
    """The rows to evaluate on: arguments of datasets.load_dataset, or one string, a file or a hub id."""


class EvalReference(Section):
    """What the KL of the responses is measured against."""

    path: str | None = None
    """A model with the same tokenizer: Hugging Face id or local folder. null: no KL."""


class EvalRun(Run):
    """Evaluation: rollout and reward actors as in PPO, and nothing is trained."""

    kind: Literal["eval"] = "eval"
    """Scores of a model's responses, alone or against a second model."""
    model: ModelSection
    """The finished model that is evaluated."""
    compare: str | None = None
    """A second model, with its own tokenizer, on the same prompts: Hugging Face id or local folder. null: none."""
    data: EvalData
    """Where the prompts come from."""
    rows: PositiveInt | None = 64
    """The first rows of data.eval. null: all."""
    greedy: bool = False
    """true: the likeliest token each time. false: sampled, with the same random numbers for both models."""
    rollout: RolloutSection = RolloutSection()
    """Who samples responses, and how."""
    reward: RewardSection
    """Who scores responses, and by what."""
    reference: EvalReference = EvalReference()
    """The model that the KL of the responses is measured against."""

    @property
    def tokenizer_path(self) -> str:
        """Where the tokenizer of `model` is."""
        assert isinstance(self.model.tokenizer, str | None)
        return str(self.model.tokenizer or self.model.path)

    @property
    def models(self) -> dict[str, tuple[str, str]]:
        """What is evaluated: key → folders or ids of model and tokenizer."""
        found = {"model": (str(self.model.path), self.tokenizer_path)}
        return found if self.compare is None else {**found, "compare": (self.compare, self.compare)}

    @property
    def asked(self) -> Asked:
        """What the run wants of its rollout engine."""
        paths = [path for path, _ in self.models.values()]
        reference = self.reference.path
        return Asked(self.rollout, paths if reference is None else [*paths, reference], logprobs=reference is not None)

    @model_validator(mode="after")
    def _agreement(self) -> "EvalRun":
        # auto becomes a name here, so that the run file in the run directory says what a run was made with.
        self.__dict__["rollout"] = self.rollout.chosen(engine=chosen_engine(self.asked))
        model, rollout, problems = self.model, self.rollout, []
        if model.path is None:
            problems.append("model.path: missing; only a finished model can be evaluated: a Hugging Face id or folder")
        if isinstance(model.tokenizer, TokenizerSpec):
            problems.append("model.tokenizer: a tokenizer cannot be trained here; found: vocab_size; expected: a path")
        for key in ("revision", "pad_token"):
            if (value := getattr(model, key)) is not None:
                problems.append(f"model.{key}: does nothing for eval; found: {value!r}; leave it out")
        problems += engine_problems(self.asked)
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
