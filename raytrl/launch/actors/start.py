"""Starting actors in placement groups."""

import functools
import itertools
import os
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import Any

import ray
import ray.exceptions
from ray.util.placement_group import placement_group, remove_placement_group
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

from raytrl.config.runs.rollout import RolloutRun
from raytrl.config.sections.base import ProcessSection
from raytrl.config.sections.reward import RewardSection
from raytrl.config.sections.rollout import RolloutSection
from raytrl.errors import ResourceError
from raytrl.launch.actors.base import CONCURRENCY_GROUPS, MAX_IN_FLIGHT, WORK
from raytrl.launch.actors.reward import RewardActor
from raytrl.launch.actors.rollout import RolloutActor
from raytrl.launch.session.logs import start_log
from raytrl.launch.session.session import work_in
from raytrl.rundir import RunDirectory


@contextmanager
def started_actors(
    run: RolloutRun,
    make_engine: Callable[[], Any] | None,
    make_sources: Callable[[], Any] | None,
    group: Any = None,
) -> Iterator[tuple[list[Any], list[Any]]]:
    """Rollout and reward actors, loading. They belong to this process and end with it.

    Args:
        make_engine: None: no rollout actors.
        make_sources: None: no reward actors.
        group: a placement group of somebody else, who waited for it, with the `bundles` of these roles at its end; None:
            groups are made here.

    Raises:
        ResourceError: they could not all be placed in time.
    """
    # transformers samples one chunk at a time; calls to vLLM wait side by side for its continuous batch.
    threads = MAX_IN_FLIGHT if run.rollout.engine == "vllm" else 1
    # vLLM measures what a GPU has left, so there it loads last: when a learner that has loaded asks it to.
    waits = run.rollout.shares_gpu
    wanted = []
    if make_engine is not None:
        wanted.append(Role("rollout", RolloutActor, run.rollout, run.rollout.actors, make_engine, threads, waits))
    if make_sources is not None:
        wanted.append(Role("reward", RewardActor, run.reward, run.reward.actors, make_sources))
    limit = (run.rollout.start_timeout_s, "rollout.start_timeout_s")
    with placed_actors(run.output_dir, run.name, wanted, limit, group) as started:
        yield started.get("rollout", []), started.get("reward", [])


@dataclass(frozen=True)
class Role:
    """Actors of one kind."""

    name: str
    kind: type  # of `Actor`
    section: ProcessSection
    count: int
    make: Callable[[], Any]  # what an actor is given to make what it holds
    threads: int = 1  # calls that it works on at a time
    waits: bool = False  # it loads when it is first asked, not at once


@contextmanager
def placed_actors(
    output_dir: str, name: str, roles: Sequence[Role], limit: tuple[float, str], group: Any = None
) -> Iterator[dict[str, list[Any]]]:
    """Actors of a run by role, loading; as `started_actors`.

    Args:
        limit: seconds to place them all, and the key that says so.
    """
    places = _lent_places(group, [role.count for role in roles]) if group is not None else None
    own = [] if places is not None else [_group(role) for role in roles]
    try:
        deadline = time.monotonic() + limit[0]
        for placed, role in zip(own, roles, strict=False):
            if not placed.wait(max(0.1, deadline - time.monotonic())):
                raise _not_placed(role, limit)
        started: dict[str, list[Any]] = {role.name: [] for role in roles}
        for number, role in enumerate(roles):
            for rank in range(role.count):
                in_role = functools.partial(as_role, os.getcwd(), output_dir, name, role.name, rank, role.make)
                place = (own[number], rank) if places is None else next(places)
                actor = _make(*place, role.kind, role.section.resources, in_role, role.threads)
                if not role.waits:
                    actor.start.remote()  # not waited for: learners load at the same time
                started[role.name].append(actor)
        yield started
    finally:
        for placed in own if ray.is_initialized() else ():
            with suppress(ray.exceptions.RayError, ConnectionError):  # a cluster that is gone: what led here says so
                remove_placement_group(placed)


def _lent_places(group: Any, actors: Sequence[int]) -> Iterator[tuple[Any, int]]:
    """The places of `bundles` in somebody else's group; its owner may have bundles of his own before ours."""
    return ((group, index) for index in itertools.count(group.bundle_count - sum(actors)))


def bundles(section: RolloutSection | RewardSection) -> tuple[list[dict[str, float]], list[dict[str, str]]]:
    """One bundle an actor, none empty, and the labels that each asks of its node."""
    return _bundles(section, section.actors)


def _bundles(section: ProcessSection, count: int) -> tuple[list[dict[str, float]], list[dict[str, str]]]:
    return [dict(section.resources) or {"CPU": 0.001}] * count, [dict(section.labels)] * count


def _group(role: Role) -> Any:
    """A place for each actor; all are placed, or none."""
    section = role.section
    resources, labels = _bundles(section, role.count)
    return placement_group(
        resources,
        strategy=section.placement.upper(),
        bundle_label_selector=labels if section.labels else None,
        name=f"raytrl-{role.name}",
    )


def _not_placed(role: Role, limit: tuple[float, str]) -> ResourceError:
    section, (limit_s, key) = role.section, limit
    labels = f" on nodes with {', '.join(f'{key}={value}' for key, value in section.labels.items())}"
    return ResourceError(
        f"{role.name}.actors: could not be placed within {limit_s:g} s ({key}); found free: "
        f"{_amounts(ray.available_resources())} on {sum(node['Alive'] for node in ray.nodes())} nodes; expected: "
        f"{role.count} x {_amounts(section.resources)}{labels if section.labels else ''}, placed by {section.placement}"
    )


def as_role(cwd: str, output_dir: str, name: str, role: str, rank: int, make: Callable[[], Any]) -> Any:
    """What `make` makes, in an actor's process that is prepared for it; called once in each life of the actor."""
    work_in(cwd)
    start_log(RunDirectory(output_dir, name), role, rank)
    return make()


def _make(
    group: Any, place: int, kind: type, resources: Mapping[str, float], make: Callable[[], Any], threads: int
) -> Any:
    others = {name: amount for name, amount in resources.items() if name not in ("CPU", "GPU")}
    return (
        ray.remote(concurrency_groups=CONCURRENCY_GROUPS | {WORK: threads})(kind)
        .options(
            num_cpus=resources.get("CPU", 0),
            num_gpus=resources.get("GPU", 0),
            resources=others or None,
            max_restarts=-1,
            max_task_retries=0,  # Ray would run a call again on a reborn actor, with its first weights
            scheduling_strategy=PlacementGroupSchedulingStrategy(group, placement_group_bundle_index=place),
        )
        .remote(make)
    )


def _amounts(resources: Mapping[str, float]) -> str:
    return ", ".join(f"{name} {amount:g}" for name, amount in resources.items() if name in ("CPU", "GPU"))
