"""Where the references of new weights lie, so that each learner worker, and whoever it sends there, finds them.

Ray Train's collectives pickle what workers tell one another, and Ray never frees an object whose reference was pickled
outside of a call. So references go through an actor that all of them know, and only in calls.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import ray
import ray.exceptions

from raytrl.errors import WeightsGoneError

_LIMIT_S = 600.0  # for a bucket to come from another node


class Shelf:
    """The part of an actor that holds the references of the versions that are still asked for."""

    def __init__(self) -> None:
        self._places: dict[int, list[Any]] = {}

    def keep(self, version: int, places: list[Any], oldest: int) -> None:
        """And no version before `oldest`, nor of an attempt that had come further: these are freed."""
        kept = {each: there for each, there in self._places.items() if oldest <= each < version}
        self._places = kept | {version: places}

    def kept(self, version: int, number: int) -> list[Any]:
        """One bucket's; none, where they have made room for another version."""
        return self._places.get(version, [])[number : number + 1]


@dataclass(frozen=True)
class OnShelf(Sequence[Any]):
    """The buckets of a version, read one by one when they are asked for; can be sent anywhere."""

    shelf: Any  # the actor
    version: int
    size: int

    def __len__(self) -> int:
        return self.size

    def __getitem__(self, number: Any) -> Any:
        try:
            place = ray.get(self.shelf.kept.remote(self.version, number), timeout=_LIMIT_S)
            return ray.get(place[0], timeout=_LIMIT_S)
        except (IndexError, ray.exceptions.RayError) as error:  # the worker that made them, or their node, is gone
            raise WeightsGoneError(f"rollout actor: bucket {number}: {type(error).__name__}") from None
