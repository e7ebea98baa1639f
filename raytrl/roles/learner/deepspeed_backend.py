"""DeepSpeed ZeRO behind the learner: sharded optimizer state (1), gradients (2) and parameters (3)."""

import math
from collections.abc import Iterator, Mapping
from copy import copy
from pathlib import Path
from typing import Any

import deepspeed
import torch
from torch import Tensor, nn

from raytrl.errors import ConfigError, NonFiniteError, RunError
from raytrl.roles.learner.backend import Backend
from raytrl.roles.learner.collectives import num_workers, wait_for_all
from raytrl.roles.learner.networks import Network, Networks
from raytrl.roles.weights.buckets import grouped

TAG = "deepspeed"


class _Traces:
    """ZeRO-3 gathers weights ahead of their use by the order in which the last pass used them, and expects every pass to be
    like the last. Here passes of several kinds take turns, so that each kind gets a trace of its own."""

    def __init__(self, offload: Any) -> None:
        """`offload`: DeepSpeed's `DeepSpeedZeRoOffload`, before its first pass."""
        self._offload, self._untraced = offload, offload.param_coordinator
        self._of_kind: dict[object, Any] = {}

    def follow(self, kind: object) -> None:
        """The next forward pass, and a backward pass after it, are of this kind."""
        if kind not in self._of_kind:
            self._of_kind[kind] = copy(self._untraced)
            self._of_kind[kind]._clear_trace_structures()  # of its own: what a copy shares are weights on their way
        self._offload.param_coordinator = self._of_kind[kind]


class DeepSpeedBackend(Backend):
    """Adam under a DeepSpeed engine; torch.distributed must be initialised, also for one worker."""

    lockstep = True

    def __init__(
        self,
        networks: Networks,
        config: Mapping[str, Any],
        *,
        learning_rate: float,
        value_learning_rate: float,
        epsilon: float,
        max_norm: float,
    ) -> None:
        """
        Args:
            config: a DeepSpeed dictionary. Batch sizes, accumulation and clipping follow from the run file and are
                set here; its optimizer and scheduler must be left out for the same reason.
        """
        super().__init__(networks)
        groups = networks.groups()
        self._rates = (learning_rate, value_learning_rate)[: len(groups)]  # one where there is no critic
        stage = config.get("zero_optimization", {}).get("stage", 0)
        if stage not in (1, 2, 3):
            raise ConfigError(
                f"learner.deepspeed: zero_optimization.stage must be 1, 2 or 3; found {stage}; for stage 0, which is "
                f"plain data parallelism, leave learner.deepspeed out"
            )
        settings = {key: value for key, value in config.items() if key != "train_batch_size"} | {
            "train_micro_batch_size_per_gpu": 1,
            "gradient_accumulation_steps": 1,
            "gradient_clipping": max_norm,
            "zero_allow_untested_optimizer": True,
            # Offloaded states are stepped by torch's Adam as well: DeepSpeed's own has to be compiled on each node.
            "zero_force_ds_cpu_optimizer": False,
        }
        optimizer = torch.optim.Adam([{"params": group} for group in groups], lr=learning_rate, eps=epsilon)
        self._engine, self._optimizer, _, _ = deepspeed.initialize(
            model=networks, optimizer=optimizer, config=settings, dist_init_required=False
        )
        self._traces = _Traces(self._optimizer.parameter_offload) if stage == 3 else None

    @property
    def device(self) -> torch.device:
        return torch.device(self._engine.device)

    def _forward(self, network: Network, *arguments: Any) -> Any:
        if self._traces is not None:
            self._traces.follow((network, torch.is_grad_enabled()))
        return self._engine(network, *arguments)

    def backward(self, loss: Tensor, *, last: bool) -> None:
        self._engine.set_gradient_accumulation_boundary(is_boundary=last)
        # DeepSpeed averages over workers; losses here are parts of a global mean, to be summed.
        self._engine.backward(loss * num_workers(), scale_wrt_gas=False)
        if not last:
            self._engine.step()

    def step(self, factor: float) -> float:
        for group, rate in zip(self._optimizer.param_groups, self._rates, strict=True):
            group["lr"] = rate * factor
        self._engine.step()
        norm = float(self._engine.get_global_grad_norm())
        if not math.isfinite(norm):
            raise NonFiniteError(f"learner: the gradient norm is {norm}; the run cannot go on from this step")
        return norm

    def whole(self, parameters: Mapping[str, nn.Parameter]) -> Iterator[Mapping[str, Tensor]]:
        for group in grouped(parameters.items(), self.bucket_bytes):
            with deepspeed.zero.GatheredParameters([value for _, value in group], enabled=self._traces is not None):
                yield {name: value.data for name, value in group}

    def save(self, folder: Path) -> None:
        self._engine.save_checkpoint(str(folder), tag=TAG, exclude_frozen_parameters=True)
        wait_for_all()

    def load(self, folder: Path) -> None:
        loaded, _ = self._engine.load_checkpoint(str(folder), tag=TAG, load_module_strict=False)
        if loaded is None:
            raise RunError(f"learner: {folder} holds no DeepSpeed checkpoint; expected the folder {TAG} in it")
