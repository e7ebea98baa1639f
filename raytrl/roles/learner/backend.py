"""How gradients become weights: the seam between the learner and what optimizes for it."""

import math
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping
from pathlib import Path

import torch
from torch import Tensor

from raytrl.roles.learner.networks import Network, Networks
from raytrl.roles.learner.sequences import Sequences
from raytrl.roles.weights.buckets import BUCKET_BYTES


def schedule_factor(schedule: str, step: int, steps: int) -> float:
    """What the learning rates are multiplied by in step `step` of `steps`: 1 at the start, 0 after the last one."""
    done = step / steps
    if schedule == "linear":
        return 1.0 - done
    if schedule == "cosine":
        return 0.5 * (1.0 + math.cos(math.pi * done))
    return 1.0


class Backend(ABC):
    """Forward, backward and step over all learner workers.

    `lockstep` says that every worker must run equally many passes, as sharded parameters are gathered in each.
    """

    lockstep = False
    bucket_bytes = BUCKET_BYTES  # of weights on their way to rollout engines

    def __init__(self, networks: Networks) -> None:
        self.networks = networks

    @property
    def device(self) -> torch.device:
        return next(self.networks.parameters()).device

    def forward(self, network: Network, batch: Sequences) -> Tensor:
        output: Tensor = self.networks(network, batch)
        return output

    @abstractmethod
    def backward(self, loss: Tensor, *, last: bool) -> None:
        """Add the gradients of a part of the minibatch; `last` on its last part. Parts and workers are summed."""

    @abstractmethod
    def step(self, factor: float) -> float:
        """Clip, update with the learning rates times `factor`, clear; returns the gradient norm before clipping.

        Raises:
            NonFiniteError: the gradient norm is NaN or infinite; nothing was updated.
        """

    @abstractmethod
    def policy_buckets(self) -> Iterator[Mapping[str, Tensor]]:
        """The full tensors that rollout engines need, by name, some at a time; good until the next are asked for.

        Collective: every worker asks for all.
        """

    @abstractmethod
    def trainable_tensors(self) -> dict[str, Tensor]:
        """Everything that learns, whole, by its name in `networks`. Collective."""

    @abstractmethod
    def save(self, folder: Path) -> None:
        """Weights and optimizer state. Collective; returns when all is written."""

    @abstractmethod
    def load(self, folder: Path) -> None:
        """What `save` wrote. Collective."""
