"""Sums and maxima over the learner workers; with one worker, or without torch.distributed, they are the identity."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from raytrl.errors import RaytrlError

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
def add_over_workers(tensors: Sequence[Tensor], bucket_bytes: int = 2**25) -> None:
    """Each tensor becomes its sum over the workers, in place: few large messages instead of one a tensor.

    Args:
        tensors: of one dtype, in the same order and shapes on every worker.
        bucket_bytes: what one message holds at most; a larger tensor gets one of its own.
    """
    if not _distributed():
        return
    bucket: list[Tensor] = []
    size = 0
    for tensor in tensors:
        if bucket and size + tensor.nbytes > bucket_bytes:
            _add_bucket(bucket)
            bucket, size = [], 0
        bucket.append(tensor)
        size += tensor.nbytes
    if bucket:
        _add_bucket(bucket)


def _add_bucket(tensors: list[Tensor]) -> None:
    flat = torch.cat([tensor.reshape(-1) for tensor in tensors])
    dist.all_reduce(flat)
    for tensor, part in zip(tensors, torch.split(flat, [tensor.numel() for tensor in tensors]), strict=True):
        tensor.copy_(part.view_as(tensor))


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


@contextmanager
def failing_together(device: torch.device) -> Iterator[None]:
    """What a worker raises within, all workers raise: none is left waiting for it in the next collective call.

    Collective at the end of the block, which must hold no collective call itself; `device` is the worker's.
    """
    error: RaytrlError | None = None
    try:
        yield
    except RaytrlError as mine:
        error = mine
    if not _distributed():
        if error is not None:
            raise error
        return
    failed = max_over_workers(torch.tensor(error is not None, dtype=torch.uint8, device=device))
    if bool(failed):
        errors = gather_over_workers([] if error is None else [error])
        raise error or errors[0]


def wait_for_all() -> None:
    if _distributed():
        dist.barrier()


def _distributed() -> bool:
    return dist.is_available() and dist.is_initialized()
