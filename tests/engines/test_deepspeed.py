"""DDP and every ZeRO stage are one optimisation: equal losses, equal weights, through DeepSpeed's real engine."""

import json
import socket
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from tests.plain import PlainContext, forget_engines, job_of, join_group, spawn
from tests.runs import run_file, text_rows, write_rows

OFFLOAD = {"stage": 2, "offload_optimizer": {"device": "cpu"}}
VARIANTS: dict[str, dict[str, Any] | None] = {
    "ddp": None,
    "zero1": {"stage": 1},
    "zero2": {"stage": 2},
    "zero3": {"stage": 3},
    "offload": OFFLOAD,
}


def _train_all(rank: int, files: dict[str, str], port: int, out: str) -> None:
    from raytrl.roles.supervised.trainer import train

    join_group(rank, 2, port)
    losses = {}
    for name, file in files.items():
        job = job_of(file)
        context = PlainContext(Path(job.run.output_dir) / name, rank, world_size=2)
        train(job, context)
        losses[name] = context.losses
        forget_engines()
    if rank == 0:
        Path(out).write_text(json.dumps(losses))


@pytest.mark.parametrize("lora", [False, True], ids=["full", "lora"])
def test_equal_losses(tmp_path: Path, lora: bool) -> None:
    write_rows(tmp_path / "train.jsonl", text_rows(64))
    files = {}
    for name, zero in VARIANTS.items():
        learner: dict[str, Any] = {"workers": 2}
        if zero is not None:
            # Run files say none; the file of transformers' guide says all.
            keys = ("train_batch_size", "train_micro_batch_size_per_gpu", "gradient_accumulation_steps")
            learner["deepspeed"] = {"zero_optimization": zero, **dict.fromkeys(keys if name == "zero3" else (), "auto")}
        extra: dict[str, Any] = {"lora": {"r": 4, "target_modules": "all-linear"}} if lora else {}
        files[name] = run_file(
            tmp_path,
            name,
            learner=learner,
            training={"max_steps": 4, "learning_rate": 1e-2},
            checkpoint={"every": 100},
            **extra,
        )
        job_of(files[name])  # the driver's part: it trains the tokenizer once, before the workers look for it
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    spawn(_train_all, files, port, str(tmp_path / "losses.json"))
    losses = json.loads((tmp_path / "losses.json").read_text())
    assert len(losses["ddp"]) == 4
    assert losses["ddp"][-1] < losses["ddp"][0] - 0.01
    weights = "adapter_model.safetensors" if lora else "model.safetensors"
    expected = load_file(tmp_path / f"runs/ddp/model/{weights}")
    for name in VARIANTS:
        assert losses[name] == pytest.approx(losses["ddp"], abs=2e-5), name
        for key, tensor in load_file(tmp_path / f"runs/{name}/model/{weights}").items():
            torch.testing.assert_close(
                tensor, expected[key], atol=2e-4, rtol=0, msg=lambda m, k=key, n=name: f"{n} {k}: {m}"
            )
