"""ZeRO-3: models of which every process holds a part, from the moment they are made."""

import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from raytrl.config.foreign.deepspeed import zero_stage


def prepare_deepspeed(on_gpu: bool) -> None:
    """What DeepSpeed has to know before a model is made under ZeRO-3."""
    if not on_gpu:
        os.environ["DS_ACCELERATOR"] = "cpu"  # else it takes a GPU of the node, which Ray does not hide, unasked
    import deepspeed

    if torch.distributed.is_initialized():  # by Ray: a DeepSpeed that was not told counts one worker in its batch sizes
        deepspeed.init_distributed(torch.distributed.get_backend(), auto_mpi_discovery=False)
    if not on_gpu:
        import deepspeed.ops

        # On CPU DeepSpeed compiles a shared-memory all-reduce (55 s, needs a compiler) that only its inference
        # engine calls; training reduces through gloo.
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False


def tell_transformers(deepspeed: Mapping[str, Any] | None, dtype: torch.dtype) -> Any:
    """Under ZeRO-3, and as long as the answer is held: models are made and loaded by parts; TRL and PEFT know of it, too.

    Args:
        deepspeed: a DeepSpeed dictionary without "auto".
        dtype: of the models that are loaded.
    """
    if deepspeed is None or zero_stage(deepspeed) != 3:
        return None
    from transformers.integrations import HfDeepSpeedConfig

    half = {"bf16": {"enabled": dtype == torch.bfloat16}}  # else the parts would be float32
    return HfDeepSpeedConfig({**deepspeed, "train_micro_batch_size_per_gpu": 1, **half})


@contextmanager
def whole_models(sharding: Any) -> Iterator[None]:
    """Within, this worker alone may make a model, which is whole; `sharding` is what `tell_transformers`
    answered, and is heeded again after it; None: by parts no more."""
    from transformers.integrations.deepspeed import set_hf_deepspeed_config, unset_hf_deepspeed_config

    unset_hf_deepspeed_config()
    try:
        yield
    finally:
        if sharding is not None:
            set_hf_deepspeed_config(sharding)


def cast(parameter: nn.Parameter, dtype: torch.dtype) -> None:
    """In place, also this process's part of one that is sharded."""
    for held in _held(parameter):
        held.data = held.data.to(dtype)


def set_to_zero(parameter: nn.Parameter) -> None:
    """In place, also this process's part of one that is sharded."""
    for held in _held(parameter):
        held.data.zero_()


def _held(parameter: nn.Parameter) -> list[torch.Tensor]:
    part = getattr(parameter, "ds_tensor", None)
    return [parameter] if part is None else [parameter, part]
