"""What is checked before a model is served."""

import importlib.util
import json
import os
import socket
from pathlib import Path

from raytrl.config.runs.serve import ServeRun
from raytrl.errors import ConfigError, ResourceError
from raytrl.plan.checks.common import Facts, check_run, tokenizer_at
from raytrl.plan.checks.weights import check_vocabulary
from raytrl.roles.models.positions import positions_at


def check_serve(run: ServeRun) -> Facts:
    """Packages, model, tokenizer, adapters.

    Raises:
        ConfigError: naming the key.
    """
    missing = [name for name in ("fastapi", "uvicorn", "starlette") if importlib.util.find_spec(name) is None]
    if missing:
        raise ConfigError(
            f"kind: serve needs Ray Serve; found: no {', '.join(missing)}; expected: pip install 'raytrl[serve]'"
        )
    embeddings = check_run(run)
    tokenizer = tokenizer_at(run.model_path, None, False)
    notices = [check_vocabulary(tokenizer, embeddings.get("run"), "run").removeprefix("; ")]
    if run.scores:
        _check_output(run)
        return Facts(notices=[each for each in notices if each])
    if positions_at(run.model_path, None, False, "run") is None and "max_model_len" not in run.serve.engine_args:
        raise ConfigError(
            "serve.engine_args.max_model_len: how many tokens the model takes, its config does not say; expected: a number"
        )
    if not getattr(tokenizer, "chat_template", None):
        notices.append("its tokenizer has no chat template: /v1/chat/completions answers 400, /v1/completions works")
    for name, folder in run.serve.adapters.items():
        notices += _check_adapter(run, name, folder)
    return Facts(notices=[each for each in notices if each])


def _check_output(run: ServeRun) -> None:
    """Which output is the score, as a reward source is asked it."""
    from transformers import AutoConfig

    from raytrl.roles.reward.model import output_index

    output_index(AutoConfig.from_pretrained(run.model_path), run.serve.label, "serve.label")


def _check_adapter(run: ServeRun, name: str, folder: str) -> list[str]:
    """Words about an adapter that may be another model's."""
    key, config = f"serve.adapters.{name}", Path(folder) / "adapter_config.json"
    weights = [file for file in ("adapter_model.safetensors", "adapter_model.bin") if (Path(folder) / file).is_file()]
    if not config.is_file() or not weights:
        raise ConfigError(
            f"{key}: no LoRA adapter; found: {folder!r}; expected: a folder with adapter_config.json and "
            f"adapter_model.safetensors, such as <run directory>/model of a run with lora"
        )
    said = json.loads(config.read_text(encoding="utf-8"))
    if said.get("peft_type") != "LORA":
        raise ConfigError(f"{key}: found: {said.get('peft_type')}; expected: a LoRA adapter")
    base = said.get("base_model_name_or_path")
    if base and os.path.realpath(base) != os.path.realpath(run.model_path):
        return [f"{key}: was trained on {base!r}, and is served on {run.model_path!r}"]
    return []


def check_port(host: str, port: int) -> None:
    """Refuses an address where somebody listens already, or that is none of this machine.

    Raises:
        ResourceError: naming the key.
    """
    try:
        family, kind, protocol, _, place = socket.getaddrinfo(
            host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )[0]
        with socket.socket(family, kind, protocol) as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            probe.bind(place)
    except OSError as error:
        raise ResourceError(
            f"serve.port: cannot be listened at; found: {host}:{port}: {error.strerror or error}; expected: a free one, such as "
            f"serve.port={port + 1}"
        ) from None
