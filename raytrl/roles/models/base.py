"""The base model of a run: a folder that exists, or one made from a config before training starts."""

from typing import Any

import torch
from transformers import AutoConfig, set_seed

from raytrl.config.runs.supervised import SupervisedRun
from raytrl.errors import ConfigError
from raytrl.roles.models.loading import auto_class, load_model


def torch_dtype(dtype: str, on_gpu: bool) -> torch.dtype:
    """`model.dtype` as torch's: auto is bfloat16 on a GPU and float32 on a CPU."""
    if dtype == "auto":
        return torch.bfloat16 if on_gpu else torch.float32
    return torch.bfloat16 if dtype == "bfloat16" else torch.float32


def dtype_name(dtype: str, on_gpu: bool) -> str:
    """The same by its name, for people and files."""
    return str(torch_dtype(dtype, on_gpu)).removeprefix("torch.")


def needs_base(run: SupervisedRun) -> bool:
    """Whether the model has to be made (or given a padding token) before a trainer can load it by its path."""
    return run.model.config is not None or run.model.pad_token is not None


def make_base(run: SupervisedRun, tokenizer: Any, folder: str) -> None:
    """Writes the base model and tokenizer to a folder, the same weights for the same seed.

    Trainers, adapters and DPO's reference then all load one thing by its path, whether or not it existed before.

    Raises:
        ConfigError: the config names an unknown architecture or field values it cannot have.
    """
    set_seed(run.seed)
    own = {"pad_token_id": tokenizer.pad_token_id, "eos_token_id": tokenizer.eos_token_id}
    if run.head == "score":
        own["num_labels"] = 1
    if run.model.config is not None:
        values = dict(run.model.config)
        architecture = values.pop("model_type")
        try:
            config = AutoConfig.for_model(architecture, **{"vocab_size": len(tokenizer)} | values | own)
            model = auto_class(run.head).from_config(config)
        except (ValueError, KeyError, TypeError) as error:
            raise ConfigError(f"model.config: cannot be built: {str(error).splitlines()[0]}") from error
        unknown = set(values) - set(type(config)().to_dict())
        if unknown:
            raise ConfigError(f"model.config: {architecture} has no {', '.join(sorted(unknown))}")
    else:
        assert run.model.path is not None
        model = load_model(
            run.model.path,
            run.head,
            "model.path",
            new_head=run.head == "score",
            revision=run.model.revision,
            trust_remote_code=run.model.trust_remote_code,
            **labels_of(run),
        )
        if len(tokenizer) > model.get_input_embeddings().num_embeddings:
            model.resize_token_embeddings(len(tokenizer))
        model.config.pad_token_id = tokenizer.pad_token_id
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def labels_of(run: SupervisedRun) -> dict[str, Any]:
    """What `from_pretrained` is told of the outputs: a reward model has one."""
    return {"num_labels": 1} if run.head == "score" else {}
