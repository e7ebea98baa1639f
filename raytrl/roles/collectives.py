"""Sums and maxima over the learner workers; with one worker, or without torch.distributed, they are the identity."""

from collections.abc import Sequence
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

T = TypeVar("T")


def num_workers() -> int:
    return dist.get_world_size() if _distributed() else 1


def worker_rank() -> int:
    return dist.get_rank() if _distributed() else 0


def sum_over_workers(x: Tensor) -> Tensor:
    """A new tensor with the sum; every worker must call with the same shape."""
    total = x.clone()
    if _distributed():
        dist.all_reduce(total)
    return total


def max_over_workers(x: Tensor) -> Tensor:
    """A new tensor with the elementwise maximum."""
    largest = x.clone()
    if _distributed():
        dist.all_reduce(largest, op=dist.ReduceOp.MAX)
    return largest


@torch.no_grad()
def copy_from_first(parameters: list[Tensor]) -> None:
    """Every worker takes the tensors of rank 0."""
    if _distributed():
        for parameter in parameters:
            dist.broadcast(parameter, src=0)


def gather_over_workers(items: Sequence[T]) -> list[T]:
    """The items of all workers, rank 0's first, on every worker; they are pickled, so keep them small."""
    if not _distributed():
        return list(items)
    found: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(found, list(items))
    return [item for part in found for item in part]


def wait_for_all() -> None:
    if _distributed():
        dist.barrier()


def _distributed() -> bool:
    return dist.is_available() and dist.is_initialized()
