"""Plain data parallelism: every learner worker holds everything."""

import math
from collections.abc import Iterator, Mapping
from pathlib import Path

import torch
from torch import Tensor, nn

from raytrl.errors import NonFiniteError
from raytrl.roles.learner.backend import Backend
from raytrl.roles.learner.collectives import add_over_workers, copy_from_first, wait_for_all, worker_rank
from raytrl.roles.learner.networks import Networks
from raytrl.roles.weights.buckets import grouped


class TorchBackend(Backend):
    """Adam on every worker over summed gradients: each worker holds everything."""

    def __init__(
        self, networks: Networks, *, learning_rate: float, value_learning_rate: float, epsilon: float, max_norm: float
    ) -> None:
        super().__init__(networks)
        groups = networks.groups()
        self._rates = (learning_rate, value_learning_rate)[: len(groups)]  # one where there is no critic
        self._max_norm = max_norm
        self._parameters = [parameter for group in groups for parameter in group]
        copy_from_first([parameter.data for parameter in self._parameters])
        self._optimizer = torch.optim.Adam(
            [{"params": group} for group in groups], lr=learning_rate, eps=epsilon, fused=True
        )

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

    def whole(self, parameters: Mapping[str, nn.Parameter]) -> Iterator[Mapping[str, Tensor]]:
        for group in grouped(parameters.items(), self.bucket_bytes):
            yield {name: value.data for name, value in group}

    def save(self, folder: Path) -> None:
        if worker_rank() == 0:
            torch.save(self._trainable(), folder / "networks.pt")
            torch.save(self._optimizer.state_dict(), folder / "optimizer.pt")
        wait_for_all()

    def load(self, folder: Path) -> None:
        stored = torch.load(folder / "networks.pt", map_location=self.device, weights_only=True)
        with torch.no_grad():
            for name, value in self._trainable().items():
                value.copy_(stored[name])
        self._optimizer.load_state_dict(torch.load(folder / "optimizer.pt", map_location="cpu", weights_only=True))

    def _trainable(self) -> dict[str, Tensor]:
        return {name: value.data for name, value in self.networks.named_parameters() if value.requires_grad}
