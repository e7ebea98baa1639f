"""Which process would run on which node: Ray's packing, worked out before anything is started."""

import bisect
import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

from raytrl.errors import ResourceError
from raytrl.plan.cluster import Group, Need, Node, amounts

_SLACK = 1e-6  # sums of fractions such as 0.1


@dataclass
class Placement:
    """Key of a group → node name → how many of its processes."""

    places: dict[str, dict[str, int]] = field(default_factory=dict)


def check_placement(need: Need, nodes: Sequence[Node], where: str) -> Placement:
    """Refuses what could only wait for ever: in all, or because no node has room for one of the processes.

    Args:
        nodes: what there is, empty.
        where: its name, for the message.

    Raises:
        ResourceError: with the numbers, and the nearest change that would fit.
    """
    have: dict[str, float] = {}
    for node in nodes:
        for name, amount in node.resources.items():
            have[name] = have.get(name, 0.0) + amount
    lacking = {name: amount for name, amount in need.total.items() if amount > have.get(name, 0.0) + _SLACK}
    if lacking:
        needs = ", ".join(f"{amount:g} {name}" for name, amount in lacking.items())
        there = ", ".join(f"{have.get(name, 0.0):g} {name}" for name in lacking)
        raise ResourceError(f"{need} need {needs}; found: {there} on {where}{_nearest(need, nodes)}")
    placement = place(need.groups, nodes)
    if placement is None:
        raise ResourceError(
            f"{need}: enough in all, but not node by node: {_misfit(need, nodes)}; found on {where}: {_kinds(nodes)}"
            + _nearest(need, nodes)
        )
    return placement


def place(groups: Sequence[Group], nodes: Sequence[Node]) -> Placement | None:
    """Where the processes would go, or None where there is no room.

    Ray places one group after the other. That order is tried first; an arrangement that another order finds counts as
    room too, so that nothing that fits is refused by accident.
    """
    wanted = [group for group in groups if group.count]
    for order in itertools.permutations(wanted):
        placement = _packed(order, nodes)
        if placement is not None:
            return placement
    return None


def place_trials(shared: Need, trial: Need, nodes: Sequence[Node], most: int) -> list[Placement]:
    """Where the processes of equal trials have room at the same time, up to `most` trials.

    They are placed one after the other: a sum over the cluster would promise trials that no node has room for, and they
    would wait for one another.

    Args:
        shared: what runs once for all of them.
        nodes: what there is, empty.

    Returns:
        The shared processes' places, then each trial's; empty where not even the shared ones have room.
    """
    placements: list[Placement] = []
    for need in [shared, *[trial] * most]:
        placement = place(need.groups, nodes)
        if placement is None:
            break
        placements.append(placement)
        nodes = _left(need.groups, placement, nodes)
    return placements


def _left(groups: Sequence[Group], placement: Placement, nodes: Sequence[Node]) -> list[Node]:
    """The nodes without what these processes take."""
    left = []
    for node in nodes:
        free = dict(node.resources)
        for group in groups:
            for name, amount in group.resources.items():
                free[name] = free.get(name, 0.0) - amount * placement.places.get(group.key, {}).get(node.name, 0)
        left.append(replace(node, resources=free))
    return left


def _packed(groups: Sequence[Group], nodes: Sequence[Node]) -> Placement | None:
    free = {node.name: dict(node.resources) for node in nodes}
    placement = Placement()
    for group in groups:
        mine = {node.name: 0 for node in nodes if group.may_use(node)}
        while (left := group.count - sum(mine.values())) > 0:
            best = _next_node(group, mine, free, left)
            if best is None:
                return None
            number = 1 if group.strategy.endswith("spread") else _room(free[best], group.resources, left)
            mine[best] += number
            for name, amount in group.resources.items():
                free[best][name] = free[best].get(name, 0.0) - number * amount
        placement.places[group.key] = {name: count for name, count in mine.items() if count}
    return placement


def _next_node(group: Group, mine: Mapping[str, int], free: Mapping[str, Mapping[str, float]], left: int) -> str | None:
    """The node that takes the group's next processes, as Ray's strategy would; None where none may and can."""
    room = {name: _room(free[name], group.resources, left) for name in mine}
    if group.strategy == "strict_spread":
        room = {name: count for name, count in room.items() if not mine[name]}
    if group.strategy == "strict_pack":
        room = {name: count for name, count in room.items() if count == left}
    room = {name: count for name, count in room.items() if count}
    if not room:
        return None
    # Among equals Ray takes the node that is left with the least: those without GPUs are for who needs none.
    least = {name: (-free[name].get("GPU", 0.0), -free[name].get("CPU", 0.0)) for name in room}
    if group.strategy.endswith("spread"):
        return max(room, key=lambda name: (-mine[name], *least[name]))
    return max(room, key=lambda name: (room[name], *least[name]))


def _room(free: Mapping[str, float], resources: Mapping[str, float], most: int) -> int:
    """How many of these processes there is room for, up to `most`."""
    fits = [int((free.get(name, 0.0) + _SLACK) / amount) for name, amount in resources.items() if amount > 0]
    return max(0, min([most, *fits]))


def _misfit(need: Need, nodes: Sequence[Node]) -> str:
    for group in need.groups:
        if _packed([group], nodes) is None:
            most = _most(group, [group], nodes)
            how = "" if group.strategy == "pack" else f", {group.strategy}"
            where = f" on nodes with {', '.join(f'{k}={v}' for k, v in group.labels.items())}" if group.labels else ""
            return f"there is room for {most} of {group.key}: {group.count} x {amounts(group.resources)}{how}{where}"
    return "each role has room alone, but not all together"


def _most(group: Group, groups: Sequence[Group], nodes: Sequence[Node]) -> int:
    """The most processes of one group, fewer than it has, that there is room for beside the others; 0: not even one."""

    def too_many(count: int) -> bool:
        return place([replace(g, count=count) if g is group else g for g in groups], nodes) is None

    return bisect.bisect_left(range(1, group.count), True, key=too_many)


def _nearest(need: Need, nodes: Sequence[Node]) -> str:
    """The words for the smallest change of one number that would fit; empty where there is none."""
    fitting = []
    for group in need.groups:
        if count := _most(group, need.groups, nodes):
            fitting.append((group.count - count, f"{group.key}={count}"))
    if fitting:
        return "; would fit: " + " or ".join(text for _, text in sorted(fitting))
    for group in need.groups:
        if not any(_room(node.resources, group.resources, 1) for node in nodes):
            largest = {name: max(node.resources.get(name, 0.0) for node in nodes) for name in group.resources}
            return (
                f"; no node has room for one process of {group.key}, {amounts(group.resources)}; the most that a node has: "
                f"{amounts(largest)}"
            )
    return "; expected: more nodes, or smaller resources of each process"


def _kinds(nodes: Sequence[Node]) -> str:
    kinds: dict[str, int] = {}
    for node in nodes:
        text = amounts({name: amount for name, amount in node.resources.items() if amount and name in ("CPU", "GPU")})
        kinds[text or "nothing"] = kinds.get(text or "nothing", 0) + 1
    return "; ".join(f"{count} x {text}" for text, count in kinds.items())
