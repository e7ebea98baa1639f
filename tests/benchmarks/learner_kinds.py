"""What a learner's step takes without a critic, with a shared one and with one of its own: seconds and memory.

    python -m tests.benchmarks.learner_kinds SIZE [ROUNDS]

SIZE 1m or 6m, float32, two threads. Each kind in a process of its own, one after the other and the whole list again each
round; all do as many optimizer steps on as many tokens. Prints the median seconds of experience and update, and the most
that the process held above what it held before its networks, each beside PPO's.
"""

import resource
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch

from raytrl.config.sections.ppo import PpoSection
from raytrl.roles.learner.build import build_backend, build_networks
from raytrl.roles.learner.learner import PpoLearner
from tests.benchmarks.ppo_update import rollout
from tests.benchmarks.ppo_workload import WORKLOAD, make

LORA = {"r": 16, "lora_alpha": 32, "target_modules": "all-linear"}
KINDS: dict[str, dict[str, Any]] = {
    "ppo": {},
    "ppo, shared": {"shared": True},
    "grpo with KL": {"algorithm": "grpo", "kl": {"coef": 0.05}},
    "grpo": {"algorithm": "grpo"},
}
SAMPLES = 4  # responses to a prompt


def one(folder: str, kind: str, lora: bool) -> None:
    """Prints seconds of experience and update, and MiB."""
    torch.set_num_threads(2)
    settings = {**KINDS[kind]}
    shared = settings.pop("shared", False)
    keys = ("batch_size", "epochs", "minibatches", "learning_rate")
    ppo = PpoSection(steps=4, responses_per_prompt=SAMPLES, **{key: WORKLOAD[key] for key in keys}, **settings)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    reference = ppo.kl.coef > 0
    networks = build_networks(
        f"{folder}/policy", lora=LORA if lora else None, critic=ppo.has_critic, reference=reference, shared=shared
    )
    learner = PpoLearner(
        build_backend(networks, ppo), ppo, temperature=1.0, seed=0, reference="start" if reference else None
    )
    experience_s, update_s = [], []
    for step in range(3):
        began = time.perf_counter()
        experience = learner.experience(rollout(step, SAMPLES))
        middle = time.perf_counter()
        learner.update(experience)
        experience_s.append(middle - began)
        update_s.append(time.perf_counter() - middle)
    held = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024
    print(min(experience_s[1:]), min(update_s[1:]), held)


def main(size: str, rounds: int) -> None:
    with tempfile.TemporaryDirectory() as folder:
        make(Path(folder), size, ends=False)
        for lora in (False, True):
            found: dict[str, list[tuple[float, ...]]] = {kind: [] for kind in KINDS}
            for _ in range(rounds):
                for kind in KINDS:
                    command = [sys.executable, "-m", "tests.benchmarks.learner_kinds", folder, kind, str(int(lora))]
                    output = subprocess.run(command, check=True, capture_output=True, text=True).stdout
                    found[kind].append(tuple(map(float, output.split()[-3:])))
            base = [statistics.median(values) for values in zip(*found["ppo"], strict=True)]
            for kind, rows in found.items():
                medians = [statistics.median(values) for values in zip(*rows, strict=True)]
                shares = [value / whole for value, whole in zip(medians, base, strict=True)]
                print(
                    f"{size} {'LoRA' if lora else 'full'} {kind}: experience {medians[0]:.2f} s ({shares[0]:.2f}), update "
                    f"{medians[1]:.2f} s ({shares[1]:.2f}), {medians[2]:.0f} MiB ({shares[2]:.2f})",
                    flush=True,
                )


if __name__ == "__main__":
    if len(sys.argv) == 4:
        one(sys.argv[1], sys.argv[2], bool(int(sys.argv[3])))
    else:
        main(sys.argv[1], int(sys.argv[2]) if len(sys.argv) > 2 else 3)
