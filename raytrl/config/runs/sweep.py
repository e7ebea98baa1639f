"""The run file of `raytrl tune`: a base run, what is searched in it, and by what rule trials are picked and stopped."""

import math
from collections.abc import Iterator
from typing import Annotated, Any, ClassVar, Literal

from pydantic import ConfigDict, Field, PositiveInt, field_validator, model_serializer, model_validator

from raytrl.config.runs.base import Run, or_raise
from raytrl.config.sections.base import Section

# Ray Tune's distributions by their own names → what their list holds.
_ARGUMENTS = {
    "uniform": ("lower", "upper"),
    "loguniform": ("lower", "upper"),
    "quniform": ("lower", "upper", "q"),
    "qloguniform": ("lower", "upper", "q"),
    "randint": ("lower", "upper"),
    "lograndint": ("lower", "upper"),
    "qrandint": ("lower", "upper", "q"),
    "qlograndint": ("lower", "upper", "q"),
}
_LISTS = {"choice": "one of these values, each as likely", "grid": "each of these values in turn"}
_UNBOUNDED = ("randn", "qrandn", "sample_from")
# What a sweep sets itself, or what is not a setting of the trained model.
_NOT_SEARCHED = ("kind", "name", "output_dir", "cluster", "report_to", "checkpoint.keep")
_MOST_INTEGERS = 64  # integers of one distribution that are all checked; of more, the bounds

DISTRIBUTIONS = {**_LISTS, **{name: f"Ray Tune's {name}: [{', '.join(a)}]" for name, a in _ARGUMENTS.items()}}
"""What each says of its list."""


class Distribution(Section):
    """One Ray Tune distribution: its name, and its arguments as a list."""

    name: str
    """By Ray Tune's names."""
    arguments: tuple[Any, ...]
    """As Ray Tune takes them, in order."""

    @model_validator(mode="before")
    @classmethod
    def _from_name(cls, value: Any) -> Any:
        if not isinstance(value, dict) or len(value) != 1:
            raise ValueError(f"found: {value!r}; expected: one distribution, such as {{loguniform: [1e-6, 1e-4]}}")
        [(name, arguments)] = value.items()
        if name == "grid_search":
            name = "grid"
        return {"name": name, "arguments": arguments if isinstance(arguments, list | tuple) else [arguments]}

    @model_validator(mode="after")
    def _check(self) -> "Distribution":
        if self.name in _UNBOUNDED:
            raise ValueError(
                f"found: {self.name!r}; its values cannot be checked before the start; expected: uniform, or another "
                f"distribution with bounds"
            )
        if self.name in _LISTS:
            return self._check_list()
        if self.name not in _ARGUMENTS:
            raise ValueError(f"found: {self.name!r}; expected: one of {', '.join(DISTRIBUTIONS)}")
        wanted = _ARGUMENTS[self.name]
        numbers = [a for a in self.arguments if isinstance(a, int | float) and not isinstance(a, bool)]
        if len(self.arguments) != len(wanted) or len(numbers) != len(wanted) or not all(map(math.isfinite, numbers)):
            raise ValueError(f"{self.name}: found: {list(self.arguments)}; expected: numbers [{', '.join(wanted)}]")
        if self.is_integer and any(a != int(a) for a in numbers):
            raise ValueError(f"{self.name}: found: {list(self.arguments)}; expected: whole numbers")
        lower, upper = numbers[:2]
        if lower >= upper or ("log" in self.name and lower <= 0) or (len(numbers) == 3 and numbers[2] <= 0):
            positive = " above 0" if "log" in self.name else ""
            raise ValueError(
                f"{self.name}: found: {list(self.arguments)}; expected: lower{positive} < upper, q above 0"
            )
        return self

    @model_serializer(mode="plain")
    def _as_written(self) -> dict[str, Any]:
        return {self.name: list(self.arguments)}

    def _check_list(self) -> "Distribution":
        if not self.arguments:
            raise ValueError(f"{self.name}: found: no values; expected: at least one")
        if any(isinstance(a, dict | list) for a in self.arguments):
            raise ValueError(
                f"{self.name}: found: {list(self.arguments)}; expected: single values, no lists or sections"
            )
        twice = [a for i, a in enumerate(self.arguments) if a in self.arguments[:i]]
        if twice:
            raise ValueError(f"{self.name}: found: {twice[0]!r} twice; expected: different values")
        return self

    @property
    def is_integer(self) -> bool:
        return "randint" in self.name

    def edge_values(self) -> list[Any]:
        """Every value where they are few; else the least and the greatest."""
        if self.name in _LISTS:
            return list(self.arguments)
        lower, upper = self.arguments[:2]
        if not self.is_integer:
            return [float(lower), float(upper)]
        last = int(upper) if self.name.startswith("q") else int(upper) - 1  # Ray's randint excludes the upper bound
        step = int(self.arguments[2]) if self.name.startswith("q") else 1
        every = range(int(lower), last + 1, step)
        return list(every) if len(every) <= _MOST_INTEGERS else [every[0], every[-1]]


