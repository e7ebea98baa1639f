"""What a run tells of its progress."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True, slots=True)
class Progress:
    """What rank 0 of a learner tells the driver on its way (and any rank, for `failure`)."""

    kind: (
        str  # phase | notice | start | step | eval | checkpoint | done | failure; earlier: of a step before this start
    )
    step: int = 0
    total_steps: int = 0
    text: str = ""  # phase: what is being done; notice: what to know; failure: rank, node and cause
    metrics: Mapping[str, float] = field(default_factory=dict)
    details: str = ""  # failure: the traceback
    final: bool = False  # failure: a restart would fail the same way
    samples: tuple[Mapping[str, Any], ...] = ()  # step: rows for samples.jsonl
