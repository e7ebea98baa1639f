"""How new weights get from the learner's workers to the rollout actors: once for all workers."""

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

import ray
import torch

from raytrl.errors import WeightGroupError
from raytrl.launch.actors.shelf import OnShelf
from raytrl.launch.actors.transport import Receivers, SentWeights, broadcast, send
from raytrl.launch.session.logs import LOG
from raytrl.records.progress import Progress
from raytrl.roles.context import WorkerContext
from raytrl.roles.weights.buckets import Weights
from raytrl.roles.weights.group import WeightGroup
from raytrl.roles.weights.packed import PackedBucket

_LIMIT_S = 60.0  # for a message, or for the members to come; what else they do does not keep them


class WeightSender:
    """`generator.SendWeights`, one in each learner worker.

    By broadcast while all actors are there. Through the object store for an attempt's first weights, which the actors may
    still be too young for, after an actor was lost, and where a broadcast fails: then whoever comes late finds them too.
    """

    def __init__(
        self,
        context: WorkerContext,
        device: torch.device,
        *,
        broadcasts: bool,
        shelf: Any,
        put: Callable[[PackedBucket], Any] = ray.put,
        limit_s: float = _LIMIT_S,
    ) -> None:
        """`shelf`: an actor that is a `Shelf`, for what `put` makes; None where that is no reference."""
        self._context, self._device, self._broadcasts = context, device, broadcasts
        self._shelf, self._put, self._limit_s = shelf, put, limit_s
        self._groups: dict[int, WeightGroup] = {}  # by that of the actors

    def __call__(self, weights: Weights, receivers: Receivers) -> SentWeights:
        if self._shelf is not None and self._context.rank == 0:  # the object store must not hold two versions
            ray.get(self._shelf.keep.remote(weights.version, [], receivers.oldest), timeout=self._limit_s)
        by_broadcast = self._broadcasts and receivers.complete and receivers.group is not None
        sent = self._round(weights, receivers, by_broadcast=by_broadcast)
        if sent is None:
            sent = self._round(weights, receivers, by_broadcast=False)
        assert sent is not None
        return sent

    def _round(self, weights: Weights, receivers: Receivers, by_broadcast: bool) -> SentWeights | None:
        """None: they have to be sent again. Rank 0 decides, and all ranks learn where they are."""
        sent: SentWeights | None = None
        if self._context.rank != 0:
            for _ in weights.buckets:  # gathered by all workers together
                pass
        elif by_broadcast:
            sent = self._broadcast(weights, receivers)
        else:
            if not receivers.complete:  # an actor that is lost or new is not in it
                self._leave(receivers)
            sent = self._stored(send(weights, receivers, self._put), receivers)
        return self._context.from_rank_zero(sent) if self._context.world_size > 1 else sent

    def _stored(self, sent: SentWeights, receivers: Receivers) -> SentWeights:
        if self._shelf is None:
            return sent
        keep = self._shelf.keep.remote(sent.version, list(sent.buckets), receivers.oldest)
        ray.get(keep, timeout=self._limit_s)
        return replace(sent, buckets=OnShelf(self._shelf, sent.version, sent.num_buckets))

    def _broadcast(self, weights: Weights, receivers: Receivers) -> SentWeights | None:
        buckets = iter(weights.buckets)
        try:
            # No message is started, from which NCCL has no way back, while an actor may be lost.
            assert receivers.group is not None
            group = self._groups.get(receivers.group)
            group_version = None if group is None else group.first_version
            if not receivers.agree("can_receive", weights.version, group_version):
                raise WeightGroupError("weights by broadcast: a rollout actor was lost, or does not answer")
            if group is None:
                group = self._groups[receivers.group] = self._gathered(weights.version, receivers)
            return broadcast(Weights(weights.version, buckets), receivers, group)
        except WeightGroupError as error:
            self._leave(receivers)
            text = f"weights of version {weights.version} go through the object store: {error}"
            self._context.progress(Progress("notice", weights.version, text=text))
            for _ in buckets:  # the other workers gather them all
                pass
            return None

    def _gathered(self, version: int, receivers: Receivers) -> WeightGroup:
        invite = partial(receivers.tell, "join_group", version)
        host = ray.util.get_node_ip_address()
        group = WeightGroup.lead(version, host, receivers.count + 1, self._device, self._limit_s, invite)
        # With NCCL nobody has met anybody yet: who cannot join must not be waited for in the first message.
        if not receivers.agree("can_receive", version, version):
            group.close()
            raise WeightGroupError("weights by broadcast: a rollout actor could not join")
        LOG.info("weights go by broadcast from version %d on, to %d rollout actors", version, receivers.count)
        return group

    def _leave(self, receivers: Receivers) -> None:
        """The next broadcast to them makes another group; to several groups: all do."""
        for name in list(self._groups) if receivers.group is None else [receivers.group]:
            if name in self._groups:
                self._groups.pop(name).close()

    def close(self) -> None:
        """Leaves all groups."""
        for group in self._groups.values():
            group.close()
        self._groups = {}
