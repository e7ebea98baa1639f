"""Ray's side of the pools: starting actors in one placement group, and calling them."""

import functools
import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import ray
import ray.exceptions
from ray.util.placement_group import placement_group, remove_placement_group
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

from raytrl.config.eval_run import EvalRun
from raytrl.config.ppo_run import PpoRun
from raytrl.errors import ResourceError
from raytrl.launch.actors import CONCURRENCY_GROUPS, CONTROL, STATUS, RewardActor, RolloutActor
from raytrl.launch.pool import ActorLostError

# Which calls do not queue behind the long ones.
_GROUPS = {"begin": CONTROL, "prepare": CONTROL, "start": CONTROL, "load_weights": CONTROL, "doing": STATUS}
_FINAL_AFTER = 10  # answers "died" in a row, half a second apart: it is not coming back


class RayCalls:
    """`pool.Calls` on Ray actors."""

    def __init__(self, handles: Sequence[Any]) -> None:
        self._handles = handles
        self._actor_of: dict[Any, int] = {}
        self._deaths = [0] * len(handles)

    def __len__(self) -> int:
        return len(self._handles)

    def call(self, actor: int, method: str, *arguments: Any) -> Any:
        remote = getattr(self._handles[actor], method)
        if method in _GROUPS:
            remote = remote.options(concurrency_group=_GROUPS[method])
        ticket = remote.remote(*arguments)
        self._actor_of[ticket] = actor
        return ticket

    def wait(self, tickets: Sequence[Any], timeout_s: float) -> list[Any]:
        if not tickets:
            return _nothing_for(timeout_s)
        ready, _ = ray.wait(list(tickets), num_returns=1, timeout=timeout_s)
        if ready:
            ready, _ = ray.wait(list(tickets), num_returns=len(tickets), timeout=0)
        return list(ready)

    def result(self, ticket: Any) -> Any:
        actor = self._actor_of.pop(ticket)
        try:
            answer = ray.get(ticket)
        except ray.exceptions.RayTaskError as error:
            self._deaths[actor] = 0
            raise error.cause if isinstance(error.cause, Exception) else error from None
        except ray.exceptions.RayError as error:  # died, restarting, unreachable, its answer lost with its node
            self._deaths[actor] += isinstance(error, ray.exceptions.ActorDiedError)
            text = f"{type(error).__name__}: {str(error).strip().splitlines()[0]}"
            raise ActorLostError(text, final=self._deaths[actor] >= _FINAL_AFTER) from None
        self._deaths[actor] = 0
        return answer


def _nothing_for(seconds: float) -> list[Any]:
    import threading

    threading.Event().wait(seconds)
    return []


@contextmanager
def started_actors(
    run: PpoRun | EvalRun,
    make_engine: Callable[[], Any] | None,
    make_sources: Callable[[], Any] | None,
    group: Any = None,
) -> Iterator[tuple[list[Any], list[Any]]]:
    """Rollout and reward actors, loading. They belong to this process and end with it.

    Args:
        make_engine: None: no rollout actors.
        make_sources: None: no reward actors.
        group: a placement group with `actor_bundles` in it, somebody else's, who waited for it; None: made here.

    Raises:
        ResourceError: they could not all be placed in time.
    """
    num_rollout = run.rollout.actors if make_engine else 0
    num_reward = run.reward.actors if make_sources else 0
    is_own = group is None
    if is_own:
        group = placement_group(actor_bundles(run, num_rollout, num_reward), strategy="PACK")
        _wait_placed(group, run, num_rollout, num_reward)
    try:
        # Its owner may have bundles of his own in it, before ours.
        places = itertools.count(group.bundle_count - num_rollout - num_reward)
        start = functools.partial(_start, group)
        rollout = [start(next(places), RolloutActor, run.rollout.resources, make_engine) for _ in range(num_rollout)]
        reward = [start(next(places), RewardActor, run.reward.resources, make_sources) for _ in range(num_reward)]
        yield rollout, reward
    finally:
        if is_own and ray.is_initialized():
            remove_placement_group(group)


def actor_bundles(run: PpoRun | EvalRun, num_rollout: int, num_reward: int) -> list[dict[str, float]]:
    """The bundles of a placement group for these actors; no bundle may be empty."""
    bundles = [dict(run.rollout.resources)] * num_rollout + [dict(run.reward.resources)] * num_reward
    return [bundle or {"CPU": 0.001} for bundle in bundles]


def _wait_placed(group: Any, run: PpoRun | EvalRun, num_rollout: int, num_reward: int) -> None:
    if not group.wait(run.rollout.start_timeout_s):
        remove_placement_group(group)
        raise ResourceError(
            f"rollout.actors, reward.actors: could not be placed within {run.rollout.start_timeout_s:g} s "
            f"(rollout.start_timeout_s); found free: {_amounts(ray.available_resources())}; expected: "
            f"{num_rollout} x {_amounts(run.rollout.resources)} and {num_reward} x "
            f"{_amounts(run.reward.resources)}"
        )


def _start(group: Any, place: int, kind: type, resources: Mapping[str, float], make: Any) -> Any:
    others = {name: amount for name, amount in resources.items() if name not in ("CPU", "GPU")}
    actor = (
        ray.remote(concurrency_groups=CONCURRENCY_GROUPS)(kind)
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
    actor.start.options(concurrency_group=CONTROL).remote()  # not waited for: learners load at the same time
    return actor


def _amounts(resources: Mapping[str, float]) -> str:
    return ", ".join(f"{name} {amount:g}" for name, amount in resources.items() if name in ("CPU", "GPU"))
