"""How gradients become weights: the seam between the learner and what optimizes for it."""

import math
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from raytrl.config.ppo import PpoConfig
from raytrl.errors import NonFiniteError
from raytrl.roles.collectives import add_over_workers, copy_from_first, wait_for_all, worker_rank
from raytrl.roles.networks import Network, Networks
from raytrl.roles.sequences import Sequences
from raytrl.roles.weights import BUCKET_BYTES, grouped, policy_parameters


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


class TorchBackend(Backend):
    """Adam on every worker over summed gradients: each worker holds everything."""

    def __init__(
        self, networks: Networks, *, learning_rate: float, value_learning_rate: float, epsilon: float, max_norm: float
    ) -> None:
        super().__init__(networks)
        self._rates = (learning_rate, value_learning_rate)
        self._max_norm = max_norm
        self._parameters = [*networks.policy_group(), *networks.value_group()]
        copy_from_first([parameter.data for parameter in self._parameters])
        groups = [{"params": networks.policy_group()}, {"params": networks.value_group()}]
        self._optimizer = torch.optim.Adam(groups, lr=learning_rate, eps=epsilon, fused=True)

    def backward(self, loss: Tensor, *, last: bool) -> None:
        loss.backward()  # type: ignore[no-untyped-call]

    def step(self, factor: float) -> float:
        for parameter in self._parameters:
            if parameter.grad is None:  # a worker without rows in this minibatch still takes part in the sum
                parameter.grad = torch.zeros_like(parameter)
        add_over_workers([parameter.grad for parameter in self._parameters if parameter.grad is not None])
        norm = float(torch.nn.utils.clip_grad_norm_(self._parameters, self._max_norm))
        if not math.isfinite(norm):
            raise NonFiniteError(f"learner: the gradient norm is {norm}; nothing was updated")
        for group, rate in zip(self._optimizer.param_groups, self._rates, strict=True):
            group["lr"] = rate * factor
        self._optimizer.step()
        self._optimizer.zero_grad(set_to_none=True)
        return norm

    def policy_buckets(self) -> Iterator[Mapping[str, Tensor]]:
        for group in grouped(policy_parameters(self.networks.policy).items(), self.bucket_bytes):
            yield {name: value.data for name, value in group}

    def save(self, folder: Path) -> None:
        if worker_rank() == 0:
            torch.save(self.trainable_tensors(), folder / "networks.pt")
            torch.save(self._optimizer.state_dict(), folder / "optimizer.pt")
        wait_for_all()

    def load(self, folder: Path) -> None:
        stored = torch.load(folder / "networks.pt", map_location=self.device, weights_only=True)
        with torch.no_grad():
            for name, value in self.trainable_tensors().items():
                value.copy_(stored[name])
        self._optimizer.load_state_dict(torch.load(folder / "optimizer.pt", map_location="cpu", weights_only=True))

    def trainable_tensors(self) -> dict[str, Tensor]:
        return {name: value.data for name, value in self.networks.named_parameters() if value.requires_grad}


def build_backend(
    networks: Networks, config: PpoConfig, *, deepspeed: Mapping[str, Any] | None = None, device: str = "cpu"
) -> Backend:
    """The backend of one learner worker; torch.distributed, where used, must be initialised before.

    Args:
        deepspeed: a DeepSpeed dictionary; None is plain data parallelism.
        device: of this worker, e.g. "cuda:0".
    """
    rates = {
        "learning_rate": config.learning_rate,
        "value_learning_rate": config.value_learning_rate or config.learning_rate,
        "epsilon": config.adam_epsilon,
        "max_norm": config.max_grad_norm,
    }
    networks.to(device)
    networks.pack()
    if deepspeed is None:
        return TorchBackend(networks, **rates)
    from raytrl.roles.deepspeed_backend import DeepSpeedBackend  # an optional extra, and seconds to import

    return DeepSpeedBackend(networks, deepspeed, **rates)
