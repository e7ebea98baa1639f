"""`raytrl plan`: what a run file would run where, whether it fits, and how large a step is. Starts nothing."""

from collections.abc import Sequence

from raytrl.config.load import LoadedRun
from raytrl.config.runs.ppo import PpoRun
from raytrl.errors import ConfigError, UncountedError
from raytrl.plan.capacity import CERTAINTY, Load, Room, check_memory
from raytrl.plan.checks.common import check_rows
from raytrl.plan.cluster import ADDED, Cluster, Node, amounts
from raytrl.plan.fit import fitted, in_words
from raytrl.plan.lag import lag_note
from raytrl.plan.memory import GIB, Estimate, estimates
from raytrl.plan.need import need_of
from raytrl.plan.shapes import read_shapes
from raytrl.plan.tried import facts_of
from raytrl.plan.where import THIS_MACHINE
from raytrl.plan.words import words_of
from raytrl.records.plan import Plan, PlannedRole


def plan(loaded: LoadedRun, cluster: Cluster, models: str = "") -> Plan:
    """Works out the plan of a run.

    Args:
        cluster: the nodes that the run would have: asked for by the session, or described by the user.
        models: a folder that holds `<path>/config.json` of models that are not on this machine.

    Raises:
        ConfigError: it cannot run there; the message has the numbers and the nearest change that would fit.
    """
    loaded, chosen = fitted(loaded, cluster)
    run = loaded.run
    room = Room.on(cluster, need_of(run))
    shapes, unread = read_shapes(run, models)
    problems = [str(error) for error in unread if not isinstance(error, UncountedError)]
    facts, missing = facts_of(run)
    rows = facts.rows
    told = {problem.partition(":")[0] for problem in problems}
    problems += [problem for problem in missing if problem.partition(":")[0] not in told]  # one of each key
    check_rows(run, rows)
    if problems and room.where == THIS_MACHINE:
        raise ConfigError("\n".join(problems))
    notes = [*in_words(chosen), *facts.notices]
    notes += [f"not known here, so not checked: {problem}" for problem in problems]
    notes += run.assumed()
    notes += [f"memory is not estimated: {error}" for error in unread if isinstance(error, UncountedError)]
    found, tight = check_memory(run, room, shapes)
    notes += [
        f"{each.key}: {each.count} is the least that is needed; up to {each.most} where there is room"
        for each in run.processes()
        if each.count < each.most
    ]
    notes += [*tight, *room.emulated(run), *room.awaited(run)]
    if isinstance(run, PpoRun) and (told_of_lag := lag_note(run)) is not None:
        notes.append(told_of_lag)
    notes += [f"does nothing: {line}" for line in run.idle_settings(run.steps(rows))]
    return Plan(
        where=f"{room.where}: {_sum_of([node for node in room.nodes if not node.name.startswith(ADDED)])}",
        roles=tuple(_roles(room, estimates(run, shapes))),
        words=tuple(words_of(run, shapes, facts)),
        shared=tuple(_shared(found)),
        notes=tuple(notes),
    )


def _sum_of(nodes: Sequence[Node]) -> str:
    kinds: dict[str, int] = {}
    for node in nodes:
        parts = [amounts({n: a for n, a in node.resources.items() if a and n in ("CPU", "GPU")})]
        parts += [f"{node.gpu_gib:.0f} GiB a GPU"] if node.gpu_gib and node.resources.get("GPU") else []
        parts += [f"{node.ram_gib:.0f} GiB RAM"] if node.ram_gib else []
        kinds[", ".join(parts)] = kinds.get(", ".join(parts), 0) + 1
    return "; ".join(f"{count} x {text}" for text, count in kinds.items())


def _roles(room: Room, found: dict[str, Estimate]) -> list[PlannedRole]:
    by_name, roles = {node.name: node for node in room.nodes}, []
    for group in room.need.groups:
        estimate, places = found.get(group.key), room.placement.places.get(group.key, {})
        gpus = group.resources.get("GPU", 0.0)
        there = [by_name[name].gpu_gib if gpus else by_name[name].ram_gib for name in places]
        known = [size for size in there if size is not None]
        share = (estimate.share if estimate is not None and gpus else 0.0) or 1.0
        roles.append(
            PlannedRole(
                key=group.key,
                count=group.count,
                each=amounts(group.resources),
                nodes=places,
                memory_gib={} if estimate is None else {n: size / GIB for n, size in estimate.parts.items()},
                device="GPU" if gpus else "RAM",
                room_gib=min(known) * share if known and len(known) == len(there) else None,
                host_gib=0.0 if estimate is None else estimate.host / GIB,
            )
        )
    return roles


def _shared(found: Sequence[Load]) -> list[tuple[str, float, float | None]]:
    """What all processes of a node take together: of its RAM, and of GPUs that they share."""
    together = [load for load in found if not load.what.startswith("each of ")]
    return [(load.what.removeprefix("all processes on the "), load.taken, load.there) for load in together]


RULE = (
    f"Memory is estimated for rows as long as the file allows, and is refused only where {1 / CERTAINTY:.0%} of the "
    f"estimate would not fit."
)
