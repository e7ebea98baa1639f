"""Starting rollout and reward actors in placement groups."""

import functools
import itertools
import os
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import ray
import ray.exceptions
from ray.util.placement_group import placement_group, remove_placement_group
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

from raytrl.config.runs.rollout import RolloutRun
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
    roles: list[tuple[str, type, RolloutSection | RewardSection, Callable[[], Any] | None]] = [
        ("rollout", RolloutActor, run.rollout, make_engine),
        ("reward", RewardActor, run.reward, make_sources),
    ]
    wanted = [(role, kind, section, make) for role, kind, section, make in roles if make is not None]
    places = _lent_places(group, [section.actors for _, _, section, _ in wanted]) if group is not None else None
    own = [] if places is not None else [_group(section, role) for role, _, section, _ in wanted]
    try:
        deadline = time.monotonic() + run.rollout.start_timeout_s
        for placed, (role, _, section, _) in zip(own, wanted, strict=False):
            if not placed.wait(max(0.1, deadline - time.monotonic())):
                raise _not_placed(section, role, run.rollout.start_timeout_s)
        # transformers samples one chunk at a time; calls to vLLM wait side by side for its continuous batch.
        threads = MAX_IN_FLIGHT if run.rollout.engine == "vllm" else 1
        started: dict[str, list[Any]] = {"rollout": [], "reward": []}
        for number, (role, kind, section, make) in enumerate(wanted):
            for rank in range(section.actors):
                in_role = functools.partial(as_role, os.getcwd(), run.output_dir, run.name, role, rank, make)
                place = (own[number], rank) if places is None else next(places)
                actor = _make(*place, kind, section.resources, in_role, threads if role == "rollout" else 1)
                # vLLM measures what a GPU has left, so there it loads last: when a learner that has loaded asks it to.
                if not (role == "rollout" and section.shares_gpu):
                    actor.start.remote()  # not waited for: learners load at the same time
                started[role].append(actor)
        yield started["rollout"], started["reward"]
    finally:
        if ray.is_initialized():
            for placed in own:
                remove_placement_group(placed)


def _lent_places(group: Any, actors: Sequence[int]) -> Iterator[tuple[Any, int]]:
    """The places of `bundles` in somebody else's group; its owner may have bundles of his own before ours."""
    return ((group, index) for index in itertools.count(group.bundle_count - sum(actors)))


def bundles(section: RolloutSection | RewardSection) -> tuple[list[dict[str, float]], list[dict[str, str]]]:
    """One bundle an actor, none empty, and the labels that each asks of its node."""
    return [dict(section.resources) or {"CPU": 0.001}] * section.actors, [dict(section.labels)] * section.actors


def _group(section: RolloutSection | RewardSection, role: str) -> Any:
    """A place for each actor; all are placed, or none."""
    resources, labels = bundles(section)
    return placement_group(
        resources,
        strategy=section.placement.upper(),
        bundle_label_selector=labels if section.labels else None,
        name=f"raytrl-{role}",
    )


def _not_placed(section: RolloutSection | RewardSection, role: str, limit_s: float) -> ResourceError:
    labels = f" on nodes with {', '.join(f'{key}={value}' for key, value in section.labels.items())}"
    return ResourceError(
        f"{role}.actors: could not be placed within {limit_s:g} s (rollout.start_timeout_s); found free: "
        f"{_amounts(ray.available_resources())} on {sum(node['Alive'] for node in ray.nodes())} nodes; expected: "
        f"{section.actors} x {_amounts(section.resources)}{labels if section.labels else ''}, placed by "
        f"{section.placement}"
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
