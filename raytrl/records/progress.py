"""What a run tells of its progress."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

# plan: what is about to start; phase: what is being done, and how far it is; notice: what to know; beat: nothing to tell, but
# work was done; earlier: of a step before this start.
# Who takes events lists every kind and ends in `assert_never`, so that mypy names each of them when one is added here.
ProgressKind = Literal["plan", "phase", "notice", "start", "step", "eval", "checkpoint", "beat", "failure", "earlier"]


@dataclass(frozen=True, slots=True)
class Progress:
    """What rank 0 of a learner tells the driver on its way (and any rank, for `failure`), or the driver its display."""

    kind: ProgressKind
    step: int = 0
    total_steps: int = 0
    text: str = ""  # phase, notice: words for people; failure: rank, node and cause
    words: tuple[tuple[str, str], ...] = ()  # plan: (subject, sentence) pairs for people
    metrics: Mapping[str, float] = field(default_factory=dict)
    details: str = ""  # failure: the traceback
    final: bool = False  # failure: a restart would fail the same way
    follows: bool = False  # failure: most likely of another worker's
    samples: tuple[Mapping[str, Any], ...] = ()  # step: rows for samples.jsonl
