"""References of new weights: on one actor that all workers know, never in what the workers tell one another."""

import pickle
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from test_pools import weights

from raytrl.errors import WeightsGoneError
from raytrl.launch.actors.send_weights import WeightSender
from raytrl.launch.actors.shelf import OnShelf, Shelf
from raytrl.launch.actors.transport import Receivers
from raytrl.roles.weights.buckets import Bucket
from raytrl.roles.weights.packed import pack, unpack


class Reference:
    """As one of Ray's: pickled outside of a call, its object is never freed."""

    def __init__(self, value: Any) -> None:
        self.value = value

    def __reduce__(self) -> Any:
        raise AssertionError("a reference was pickled outside of a call")


class Remote:
    """A `Shelf` as Ray would show it: its methods are called by `remote`."""

    def __getattr__(self, name: str) -> Any:
        return SimpleNamespace(remote=lambda *arguments: Reference(getattr(SHELF, name)(*arguments)))


SHELF = Shelf()


@pytest.fixture(autouse=True)
def without_ray(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("ray.get", lambda reference, timeout: reference.value)


class FirstOfTwo:
    """A learner worker whose words to the others are pickled, as Ray Train does."""

    rank, world_size = 0, 2

    def from_rank_zero(self, value: Any) -> Any:
        return pickle.loads(pickle.dumps(value))


def test_every_worker_learns_where_the_weights_are_and_no_reference_is_told() -> None:
    told: list[tuple[str, int, int, Reference]] = []
    context: Any = FirstOfTwo()
    sender = WeightSender(context, torch.device("cpu"), broadcasts=False, shelf=Remote(), put=Reference)
    receivers = Receivers(lambda *call: told.append(call), lambda *call: True, 1, False)  # type: ignore[arg-type]
    for version in range(2):
        sent = sender(weights(version, seed=version), receivers)
        assert isinstance(sent.buckets, OnShelf) and len(sent.buckets) == sent.num_buckets > 1
        for number, tensors in enumerate(weights(version, seed=version).buckets):
            found = unpack(sent.buckets[number])
            assert found.checksum == Bucket.of(tensors).checksum == Bucket.of(found.tensors).checksum
    assert [call[:3] for call in told[-2:]] == [("take_bucket", 1, n) for n in range(sent.num_buckets)][-2:]


def test_it_holds_the_versions_that_are_still_asked_for() -> None:
    packed = pack(Bucket.of({"a": torch.ones(3)}))
    for version in (3, 4):
        SHELF.keep(version, [Reference(packed)], 3)
    old, newer = (OnShelf(Remote(), version, 1) for version in (3, 4))
    assert unpack(old[0]).checksum == unpack(newer[0]).checksum == packed.checksum
    SHELF.keep(5, [], 4)  # before the next ones are made, so that there is room for them
    with pytest.raises(WeightsGoneError):
        old[0]
    assert unpack(newer[0]).checksum == packed.checksum
    with pytest.raises(WeightsGoneError):
        OnShelf(Remote(), 5, 1)[0]
    SHELF.keep(4, [Reference(packed)], 0)  # of a new attempt, which goes on from an older checkpoint
    with pytest.raises(WeightsGoneError):
        OnShelf(Remote(), 5, 1)[0]
