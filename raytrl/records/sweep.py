"""What is known of a sweep's trials."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class Trial:
    """One trial of a sweep, as trials.json and the tables show it."""

    name: str  # its run directory is <sweep>/trials/<name>
    values: Mapping[str, Any]  # of the searched keys
    state: str = "waiting"  # waiting | running | done | over limit | stopped | failed
    cause: str = ""  # over limit, stopped, failed: why
    step: int = 0
    metrics: Mapping[str, float] = field(default_factory=dict)  # last values of the metrics that a sweep looks at
    seconds: float = 0.0  # from its first start to its end, waiting for Ray included

    @property
    def is_ended(self) -> bool:
        """Whether its part in the sweep is over; a failed trial is tried again when the sweep is started again."""
        return self.state not in ("waiting", "running")
