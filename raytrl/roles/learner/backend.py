"""How gradients become weights: the seam between the learner and what optimizes for it."""

import math
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from raytrl.roles.learner.networks import Network, Networks
from raytrl.roles.learner.sequences import Sequences
from raytrl.roles.models.adapters import policy_parameters
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

    def logprobs(self, network: Network, batch: Sequences, temperature: float) -> tuple[Tensor, Tensor | None]:
        """Of the N response tokens under policy or reference, and entropies where there is a gradient, see `Networks`."""
        found: tuple[Tensor, Tensor | None] = self._forward(network, batch, temperature)
        return found

    def values(self, batch: Sequences) -> Tensor:
        """The value function before each of the N response tokens."""
        values_N: Tensor = self._forward("value", batch)
        return values_N

    def policy_and_values(self, batch: Sequences, temperature: float) -> tuple[Tensor, Tensor | None, Tensor]:
        """`logprobs` of the policy and `values`, of one pass where they are one network."""
        if self.networks.is_shared:
            found: tuple[Tensor, Tensor | None, Tensor] = self._forward("policy and value", batch, temperature)
            return found
        return *self.logprobs("policy", batch, temperature), self.values(batch)

    def _forward(self, network: Network, *arguments: Any) -> Any:
        return self.networks(network, *arguments)

    @abstractmethod
    def backward(self, loss: Tensor, *, last: bool) -> None:
        """Add the gradients of a part of the minibatch; `last` on its last part. Parts and workers are summed."""

    @abstractmethod
    def step(self, factor: float) -> float:
        """Clip, update with the learning rates times `factor`, clear; returns the gradient norm before clipping.

        Raises:
            NonFiniteError: the gradient norm is NaN or infinite; nothing was updated.
        """

    def policy_buckets(self) -> Iterator[Mapping[str, Tensor]]:
        """What rollout engines need, see `whole`."""
        return self.whole(policy_parameters(self.networks.policy))

    @abstractmethod
    def whole(self, parameters: Mapping[str, nn.Parameter]) -> Iterator[Mapping[str, Tensor]]:
        """These of its parameters, by name, some at a time; good until the next are asked for.

        Collective: every worker asks for all.
        """

    @abstractmethod
    def save(self, folder: Path) -> None:
        """Weights and optimizer state. Collective; returns when all is written."""

    @abstractmethod
    def load(self, folder: Path) -> None:
        """What `save` wrote. Collective."""
