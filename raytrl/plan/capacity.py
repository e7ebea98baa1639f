"""Whether the memory that a run would take is there: the check that every run makes before it starts."""

import shlex
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

from raytrl.config.load import overrides_of
from raytrl.config.runs.base import Run
from raytrl.errors import ResourceError
from raytrl.plan.cluster import ADDED, Cluster, Group, Need, Node
from raytrl.plan.config_shapes import ModelShape
from raytrl.plan.memory import GIB, Estimate, estimates
from raytrl.plan.placement import Placement, check_placement
from raytrl.plan.where import THIS_MACHINE
from raytrl.roles.device import has_cpu_bf16

# Estimates were 0.85 to 1.09 of the peaks of learners measured on CPUs, 0.60 to 1.03 of those of small rollout and reward
# actors (a forward pass leaves more with the allocator than it needs), and none was measured on a GPU (see
# tests/benchmarks/plan_memory.py): what would not fit with a quarter less is refused, what fits only so is said.
CERTAINTY = 1.25
# The driver, Ray's own processes and its dashboard, on the node that the run is started on; measured on Linux.
DRIVER_GIB = 1.2

RunT = TypeVar("RunT", bound=Run)


@dataclass(frozen=True)
class Load:
    """Memory of one thing (a GPU's share, a node's RAM) that a run would take, and what is there; GiB."""

    what: str
    taken: float
    there: float | None
    parts: str = ""

    def __str__(self) -> str:
        return f"{self.what} {self.taken:.1f}{f' of {self.there:.1f}' if self.there else ''} GiB"

    @property
    def share(self) -> float:
        """Of what is there; 0 where nobody knows that."""
        return self.taken / self.there if self.there else 0.0

    @property
    def is_impossible(self) -> bool:
        return self.there is not None and self.taken > CERTAINTY * self.there

    @property
    def is_tight(self) -> bool:
        return self.there is not None and self.taken > self.there


@dataclass(frozen=True)
class Room:
    """Where the processes of a run go: every one has its place."""

    need: Need
    nodes: Sequence[Node]
    where: str  # name of the machine or cluster, for messages
    placement: Placement

    @classmethod
    def on(cls, cluster: Cluster, need: Need) -> "Room":
        """Finds the places; on nodes to come only what has none on those that are there.

        Raises:
            ResourceError: there is none for some process, and the cluster does not grow.
        """
        try:
            placement = check_placement(need, cluster.nodes, cluster.where)
        except ResourceError:
            if not cluster.grows:
                raise
            cluster = cluster.with_added(need)
            placement = check_placement(need, cluster.nodes, cluster.where)
        used = {name for places in placement.places.values() for name in places}
        there = [node for node in cluster.nodes if node.name in used or not node.name.startswith(ADDED)]
        return cls(need, there, cluster.where, placement)

    def awaited(self, run: Run) -> list[str]:
        """What the user should know of nodes that are not there yet."""
        places = self.placement.places.items()
        waiting = {key: sum(n for node, n in on.items() if node.startswith(ADDED)) for key, on in places}
        if not any(waiting.values()):
            return []
        limits = [
            f"{each.section_name}.start_timeout_s {limit:g} s"
            for each in run.processes()
            if (limit := getattr(each.section, "start_timeout_s", None)) is not None
        ]
        return [
            f"no room yet for {', '.join(f'{count} of {key}' for key, count in waiting.items() if count)}: the autoscaler of "
            f"{self.where} has to add nodes; what it may add Ray does not tell, so the run waits for them and fails when "
            f"they do not come ({', '.join(limits)})"
        ]

    def emulated(self, run: Run) -> list[str]:
        """A notice where processes without GPU are asked for bf16, and the CPU of this machine has none."""
        if self.where != THIS_MACHINE or not (keys := run.bf16_on_cpu()) or has_cpu_bf16():
            return []
        return [
            f"{', '.join(keys)}: this CPU has no bf16 arithmetic; torch emulates it, up to a hundred times slower than float32"
        ]

    def loads(self, found: Mapping[str, Estimate]) -> list[Load]:
        """`loads` of one run."""
        return loads([(self.need, self.placement)], self.nodes, found)


