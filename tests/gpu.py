"""Proves a machine's GPUs by real runs, one after the other: does it train, how fast, in how much memory, through a kill.

    python -m tests.gpu [--cpu]

LoRA SFT and full SFT in bfloat16; on one GPU LoRA PPO and full PPO with learner, engine and reward model beside each other
(vLLM where it is installed); with two GPUs weights by NCCL, and ZeRO-3; and a PPO run that loses one process of each role.
Prints for each run the seconds of a step by phase, tokens a second, the most memory a GPU held beside what `raytrl plan`
says, and the speed of new weights. A run that fails is told with its last words, and the next one starts; the exit status
is then 1. `--cpu` rehearses all of it on a small model without a GPU. Data and models are made here.
"""

import argparse
import os
import signal
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil

from raytrl.config.load import load_run
from raytrl.plan.memory import GIB, estimates
from raytrl.plan.shapes import read_shapes
from tests.benchmarks.plan_memory import MODEL, SIZES, make_files
from tests.ppo_files import ppo_file
from tests.runs import last_step, metrics, run_file, start, wait_for, worker_pids

STEPS = 6
TINY = MODEL | {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 2}
TINY |= {"num_key_value_heads": 2, "vocab_size": 300}
LORA = {"r": 16, "lora_alpha": 32, "target_modules": "all-linear"}
VICTIMS = ("RolloutActor", "RewardActor", "RayTrainWorker")
LIMIT_S = 600


@dataclass(frozen=True)
class Machine:
    """What runs are made for: so many GPUs, or none (the rehearsal)."""

    gpus: int
    folder: Path

    def share(self, of_gpu: float) -> dict[str, float]:
        return {"GPU": of_gpu, "CPU": 1} if self.gpus else {"CPU": 0.5}

    def sft(self, name: str, **sections: Any) -> str:
        training = {"max_steps": STEPS, "per_device_train_batch_size": 8, "learning_rate": 1e-4, "max_length": 128}
        learner = {"workers": 1, "resources": self.share(1)} | sections.pop("learner", {})
        model = {"path": str(self.folder / "policy"), "config": None, "tokenizer": None}
        model["dtype"] = "auto" if self.gpus else "float32"
        checkpoint = {"every": 1000}
        return run_file(
            self.folder, name, model=model, training=training, learner=learner, checkpoint=checkpoint, **sections
        )

    def ppo(self, name: str, steps: int = STEPS, whole: bool = False, **sections: Any) -> str:
        """`whole`: each role has a GPU of its own."""
        learner, rollout, reward = (1, 1, 1) if whole else (0.5, 0.3, 0.2)
        sampling = {"max_new_tokens": 64 if self.gpus else 8}
        values: dict[str, Any] = {
            "model": {"path": str(self.folder / "policy"), "dtype": "auto" if self.gpus else "float32"},
            "learner": {"workers": 1, "resources": self.share(learner)} | sections.pop("learner", {}),
            "rollout": {"actors": 1, "engine": "auto", "resources": self.share(rollout), "sampling": sampling}
            | sections.pop("rollout", {}),
            "reward": {
                "resources": self.share(reward),
                "sources": [{"name": "judge", "model": str(self.folder / "judge"), "batch_size": 16}],
            },
            "ppo": {"steps": steps, "batch_size": 32, "epochs": 1, "minibatches": 2, "learning_rate": 1e-5},
            "checkpoint": {"every": 2},
        }
        return ppo_file(self.folder, name, **(values | sections))

    def runs(self) -> Iterator[tuple[str, str, str]]:
        """Kind, run file and name."""
        yield "sft", self.sft("lora-sft", lora=LORA), "lora-sft"
        yield "sft", self.sft("full-sft"), "full-sft"
        yield "ppo", self.ppo("lora-ppo", lora=LORA), "lora-ppo"
        yield "ppo", self.ppo("full-ppo"), "full-ppo"
        if self.gpus > 1 or not self.gpus:
            broadcast = {"weight_transfer": "broadcast"}
            yield "ppo", self.ppo("broadcast-ppo", whole=self.gpus > 2, rollout=broadcast), "broadcast-ppo"
            zero = {"workers": 2, "deepspeed": {"zero_optimization": {"stage": 3}, "train_batch_size": "auto"}}
            yield "sft", self.sft("zero3-sft", learner=zero), "zero3-sft"


@dataclass
class Memory:
    """The most that a GPU, or without one a process of the run, has held meanwhile, in GiB."""

    machine: Machine
    pid: int
    most: float = 0.0
    done: threading.Event = field(default_factory=threading.Event)

    def look(self) -> None:
        while not self.done.wait(0.5):
            self.most = max([self.most, *(gpu_memory() if self.machine.gpus else self._processes())])

    def _processes(self) -> list[float]:
        found = []
        for process in psutil.Process(self.pid).children(recursive=True):
            try:
                found.append(process.memory_info().rss / GIB)
            except psutil.NoSuchProcess:  # ended while we looked
                continue
        return found


