"""Starting real `raytrl` runs on small data, as a user does: the command, in a process of its own."""

import hashlib
import json
import os
import random
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import IO, Any

import psutil
import yaml

_TEXT = "a the film story actor scene plot ending is was feels looks good bad slow bright dull warm cold true"
WORDS = _TEXT.split()
TINY_LLAMA = {
    "model_type": "llama",
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
}
LIMIT_S = 400.0  # for what takes a minute here: others are busy, or build what is built once
ENVIRONMENT = {
    "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": "0.2",
    "OMP_NUM_THREADS": "1",
    "HF_HUB_OFFLINE": "1",
    "COLUMNS": "200",
}


def sentence(rng: random.Random) -> str:
    return " ".join(rng.choices(WORDS, k=rng.randint(5, 12))) + " ."


def write_rows(path: Path, rows: list[dict[str, Any]]) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def text_rows(count: int, seed: int = 0) -> list[dict[str, Any]]:
    rng = random.Random(seed)
    return [{"text": sentence(rng)} for _ in range(count)]


def pair_rows(count: int, seed: int = 0) -> list[dict[str, Any]]:
    rng = random.Random(seed)
    return [
        {"prompt": sentence(rng), "chosen": " the film is good .", "rejected": " the film is bad ."}
        for _ in range(count)
    ]


def write_run_file(folder: Path, name: str, values: dict[str, Any], sections: dict[str, Any]) -> str:
    """Writes a run file; each of `sections` replaces a key of `values` or, where both are dicts, extends it."""
    for key, value in sections.items():
        both = isinstance(value, dict) and isinstance(values.get(key), dict)
        values[key] = values[key] | value if both else value
    path = folder / f"{name}.yaml"
    path.write_text(yaml.safe_dump(values))
    return str(path)


def run_file(folder: Path, name: str, **sections: Any) -> str:
    """Writes a small SFT run file (2 workers, 8 steps); keyword arguments replace or, as dicts, extend its sections."""
    values: dict[str, Any] = {
        "kind": "sft",
        "name": name,
        "output_dir": str(folder / "runs"),
        "model": {"config": TINY_LLAMA, "tokenizer": {"vocab_size": 300}},
        "data": {"train": str(folder / "train.jsonl")},
        "training": {"max_steps": 8, "per_device_train_batch_size": 4, "learning_rate": 1e-2, "max_length": 32},
        "learner": {"workers": 2},
        "checkpoint": {"every": 2},
        "report_to": [],
    }
    return write_run_file(folder, name, values, sections)


def start(
    *words: str, cwd: Path | None = None, output: IO[str] | int = subprocess.PIPE, **environment: str
) -> subprocess.Popen[str]:
    """Starts `raytrl WORDS…` without waiting for it."""
    return subprocess.Popen(
        [sys.executable, "-m", "raytrl", *words],
        stdout=output,
        stderr=subprocess.STDOUT,
        text=True,
        cwd=cwd,
        env=os.environ | ENVIRONMENT | environment,
    )


def raytrl(*words: str, status: int = 0, cwd: Path | None = None, **environment: str) -> str:
    """Runs `raytrl WORDS…` to its end, checks its exit status, and returns all it printed."""
    process = start(*words, cwd=cwd, **environment)
    output = output_of(process)
    assert process.returncode == status, output
    return output


def output_of(process: subprocess.Popen[str]) -> str:
    """All that it printed, when it has ended."""
    try:
        return process.communicate(timeout=LIMIT_S)[0]
    except subprocess.TimeoutExpired:  # killed, or it would slow the tests that come after
        raise AssertionError(f"not ended within {LIMIT_S} s: {kill_everything(process)}") from None


def wait_for(
    what: str, condition: Callable[[], bool], process: subprocess.Popen[str], seconds: float = LIMIT_S
) -> None:
    """Returns as soon as the condition holds; fails when the process ends or the time is up before that, and kills it then."""
    limit = time.monotonic() + seconds
    while not condition():
        assert process.poll() is None, f"ended before {what}: {process.communicate()[0]}"
        if time.monotonic() > limit:
            raise AssertionError(f"{what}: not within {seconds} s: {kill_everything(process)}")
        time.sleep(0.05)


def free_port() -> int:
    """Nobody's, and none of those that the kernel or Ray hand out meanwhile."""
    candidates = list(range(20000, 32768))
    random.SystemRandom().shuffle(candidates)
    for port in candidates:
        with socket.socket() as probe, suppress(OSError):
            probe.bind(("127.0.0.1", port))
            return port
    raise AssertionError("every port is taken")


def metrics(run: Path) -> list[dict[str, Any]]:
    file = run / "metrics.jsonl"
    return [json.loads(line) for line in file.read_text().splitlines() if line.endswith("}")] if file.exists() else []


def last_step(run: Path) -> int:
    return max((row["step"] for row in metrics(run)), default=0)


def is_committed(run: Path) -> bool:
    """Whether a checkpoint is on Ray Train's record; that comes a moment after the step that wrote it."""
    return (run / "checkpoints/checkpoint_manager_snapshot.json").exists()


def worker_pids(process: subprocess.Popen[str], kind: str = "RayTrainWorker") -> list[int]:
    """The training processes, or the actors of another kind, below a driver."""
    found = []
    for child in psutil.Process(process.pid).children(recursive=True):
        try:
            found += [child.pid] if kind in " ".join(child.cmdline()) else []
        except psutil.NoSuchProcess:  # ended while we looked
            continue
    return found


def kill_everything(process: subprocess.Popen[str]) -> str:
    """kill -9 of the driver and of every process of its Ray, the driver first; returns what it had printed."""
    family = [process.pid, *(child.pid for child in psutil.Process(process.pid).children(recursive=True))]
    for pid in family:
        try:
            os.kill(pid, signal.SIGKILL)
        except ProcessLookupError:
            continue
    return process.communicate()[0]


def weights_hash(model: Path) -> str:
    """One hash over all weight files of a Hugging Face folder."""
    digest = hashlib.sha256()
    for file in sorted(model.glob("*.safetensors")):
        digest.update(file.read_bytes())
    return digest.hexdigest()