def loads(placed: Sequence[tuple[Need, Placement]], nodes: Sequence[Node], found: Mapping[str, Estimate]) -> list[Load]:
    """What each process takes of its GPU, and all processes of a node together of its GPUs and its RAM.

    Args:
        placed: what runs side by side, and where: one run, or the trials of a sweep.
        found: memory of one process by the key of its number; processes without are not counted.
    """
    by_name, each = {node.name: node for node in nodes}, dict[str, Load]()
    ram, on_gpus = dict[str, float](), dict.fromkeys(by_name, 0.0)
    shared, mapped = set[str](), dict[tuple[str, str], float]()  # nodes where processes share a GPU; pages of files
    for group, places in _places(placed):
        if (estimate := found.get(group.key)) is None:
            continue
        gpus = group.resources.get("GPU", 0.0)
        for name, count in places.items():
            own = estimate.host if gpus else estimate.total - estimate.mapped
            ram[name] = ram.get(name, 0.0) + count * own / GIB
            whole = estimate.share * (by_name[name].gpu_gib or 0.0)
            on_gpus[name] += count * max(estimate.total / GIB, whole) if gpus else 0.0
            mapped[name, group.key] = 0.0 if gpus else estimate.mapped / GIB
        if gpus:
            shared |= set(places) if gpus % 1 else set()
            smallest = min((size for name in places if (size := by_name[name].gpu_gib) is not None), default=None)
            there = smallest and smallest * max(1.0, gpus) * (estimate.share or 1.0)
            if group.key not in each or (there or 0.0) < (each[group.key].there or 0.0):
                what = f"each of {group.key} {'in its share of' if estimate.share else 'on'} its GPU"
                each[group.key] = Load(what, estimate.total / GIB, there, _words(estimate))
    for (name, _), size in mapped.items():  # once on a node, however many processes hold them
        ram[name] += size
    result = list(each.values())
    for i, (name, node) in enumerate(by_name.items()):
        if name in shared and node.gpu_gib is not None:
            there = node.gpu_gib * node.resources.get("GPU", 0.0)
            result.append(Load(f"all processes on the GPUs of {name}", on_gpus[name], there))
        if name in ram:
            result.append(Load(f"RAM of {name}", ram[name] + (DRIVER_GIB if i == 0 else 0.0), node.ram_gib))
    return result


def _places(placed: Sequence[tuple[Need, Placement]]) -> Iterator[tuple[Group, Mapping[str, int]]]:
    for need, placement in placed:
        for group in need.groups:
            yield group, placement.places.get(group.key, {})


def check_memory(run: Run, room: Room, shapes: Mapping[str, ModelShape]) -> tuple[list[Load], list[str]]:
    """Refuses a run that is clearly too large: where even the estimate less its error is more than is there.

    Returns:
        What would be taken of what, and words about what is tight.

    Raises:
        ResourceError: with the numbers, and the nearest change that would fit.
    """
    found = room.loads(estimates(run, shapes))
    impossible = [load for load in found if load.is_impossible]
    if impossible:
        lines = [
            f"memory: {load.what}: needs about {load.taken:.1f} GiB{load.parts}; found: {load.there or 0:.1f} GiB on "
            f"{room.where}"
            for load in impossible
        ]
        change = _nearest(run, room, shapes)
        lines[-1] += f"; would fit by this estimate: {change}" if change else "; no single setting would make it fit"
        raise ResourceError("\n".join(lines))
    tight = [
        f"memory is tight: {load.what}: about {load.taken:.1f} of {load.there or 0:.1f} GiB, and the estimate may be off "
        f"by a quarter"
        for load in found
        if load.is_tight
    ]
    return found, tight


def _words(estimate: Estimate) -> str:
    return (
        " (" + ", ".join(f"{name} {size / GIB:.1f}" for name, size in estimate.parts.items() if size >= GIB / 20) + ")"
    )


def _nearest(run: Run, room: Room, shapes: Mapping[str, ModelShape]) -> str | None:
    """The first setting, or all of them one after the other, with which nothing is impossible any more."""

    def fits(smaller: Run) -> bool:
        found = room.loads(estimates(smaller, shapes))
        return not any(load.is_impossible for load in found)

    together, texts = run, list[str]()
    for values in run.savings():
        if fits(changed(run, values)):
            return shlex.join(overrides_of(values))
    for values in run.savings():
        together = changed(together, values)
        texts.append(shlex.join(overrides_of(values)))
        if fits(together):
            return " ".join(texts)
    return None


def changed(run: RunT, values: Mapping[str, Any]) -> RunT:
    """The run with other values at dotted keys; not checked again."""
    for key, value in values.items():
        top, _, name = key.partition(".")
        section = getattr(run, top)
        if name and isinstance(section, dict):
            value = {**section, name: value}
        elif name:
            value = section.model_copy(update={name: value})
        run = run.model_copy(update={top: value})
    return run
