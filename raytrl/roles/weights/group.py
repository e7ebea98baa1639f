"""New weights straight from the learner to the rollout engines by torch.distributed: NCCL between GPUs, gloo between CPUs."""

import contextlib
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from raytrl.errors import WeightGroupError
from raytrl.roles.weights.buckets import Bucket, as_bytes
from raytrl.within import NotInTimeError, within

LEADER = 0  # rank 0 of the learner; the engines are the ranks from 1 on
_POLL_S = 2e-4


@dataclass(frozen=True)
class Invitation:
    """What a rollout actor needs in order to join."""

    first_version: int  # of the weights that go through the group
    host: str
    port: int
    size: int  # members, the leader included
    device: str  # cuda or cpu, of all members
    timeout_s: float


@dataclass(frozen=True)
class Announcement:
    """What the next message holds: the tensors of one bucket, one after the other."""

    names: Sequence[str]
    shapes: Sequence[tuple[int, ...]]
    dtype: torch.dtype
    checksum: str

    @classmethod
    def of(cls, tensors: Mapping[str, Tensor], checksum: str) -> "Announcement":
        (dtype,) = {tensor.dtype for tensor in tensors.values()}
        return cls(tuple(tensors), tuple(tuple(tensor.shape) for tensor in tensors.values()), dtype, checksum)


class WeightGroup:
    """A process group of the learner's rank 0 and all rollout actors.

    Not torch.distributed's own, which belongs to the learner's workers: this one goes as soon as a member does, and is made
    anew. No wait is longer than the invitation's `timeout_s`. After a WeightGroupError it is of no further use.
    """

    def __init__(self, store: Any, rank: int, invitation: Invitation, device: torch.device) -> None:
        """With gloo it returns when all members are there; with NCCL they meet at the first message, see `_started`."""
        self.first_version = invitation.first_version
        self._has_met = False
        self._store, self._device, self._timeout_s = store, device, invitation.timeout_s  # the store lives as long
        limit = timedelta(seconds=invitation.timeout_s)
        with _failures("a member did not come"):
            if device.type == "cuda":
                options = dist.ProcessGroupNCCL.Options()
                # NCCL's own watchdog would end the process; `_broadcast` gives up before it.
                options._timeout = 4 * limit
                self._group: Any = dist.ProcessGroupNCCL(store, rank, invitation.size, options)
            else:
                self._group = dist.ProcessGroupGloo(store, rank, invitation.size, limit)

    @classmethod
    def lead(
        cls,
        first_version: int,
        host: str,
        size: int,
        device: torch.device,
        timeout_s: float,
        invite: Callable[[Invitation], None],
    ) -> "WeightGroup":
        """The leader's end.

        Args:
            first_version: of the weights that go through the group, by which its members know it.
            host: an address of this machine that the members can reach.
            invite: called once; must get the invitation to all members without waiting for them.

        Raises:
            WeightGroupError: not all came in time.
        """
        store = _store(host, 0, timeout_s, is_master=True)
        invitation = Invitation(first_version, host, store.port, size, device.type, timeout_s)
        invite(invitation)
        return cls(store, LEADER, invitation, device)

    @classmethod
    def join(cls, invitation: Invitation) -> "WeightGroup":
        """A member's end; raises as `lead`."""
        with _failures("the learner cannot be reached"):
            store = _store(invitation.host, invitation.port, invitation.timeout_s, is_master=False)
            rank = store.add("members", 1)
        return cls(store, rank, invitation, torch.device(invitation.device))

    def send(self, tensors: Mapping[str, Tensor]) -> None:
        """The leader's: one message that all members receive; raises WeightGroupError."""
        parts = [as_bytes(tensor.to(self._device)) for tensor in tensors.values()]
        self._broadcast(parts[0] if len(parts) == 1 else torch.cat(parts))  # a huge one is not copied

    def receive(self, announced: Announcement) -> Bucket:
        """A member's; raises WeightGroupError."""
        sizes = [torch.Size(shape).numel() * announced.dtype.itemsize for shape in announced.shapes]
        message = torch.empty(sum(sizes), dtype=torch.uint8, device=self._device)
        self._broadcast(message)
        parts = torch.split(message, sizes)
        tensors = {
            name: part.view(announced.dtype).view(shape)
            for name, shape, part in zip(announced.names, announced.shapes, parts, strict=True)
        }
        return Bucket(tensors, announced.checksum)

    def close(self) -> None:
        """Messages under way fail."""
        if self._group is not None:
            with contextlib.suppress(RuntimeError):  # what is left of a group that has failed
                self._group.abort()

    def _broadcast(self, message: Tensor) -> None:
        with _failures("a member was lost"):
            work = self._started(message)
            deadline = time.monotonic() + self._timeout_s
            while not work.is_completed():
                if time.monotonic() > deadline:
                    self.close()
                    raise WeightGroupError(f"weights by broadcast: no end within {self._timeout_s:g} s")
                time.sleep(_POLL_S)
            work.wait()  # raises what it failed of

    def _started(self, message: Tensor) -> Any:
        """The message on its way. NCCL's members meet in the first one's call, which waits for all of them without limit."""
        options = dist.BroadcastOptions()
        options.rootRank = LEADER

        def start() -> Any:
            if self._device.type == "cuda":
                torch.cuda.set_device(self._device)  # a thread's own
            return self._group.broadcast([message], options)

        if self._has_met:
            return start()
        try:
            work = within(self._timeout_s, start)
        except NotInTimeError:
            self._group = None  # a thread hangs in it: to end it would hang as well
            raise WeightGroupError(
                f"weights by broadcast: the members did not meet within {self._timeout_s:g} s"
            ) from None
        self._has_met = True
        return work


def _store(host: str, port: int, timeout_s: float, *, is_master: bool) -> Any:
    return dist.TCPStore(  # type: ignore[attr-defined]
        host, port, is_master=is_master, wait_for_workers=False, timeout=timedelta(seconds=timeout_s)
    )


@contextlib.contextmanager
def _failures(what: str) -> Iterator[None]:
    """torch.distributed raises RuntimeError and its children for all that a lost peer leads to."""
    try:
        yield
    except RuntimeError as error:
        raise WeightGroupError(f"weights by broadcast: {what}: {str(error).splitlines()[0][:200]}") from None