class SchedulerSection(Section):
    """Ray Tune's scheduler, by name, and its own arguments."""

    model_config = ConfigDict(extra="allow")

    name: Literal["none", "asha", "median", "pbt"] = "none"
    """What stops bad trials early. none: nothing; asha: the worst at each rung; median: those below the median of the
    others' means; pbt is refused. Beside it stand the arguments of Ray's scheduler, such as grace_period in steps."""

    @model_validator(mode="after")
    def _check(self) -> "SchedulerSection":
        given = self.model_extra or {}
        if self.name == "pbt":
            raise ValueError(
                "name: pbt is refused: Ray Tune's population-based training copies checkpoints that trials hand to Tune, "
                "and runs on Ray Train V2 hand it none, so it would never exploit a trial and never say so; expected: "
                "asha, median or none"
            )
        if self.name == "none" and given:
            raise ValueError(
                f"{', '.join(given)}: does nothing with name: none; leave it out, or choose asha or median"
            )
        if self.name != "none" and "grace_period" not in given:
            raise ValueError(f"grace_period: missing; the steps that every trial may take before {self.name} stops it")
        owned = [key for key in ("metric", "mode", "time_attr", "hard_stop", "min_time_slice") if key in given]
        if owned:
            where = {"metric": "`metric`", "mode": "`mode`", "time_attr": "raytrl: the step"}
            raise ValueError(
                f"{owned[0]}: is set by {where.get(owned[0], 'raytrl: a trial is not paused')}; leave it out"
            )
        return self

    @property
    def arguments(self) -> dict[str, Any]:
        """What goes to Ray's scheduler as it is."""
        return dict(self.model_extra or {})


class AlgorithmSection(Section):
    """What picks the values of trials, by name."""

    name: Literal["random", "optuna"] = "random"
    """random: Ray's own, which also goes through grids; optuna: by what earlier trials came to."""
    sampler: str | None = None
    """With optuna: a class of optuna.samplers. null: TPESampler."""
    sampler_arguments: dict[str, Any] = Field(default={})
    """With optuna: arguments of the sampler."""

    @model_validator(mode="after")
    def _check(self) -> "AlgorithmSection":
        if self.name != "optuna" and (self.sampler is not None or self.sampler_arguments):
            raise ValueError("sampler: does nothing with name: random; leave it out")
        if "seed" in self.sampler_arguments:
            raise ValueError("sampler_arguments.seed: is set by `seed` at the top of the file")
        return self


