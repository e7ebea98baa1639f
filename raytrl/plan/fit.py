"""Resources that nobody wrote, on a local Ray: as much of the machine as there is for each process."""

import math
from collections.abc import Mapping

from raytrl.config.load import LoadedRun
from raytrl.plan.cluster import Cluster
from raytrl.plan.where import THIS_MACHINE

LEAST_CPU = 0.1  # of a process; what would get less is refused, with what would fit

Chosen = Mapping[str, Mapping[str, float]]  # section → resources


def fitted(loaded: LoadedRun, cluster: Cluster) -> tuple[LoadedRun, Chosen]:
    """The run with resources that have room on this machine, and what was chosen; what somebody wrote is kept to.

    In a cluster nothing is chosen: others use it, too, and it may be larger than it looks.
    """
    groups = loaded.run.processes()
    unwritten = [each for each in groups if not each.resources_written]
    if cluster.where != THIS_MACHINE or not unwritten:
        return loaded, {}
    have = sum(node.resources.get("CPU", 0.0) for node in cluster.nodes)
    asked = sum(each.count * each.section.resources.get("CPU", 0.0) for each in groups)
    wanted = sum(each.count * each.section.resources.get("CPU", 0.0) for each in unwritten)
    share = math.floor(100 * (have - (asked - wanted)) / sum(each.count for each in unwritten)) / 100
    if asked <= have or share < LEAST_CPU:
        return loaded, {}
    chosen = {each.section_name: {"CPU": share} for each in unwritten}
    return with_chosen(loaded, chosen), chosen


def with_chosen(loaded: LoadedRun, chosen: Chosen) -> LoadedRun:
    """The run with these resources of its processes."""
    run = loaded.run
    sections = {name: getattr(run, name).model_copy(update={"resources": dict(each)}) for name, each in chosen.items()}
    origins = {f"{name}.resources": "chosen for this machine" for name in chosen}
    return LoadedRun(run.model_copy(update=sections), loaded.origins | origins, loaded.file)


def in_words(chosen: Chosen) -> list[str]:
    """What the user is told of it."""
    if not chosen:
        return []
    share = next(iter(chosen.values()))["CPU"]
    return [
        f"{', '.join(f'{name}.resources' for name in chosen)}: nobody wrote them, and CPU 1 for each process has no room on "
        f"this machine: each has CPU {share:g}"
    ]
