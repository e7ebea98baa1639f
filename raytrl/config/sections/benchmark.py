"""`benchmark` and `pairs`: what finished models are measured by besides their own responses."""

from typing import Annotated, Literal

from pydantic import BeforeValidator, Field, PositiveFloat, PositiveInt, field_validator

from raytrl.config.sections.base import ProcessSection, as_list
from raytrl.config.sections.data import DataSource
from raytrl.config.sections.rollout import RolloutSection

_FILES = (".yaml", ".yml")
_SLICE_BATCHES = 4  # an actor sorts what it is handed by length: the more, the less padding


class MeasuringSection(ProcessSection):
    """Actors that each hold the model that is measured."""

    actors: PositiveInt = 1
    """How many, each with the model. The numbers do not depend on it."""
    batch_size: PositiveInt = 32
    """Texts of a forward pass, of which a benchmark's actor is handed four times as many at a time."""
    start_timeout_s: PositiveFloat = 600.0
    """Seconds for the actors to be placed, and to load a model."""
    timeout_s: PositiveFloat = 600.0
    """Seconds without a single answer of any actor before the run fails."""


class BenchmarkSection(MeasuringSection):
    """Tasks of lm-eval, and the actors that answer them."""

    tasks: Annotated[list[str], BeforeValidator(as_list), Field(min_length=1)]
    """lm-eval's tasks, groups and tags: names, or files that end in .yaml, relative to where the command is typed, as are the
    folders that they name (dataset_path, data_dir) and, where they name none, their data_files."""
    include: str | None = None
    """A folder whose .yaml files are tasks, too, by the names that they give themselves. null: none."""
    fewshot: Annotated[int, Field(ge=0)] | None = None
    """Solved examples before each question; a task that itself says 0 has none. null: as each task says."""
    limit: PositiveInt | None = None
    """The first documents of each task, to try things out; shown with every number. null: all."""
    chat: Literal["auto"] | bool = "auto"
    """Whether questions go through the tokenizer's chat template. auto: where it has one."""
    engine: Literal["auto", "vllm", "transformers"] = "auto"
    """What computes. auto: vllm where it is installed and can run the models, else transformers."""
    max_length: PositiveInt | None = None
    """Tokens of a question and its answer at most; longer ones lose their beginning and are counted. null: the model's own."""
    offline: bool = True
    """true: models, tasks and data are read from this machine alone. false: what is missing is downloaded."""

    @field_validator("tasks")
    @classmethod
    def _each_once(cls, tasks: list[str]) -> list[str]:
        twice = sorted({task for task in tasks if tasks.count(task) > 1})
        if twice or not all(tasks):
            raise ValueError(f"found: {twice or ['']}, {'more than once' if twice else 'no name'}; expected: each once")
        return tasks

    @property
    def files(self) -> list[str]:
        """Of the tasks, those that are files."""
        return [task for task in self.tasks if task.endswith(_FILES)]

    @property
    def names(self) -> list[str]:
        """Of the tasks, those that lm-eval, or a file in `include`, gives a name to."""
        return [task for task in self.tasks if not task.endswith(_FILES)]

    @property
    def slice_requests(self) -> int:
        """Requests that go to an actor together, whatever the number of actors: so answers do not depend on it."""
        return _SLICE_BATCHES * self.batch_size

    @property
    def as_rollout(self) -> RolloutSection:
        """The same actors as those that sample, of which it is known when they can have vLLM."""
        return RolloutSection(actors=self.actors, engine=self.engine, resources=dict(self.resources))


class PairsSection(MeasuringSection):
    """Pairs of responses of which one is the better, and the actors that score them."""

    data: DataSource
    """Rows with chosen and rejected, with prompt or without: arguments of datasets.load_dataset, or one string."""
    category: str | None = None
    """A column by which accuracies are told apart. null: none."""
    label: str | int | None = None
    """Which output of the classifier is the score, by name or index. null: its only one."""
    rows: PositiveInt | None = None
    """The first rows of the data. null: all."""
