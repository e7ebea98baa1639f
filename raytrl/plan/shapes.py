"""The shapes of a run's models: from config.json alone, or counted on torch's meta device. No weights are read."""

import json
import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from raytrl.config.runs.base import Head, ModelUse, Run, TrainingRun
from raytrl.config.sections.model import ModelSection, TokenizerSpec
from raytrl.errors import ConfigError, UncountedError
from raytrl.plan.config_shapes import Linear, ModelShape, shape_of_values
from raytrl.plan.hub import hub_folder


def shape_of_path(
    path: str, key: str, head: Head, *, revision: str | None = None, trust_remote_code: bool = False, models: str = ""
) -> ModelShape:
    """The shape of a model folder or hub id.

    Args:
        key: of the run file, for messages.
        models: a folder that holds `<path>/config.json` of models that are not on this machine.

    Raises:
        ConfigError: its config.json is nowhere to be had, or names no architecture of transformers.
    """
    place, options = _place(path, key, revision, models), {"trust_remote_code": trust_remote_code}
    try:
        counted = shape_of_values(json.loads(Path(place, "config.json").read_text()), head)
    except (OSError, ValueError, TypeError):
        counted = None  # transformers says better what is wrong with it
    if counted is not None:
        return counted
    from transformers import AutoConfig

    if place == path and not os.path.isdir(path):
        options["revision"] = revision  # type: ignore[assignment]
    try:
        config = AutoConfig.from_pretrained(place, **options)
    except (OSError, ValueError, KeyError) as error:
        raise ConfigError(f"{key}: {path!r}: config.json cannot be read: {str(error).splitlines()[0]}") from None
    return _shape(config, key, head, trust_remote_code)


def shape_of_config(values: Mapping[str, Any], vocab_size: int, key: str, head: Head) -> ModelShape:
    """The shape of a model that `model.config` describes; `vocab_size` is the tokenizer's.

    Raises:
        ConfigError: the config names an unknown architecture or field values it cannot have.
    """
    from transformers import AutoConfig

    fields = {name: value for name, value in values.items() if name != "model_type"}
    try:
        config = AutoConfig.for_model(values["model_type"], **{"vocab_size": vocab_size} | fields)
    except Exception as error:  # the config's own checks raise classes of their own
        raise ConfigError(f"{key}: cannot be built: {str(error).splitlines()[0]}") from None
    return _shape(config, key, head, False)


def _place(path: str, key: str, revision: str | None, models: str) -> str:
    """Where config.json is: the folder itself, a folder below `models`, the cache, or the hub."""
    given = os.path.join(models, path) if models else ""
    if os.path.isfile(os.path.join(given, "config.json")):
        return given
    for folder in (path, os.path.join(path, "merged")):  # beside an adapter: the merged model
        if os.path.isfile(os.path.join(folder, "config.json")):
            return folder
    return hub_folder(path, key, revision)


def _shape(config: Any, key: str, head: Head, trust_remote_code: bool) -> ModelShape:
    import torch
    from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

    if head == "score":
        config.num_labels = 1
    auto = AutoModelForCausalLM if head == "causal" else AutoModelForSequenceClassification
    try:
        with torch.device("meta"):
            model = auto.from_config(config, trust_remote_code=trust_remote_code)
    except Exception as error:  # the model's own code may raise anything
        raise ConfigError(f"{key}: cannot be counted: {type(error).__name__}: {str(error).splitlines()[0]}") from None
    text = config.get_text_config()
    heads = getattr(text, "num_key_value_heads", None) or getattr(text, "num_attention_heads", None)
    if not isinstance(heads, int):  # state spaces; some name a number for each layer
        raise UncountedError(f"{key}: {config.model_type} does not attend in the same way in all layers, or not at all")
    head_width = int(getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads)
    output = model.get_output_embeddings() if head == "causal" else getattr(model, "score", None)
    return ModelShape(
        parameters=sum(parameter.numel() for parameter in model.parameters()),
        linears=tuple(
            Linear(name, *_features(module))
            for name, module in model.named_modules()
            if module is not output and type(module).__name__ in ("Linear", "Conv1D")
        ),
        modules={name: sum(p.numel() for p in module.parameters()) for name, module in model.named_modules()},
        hidden=int(text.hidden_size),
        layers=int(text.num_hidden_layers),
        vocab=int(text.vocab_size),
        kv_width=2 * heads * head_width,
        architecture=str(config.model_type),
        file_size=(getattr(text, "dtype", None) or torch.float32).itemsize,
    )


def _features(module: Any) -> tuple[int, int]:
    if hasattr(module, "in_features"):
        return int(module.in_features), int(module.out_features)
    return int(module.weight.shape[0]), int(module.weight.shape[1])  # GPT-2's Conv1D holds the transpose


def read_shapes(run: Run, models: str = "") -> tuple[dict[str, ModelShape], list[ConfigError]]:
    """The shapes of all models of a run that can be had, by their key in the run file, and why the others cannot: one line
    each, `UncountedError` where the model may well run.

    Args:
        models: a folder that holds `<path>/config.json` of models that are not on this machine.
    """
    shapes, problems = {}, list[ConfigError]()
    for use in run.models():
        try:
            shapes[use.key] = _shape_of(run, use, models)
        except UncountedError as error:
            problems.append(error)
        except (ConfigError, OSError, ValueError) as error:
            problems.append(ConfigError(str(error).splitlines()[0]))
    return shapes, problems


def _shape_of(run: Run, use: ModelUse, models: str) -> ModelShape:
    if use.path is not None:
        trust = use.trust_remote_code
        return shape_of_path(use.path, use.key, use.head, revision=use.revision, trust_remote_code=trust, models=models)
    assert isinstance(run, TrainingRun)  # only what trains can be made from nothing
    return shape_of_config(run.model.config or {}, _vocabulary(run.model), "model.config", use.head)


def _vocabulary(model: ModelSection) -> int:
    if isinstance(model.tokenizer, TokenizerSpec):
        return model.tokenizer.vocab_size
    from raytrl.roles.models.tokenizer import load_tokenizer

    return len(load_tokenizer(str(model.tokenizer), model.revision, model.trust_remote_code))


def lora_parameters(shape: ModelShape, lora: Mapping[str, Any]) -> int:
    """Trainable numbers of one LoRA adapter of these `LoraConfig` fields."""
    rank, targets = int(lora.get("r", 8)), lora.get("target_modules")
    if targets is None:  # PEFT's own choice for the architecture
        from peft.utils import TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING

        targets = TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING.get(shape.architecture, [])
    chosen = [linear for linear in shape.linears if _is_target(linear.name, targets)]
    kept = [n for n in shape.modules for saved in lora.get("modules_to_save") or () if n.split(".")[-1] == saved]
    return sum(rank * (linear.num_in + linear.num_out) for linear in chosen) + sum(shape.modules[n] for n in kept)


def _is_target(name: str, targets: Any) -> bool:
    if isinstance(targets, str):
        return targets == "all-linear" or re.fullmatch(targets, name) is not None
    return any(name == target or name.endswith(f".{target}") for target in targets)
