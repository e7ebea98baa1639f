"""What `raytrl plan` works out."""

from collections.abc import Mapping
from dataclasses import dataclass


@dataclass(frozen=True)
class PlannedRole:
    """Equal processes of a run that was only planned."""

    key: str  # of the run file, for their number
    count: int
    each: str  # resources
    nodes: Mapping[str, int]  # processes by node
    memory_gib: Mapping[str, float]  # of each, by what it is for; empty where it is not known
    device: str  # whose memory that is: GPU or RAM
    room_gib: float | None  # what is there for each; None where nobody knows
    host_gib: float  # RAM of each beside its GPU


@dataclass(frozen=True)
class Plan:
    """What would run where; nothing was started."""

    where: str
    roles: tuple[PlannedRole, ...]
    words: tuple[tuple[str, str], ...]  # (subject, sentence)
    shared: tuple[tuple[str, float, float | None], ...]  # (RAM or GPUs of a node, taken by all, there), GiB
    notes: tuple[str, ...]  # what does nothing, what is not known, what is tight
