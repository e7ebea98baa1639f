"""The base of every section of a run file."""

from pydantic import BaseModel, ConfigDict


class Section(BaseModel):
    """Frozen, and refuses keys it does not know."""

    model_config = ConfigDict(extra="forbid", frozen=True, protected_namespaces=())
