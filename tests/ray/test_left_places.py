"""Placement groups whose maker is dead are given back; those of the living are not."""

import time
from collections.abc import Iterator
from typing import Any

import pytest
import ray
from ray.util.placement_group import PlacementGroup, placement_group, placement_group_table, remove_placement_group

from raytrl.launch.sweep.leftovers import free_left_places


@pytest.fixture
def local_ray(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """As raytrl starts it: without a dashboard."""
    monkeypatch.setenv("RAY_AUTH_MODE", "disabled")
    ray.init("local", num_cpus=3, include_dashboard=False, log_to_driver=False, object_store_memory=10**8)
    yield
    ray.shutdown()


@ray.remote(num_cpus=0)
class Maker:
    def make(self) -> Any:
        group = placement_group([{"CPU": 1}])
        assert group.wait(30)
        return group


def state_of(group: PlacementGroup) -> str:
    return str(placement_group_table(group)["state"])


@pytest.mark.usefixtures("local_ray")
def test_places_of_a_dead_maker_are_free_again() -> None:
    mine, makers = placement_group([{"CPU": 1}]), [Maker.remote() for _ in range(2)]  # type: ignore[attr-defined]
    assert mine.wait(30)
    dead, living = (ray.get(maker.make.remote(), timeout=60) for maker in makers)
    assert free_left_places() == 0
    ray.kill(makers[0])
    limit = time.monotonic() + 60
    while not free_left_places():  # Ray hears of the death a moment later
        assert time.monotonic() < limit
    assert (state_of(dead), state_of(living), state_of(mine)) == ("REMOVED", "CREATED", "CREATED")
    assert free_left_places() == 0
    again = placement_group([{"CPU": 1}])
    assert again.wait(30)  # where the dead one's was
    remove_placement_group(again)
