"""The base of every section of a run file."""

from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, model_validator

# How processes go on nodes, by Ray's names: on few, on many, all on one, each on another.
Strategy = Literal["pack", "spread", "strict_pack", "strict_spread"]


class Section(BaseModel):
    """Frozen, and refuses keys it does not know."""

    model_config = ConfigDict(extra="forbid", frozen=True, protected_namespaces=())

    @model_validator(mode="before")
    @classmethod
    def _null_section(cls, values: Any) -> Any:
        """A section with nothing below its name reads as null in YAML: as good as left out."""
        if not isinstance(values, dict):
            return values
        sections = {k for k, field in cls.model_fields.items() if isinstance(field.default, dict | Section)}
        return {key: value for key, value in values.items() if value is not None or key not in sections}
