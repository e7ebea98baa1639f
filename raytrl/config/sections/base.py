"""The base of every section of a run file."""

import math
from typing import Annotated, Any, Literal, Self

from pydantic import (
    AfterValidator,
    BaseModel,
    ConfigDict,
    Field,
    ValidationInfo,
    field_validator,
    model_validator,
)

from raytrl.config.foreign.native import is_word_for_bool, words_for_bools

# How processes go on nodes, by Ray's names: on few, on many, all on one, each on another.
Strategy = Literal["pack", "spread", "strict_pack", "strict_spread"]


class Section(BaseModel):
    """Frozen, and refuses keys it does not know. The text below a field is what `config show --describe` says of it."""

    model_config = ConfigDict(
        extra="forbid", frozen=True, protected_namespaces=(), use_attribute_docstrings=True, allow_inf_nan=False
    )

    @model_validator(mode="before")
    @classmethod
    def _null_section(cls, values: Any) -> Any:
        """A section with nothing below its name reads as null in YAML: as good as left out."""
        if not isinstance(values, dict):
            return values
        sections = {k for k, field in cls.model_fields.items() if isinstance(field.default, dict | Section)}
        return {key: value for key, value in values.items() if value is not None or key not in sections}

    @field_validator("*", mode="before")
    @classmethod
    def _true_or_false(cls, value: Any, info: ValidationInfo) -> Any:
        if is_word_for_bool(cls.model_fields[str(info.field_name)].annotation, value):
            raise ValueError(f"found: {value!r}; expected: true or false")
        return value


def _above_zero(resources: dict[str, float]) -> dict[str, float]:
    if not resources or not all(0 < amount < math.inf for amount in resources.values()):
        raise ValueError(f"found: {resources}; expected: positive amounts, such as {{CPU: 1}}")
    return resources


def as_list(value: Any) -> Any:
    """One text stands for a list of it."""
    return [value] if isinstance(value, str) else value


def _no_words_for_bools(arguments: dict[str, Any]) -> dict[str, Any]:
    if problems := words_for_bools("", arguments):
        raise ValueError("\n".join(problems))
    return arguments


# What is passed on to another library as it is.
NativeArguments = Annotated[dict[str, Any], AfterValidator(_no_words_for_bools)]


class ProcessSection(Section):
    """Processes of one role: what each takes, and where they go."""

    resources: Annotated[dict[str, float], AfterValidator(_above_zero)] = Field(default={"CPU": 1})
    """What each process takes, by Ray's names: CPU, GPU or a cluster's own. On GPU nodes {GPU: 1}."""
    placement: Strategy = "pack"
    """How the processes go on nodes: pack (on few), spread (on many), strict_pack (all on one), strict_spread (each on
    another)."""
    labels: dict[str, str] = Field(default={})
    """Only nodes with these labels, in Ray's label selectors: a value, !value, in(a, b) or !in(a, b). {}: any node."""

    def chosen(self, **names: str | int) -> Self:
        """A copy with auto replaced; what was written in the run file stays the only part that counts as written."""
        copy = self.model_copy()
        copy.__dict__.update(names)
        return copy

    @property
    def gpus(self) -> float:
        """Of each process."""
        return self.resources.get("GPU", 0)

    @property
    def shares_gpu(self) -> bool:
        """Whether other processes may have the rest of its GPU."""
        return 0 < self.gpus < 1

    @property
    def uses_gpu(self) -> bool:
        return self.gpus > 0