class TuneRun(Run):
    """A sweep: many runs of one base file, each with other values, and the best of them."""

    launcher: ClassVar[str] = "raytrl.launch.sweep.sweep:SweepKind"

    kind: Literal["tune"] = "tune"
    """A sweep over any settings of a run file with Ray Tune."""
    base: str
    """The run file that trials start from: sft, reward, dpo or ppo."""
    fixed: dict[str, Any] = Field(default={})
    """Dotted keys of the base and the values that they have in all trials."""
    search: Annotated[dict[str, Distribution], Field(min_length=1)]
    """Dotted keys of the base and the distribution that each trial's value is drawn from, such as {loguniform: [1e-6,
    1e-4]}."""
    trials: PositiveInt | None = None
    """How many trials to make. null, where all of search is grid: each point of it once."""
    metric: str
    """A key of the trials' metrics.jsonl, by which the best is chosen."""
    average_last: PositiveInt = 1
    """A metric of a trial is the mean of so many of its last values."""
    mode: Literal["max", "min"]
    """Whether the greatest value of the metric is the best, or the least."""
    limit: dict[str, Annotated[float, Field(allow_inf_nan=False)]] = Field(default={})
    """Metric → its greatest value; a trial that ends over it cannot win, one that stays over it is stopped."""
    limit_patience: PositiveInt = 3
    """With a limit: so many values over it in a row stop a trial."""
    scheduler: SchedulerSection = SchedulerSection()
    """What stops bad trials early."""
    algorithm: AlgorithmSection = AlgorithmSection()
    """How a trial's values are picked."""
    max_concurrent: PositiveInt | Literal["auto"] = "auto"
    """Trials side by side, for all of which there must be room. auto: as many as there is room for."""
    max_failed: Annotated[int, Field(ge=0)] = 2
    """Failed trials that the sweep puts up with; one more and it fails."""

    @field_validator("search", mode="before")
    @classmethod
    def _dotted(cls, search: Any) -> Any:
        """Sections in sections, as an override on the command line makes them, are dotted keys."""
        return dict(_dotted_keys("", search)) if isinstance(search, dict) else search

    @field_validator("fixed", mode="before")
    @classmethod
    def _leaves(cls, fixed: Any) -> Any:
        """Sections are dotted keys: what they do not name stays as the base has it."""
        return dict(_leaf_keys("", fixed)) if isinstance(fixed, dict) else fixed

    @field_validator("fixed", mode="after")
    @classmethod
    def _fixable(cls, fixed: dict[str, Any]) -> dict[str, Any]:
        owned = [key for key in fixed if key in ("kind", "name", "output_dir") or key.startswith("cluster")]
        return or_raise([f"{key}: is set by the sweep" for key in owned], fixed)

    @field_validator("search", mode="after")
    @classmethod
    def _searchable(cls, search: dict[str, Distribution]) -> dict[str, Distribution]:
        problems = [
            f"{key}: is set by the sweep; it cannot be searched"
            for key in search
            if any(key == owned or key.startswith(f"{owned}.") for owned in _NOT_SEARCHED)
        ]
        problems += [
            f"{a}: is part of {b}, which is searched too" for a in search for b in search if a.startswith(f"{b}.")
        ]
        return or_raise(problems, search)

    @model_validator(mode="after")
    def _agreement(self) -> "TuneRun":
        problems = [
            f"fixed.{key}: is in search too; leave out one of the two" for key in self.fixed if key in self.search
        ]
        grid = self.grid_size
        has_grid = any(d.name == "grid" for d in self.search.values())
        if self.trials is None and not self.is_all_grid:
            problems.append("trials: missing; how many trials to make; only a grid alone has a number of its own")
        if self.trials is not None and has_grid and self.trials % grid:
            problems.append(
                f"trials: found: {self.trials}; expected: a multiple of {grid}, the size of the grid, or with a grid alone "
                f"no number"
            )
        if self.trials is not None and self.is_all_grid and self.trials > grid:
            problems.append(f"trials: found: {self.trials}, but the grid has {grid} points; leave trials out")
        if self.algorithm.name == "optuna" and has_grid:
            problems.append("algorithm.name: optuna does not go through grids; found: grid in search; expected: choice")
        if self.algorithm.name == "optuna":
            problems += [
                f"search.{key}: optuna leaves out the q of {d.name}; expected: loguniform, lograndint or choice"
                for key, d in self.search.items()
                if d.name.startswith("qlog")
            ]
        if self.limit_patience != TuneRun.model_fields["limit_patience"].default and not self.limit:
            problems.append("limit_patience: does nothing without limit; leave it out")
        return or_raise(problems, self)

    @property
    def grid_size(self) -> int:
        """Points of the grid part of the search."""
        return math.prod(len(d.arguments) for d in self.search.values() if d.name == "grid")

    @property
    def is_all_grid(self) -> bool:
        return all(d.name == "grid" for d in self.search.values())

    @property
    def num_trials(self) -> int:
        return self.trials or self.grid_size


def _leaf_keys(prefix: str, values: dict[Any, Any]) -> Iterator[tuple[str, Any]]:
    for key, value in values.items():
        is_section = isinstance(value, dict) and bool(value)
        yield from _leaf_keys(f"{prefix}{key}.", value) if is_section else [(f"{prefix}{key}", value)]


def _dotted_keys(prefix: str, search: dict[Any, Any]) -> Iterator[tuple[str, Any]]:
    for key, value in search.items():
        inner = isinstance(value, dict) and any(isinstance(v, dict) for v in value.values())
        yield from _dotted_keys(f"{prefix}{key}.", value) if inner else [(f"{prefix}{key}", value)]