def gpu_memory() -> list[float]:
    words = ["nvidia-smi", "--query-gpu=memory.used", "--format=csv,noheader,nounits"]
    return [float(line) / 1024 for line in subprocess.run(words, capture_output=True, text=True).stdout.split()]


@contextmanager
def watched(machine: Machine, process: subprocess.Popen[str]) -> Iterator[Memory]:
    memory = Memory(machine, process.pid)
    thread = threading.Thread(target=memory.look, daemon=True)
    thread.start()
    try:
        yield memory
    finally:
        memory.done.set()
        thread.join()


def planned_gib(kind: str, file: str, shared: bool) -> float:
    """Of the fullest GPU: of all roles where they share it, else of the largest; without GPUs of the largest process."""
    run = load_run(file, [], kind).run
    found = estimates(run, read_shapes(run)[0])
    sizes = [estimate.total / GIB for estimate in found.values()]
    return sum(sizes) if shared else max(sizes)


def told(kind: str, run: Path, weight_bytes: int) -> str:
    rows = metrics(run)[2:]  # the first two warm up

    def mean(key: str) -> float:
        return statistics.mean(row[key] for row in rows)

    step = mean("time/step_s")
    if kind == "sft":
        tokens = (rows[-1]["num_tokens"] - rows[0]["num_tokens"]) / max(1, len(rows) - 1)
        return f"step {step:.2f} s, {tokens / step:,.0f} tokens/s"
    phases = ("generate", "score", "experience", "update", "sync")
    parts = ", ".join(f"{phase} {mean(f'time/{phase}_s'):.2f}" for phase in phases)
    made = mean("response/length") * 32 / max(mean("time/generate_s"), 1e-9)
    speed = weight_bytes / mean("time/sync_s") / 1e9
    return f"step {step:.2f} s ({parts}), {made:,.0f} sampled tokens/s, weights {speed:.2f} GB/s"


def prove(machine: Machine, kind: str, file: str, name: str, weight_bytes: int) -> str:
    process = start(kind, file)
    with watched(machine, process) as memory:
        output, _ = process.communicate(timeout=LIMIT_S)
    if process.returncode:
        raise RuntimeError(f"exit status {process.returncode}: {output.strip()[-600:]}")
    planned = planned_gib(kind, file, shared=kind == "ppo" and machine.gpus == 1)
    size = f"{memory.most:.2f} GiB at most (plan: {planned:.2f})"
    return f"{told(kind, machine.folder / 'runs' / name, weight_bytes)}, {size}"


def prove_kills(machine: Machine) -> str:
    """A run that loses one process of each role, one after the other; says what each cost until the next step."""
    name = "killed-ppo"
    process = start("ppo", machine.ppo(name, steps=24))
    run, costs = machine.folder / "runs" / name, []
    for number, victim in enumerate(VICTIMS, 1):
        wait_for(f"step {6 * number}", lambda n=number: last_step(run) >= 6 * n, process, LIMIT_S)  # type: ignore[misc]
        at = last_step(run)
        os.kill(worker_pids(process, victim)[-1], signal.SIGKILL)
        began = time.monotonic()
        wait_for("the next step", lambda at=at: last_step(run) > at, process, LIMIT_S)  # type: ignore[misc]
        costs.append(f"{victim} {time.monotonic() - began:.1f} s")
    output, _ = process.communicate(timeout=LIMIT_S)
    if process.returncode:
        raise RuntimeError(f"exit status {process.returncode}: {output.strip()[-600:]}")
    return f"went on after the loss of {', '.join(costs)}"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cpu", action="store_true", help="a rehearsal on a small model, without a GPU")
    options = parser.parse_args()
    import torch

    gpus = 0 if options.cpu else torch.cuda.device_count()
    if not gpus and not options.cpu:
        print("no GPU here, so nothing is proven; --cpu rehearses the same runs on a small model")
        return 1
    names = [torch.cuda.get_device_name(number) for number in range(gpus)]
    print(f"{gpus} x {names[0]}" if names else "rehearsal on the CPU", flush=True)
    failed = 0
    with tempfile.TemporaryDirectory() as where:
        folder = Path(where)
        make_files(folder, SIZES["300m"] if gpus else TINY, MODEL if gpus else TINY)
        weight_bytes = (folder / "policy/model.safetensors").stat().st_size // (2 if gpus else 1)
        machine = Machine(gpus, folder)
        proofs: list[tuple[str, Callable[[], str]]] = [
            (name, lambda kind=kind, file=file, name=name: prove(machine, kind, file, name, weight_bytes))  # type: ignore[misc]
            for kind, file, name in machine.runs()
        ]
        for name, proof in [*proofs, ("kills", lambda: prove_kills(machine))]:
            try:
                print(f"{name:<14} {proof()}", flush=True)
            except Exception as error:
                failed += 1
                print(f"{name:<14} FAILED: {error}", flush=True)
    return int(failed > 0)


if __name__ == "__main__":
    sys.exit(main())
