"""The proof of what arrived: sees every fault, and nothing but faults."""

import random

import pytest
import torch

from raytrl.roles.weights.buckets import _COLUMNS, _PART, checksum, weighted_sum


def test_the_sum_is_what_it_says() -> None:
    """By integers without a limit, over several parts, the last one not full."""
    words = torch.randint(-(2**63), 2**63 - 1, (2 * _PART + 3 * _COLUMNS + 77,))
    drawn = torch.randint(-(2**62), 2**62, (_COLUMNS,), generator=torch.Generator().manual_seed(0))
    odd = [2 * number + 1 for number in drawn.tolist()]
    total = sum(
        (word ^ (word >> 32)) * odd[place % _COLUMNS] * (2 * (place // _COLUMNS) + 1)
        for place, word in enumerate(words.tolist())
    )
    assert int(weighted_sum(words)) == (total + 2**63) % 2**64 - 2**63


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("size", [1, 3, 4095, 4097, 20_001])
def test_every_bit_counts(dtype: torch.dtype, size: int) -> None:
    rng = random.Random(size)
    tensors = {"a": torch.randn(size).to(dtype), "b": torch.randn(5, 3).to(dtype)}
    whole = checksum(tensors)
    for _ in range(50):
        place, bit = rng.randrange(size), rng.randrange(8)
        changed = tensors["a"].clone()
        data = changed.view(torch.uint8)
        data[place * dtype.itemsize + rng.randrange(dtype.itemsize)] ^= 1 << bit
        assert checksum(tensors | {"a": changed}) != whole
    assert checksum(tensors) == whole


def test_places_names_shapes_and_dtypes_count() -> None:
    values = torch.randn(8, _COLUMNS)
    rows = values.clone()
    rows[[2, 5]] = rows[[5, 2]]
    neighbours = values.clone()
    neighbours[0, [0, 1]] = neighbours[0, [1, 0]]
    found = [
        {"a": values},
        {"b": values},
        {"a": rows},
        {"a": neighbours},
        {"a": values.T.contiguous()},
        {"a": values.view(4, -1)},
        {"a": values.view(torch.int32)},
        {"a": values[:4], "b": values[4:]},
        {"a": values[4:], "b": values[:4]},
        {"a": -values},
        {"a": torch.where(torch.arange(_COLUMNS) % 2 == 0, values, -values)},
        {"a": torch.where(torch.arange(_COLUMNS) % 2 == 1, values, -values)},
        {"a": torch.zeros_like(values)},
        {"a": -torch.zeros_like(values)},
        {"a": torch.full_like(values, torch.nan)},
        {},
    ]
    assert len({checksum(tensors) for tensors in found}) == len(found)


def test_how_the_memory_lies_does_not_count() -> None:
    message = torch.randn(1000).to(torch.bfloat16)
    for start in range(4):  # within a word
        part = message[start : start + 7]
        assert checksum({"a": part}) == checksum({"a": part.clone()})
    wide = torch.randn(64, 100)
    assert checksum({"a": wide.T}) == checksum({"a": wide.T.contiguous()})
    assert checksum({"a": wide, "b": message}) == checksum({"b": message, "a": wide})
    assert checksum({"a": torch.empty(0, 3), "b": wide}) == checksum({"b": wide, "a": torch.empty(0, 3)})


def test_tensors_stay_where_they_lie(monkeypatch: pytest.MonkeyPatch) -> None:
    def refused(tensor: torch.Tensor, *_: object) -> None:
        raise AssertionError("copied to the host")

    tensors = {"a": torch.randn(100, 100), "b": torch.randn(7)}
    monkeypatch.setattr(torch.Tensor, "cpu", refused)
    monkeypatch.setattr(torch.Tensor, "numpy", refused)
    assert checksum(tensors)
