"""Whether what a checkpoint would hold are numbers."""

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn


def not_finite(model: nn.Module, optimizer: Any = None) -> list[str]:
    """Names of what learns, and of its optimizer's state, that holds NaN or an infinite number.

    Under ZeRO each rank sees its own parts: `ds_tensor` is this rank's part of a parameter (ZeRO-3).

    Args:
        optimizer: torch's or DeepSpeed's, or a wrapper with its `state`.
    """
    found = [
        name
        for name, parameter in model.named_parameters()
        if parameter.requires_grad and not _is_finite(getattr(parameter, "ds_tensor", parameter))
    ]
    if any(not _is_finite(tensor) for tensor in _tensors(getattr(optimizer, "state", {}))):
        found.append("the optimizer's state")
    return found


def _tensors(state: Any) -> Iterator[Tensor]:
    for values in state.values():
        yield from (
            value for value in (values.values() if isinstance(values, dict) else ()) if isinstance(value, Tensor)
        )


@torch.no_grad()
def _is_finite(tensor: Tensor) -> bool:
    """By the least and the largest number: NaN is both, and nothing as large as the tensor is made."""
    if not tensor.is_floating_point() or not tensor.numel():
        return True
    return bool(torch.stack(torch.aminmax(tensor)).isfinite().all())
