"""`raytrl ppo` against the last PPOTrainer.

python -m tests.benchmarks.ppo_against_trl TRL_PYTHON SIZE [ROUNDS STEPS FULL PROCESSES]

TRL_PYTHON is the Python of an environment of its own with `torch==2.13.0 trl==1.12`; SIZE 1m or 6m; FULL 1: responses
never end before their longest, else after 24 tokens on average, 48 at most. Alternates both in one run: same models,
tokenizer, prompts, batch, epochs and minibatches, two cores each. raytrl: 2 learners, 2 rollout and 2 reward actors of
one thread. TRL: PROCESSES 1: one of two threads; 2 (the faster one here): two of one; 0: both. A first step is not
counted. Prints samples a second, the ratio to TRL's better way, and the split by phase.
"""

import json
import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from tests.benchmarks.ppo_workload import WORKLOAD, make
from tests.runs import ENVIRONMENT, metrics, raytrl, write_run_file

PEER = str(Path(__file__).with_name("trl_ppo.py"))
SPLIT = {"generate", "score", "experience", "update", "sync", "idle"}


def run_raytrl(folder: Path, name: str, steps: int, seed: int) -> dict[str, float]:
    algorithm = {key: WORKLOAD[key] for key in ("batch_size", "epochs", "minibatches", "learning_rate")}
    values: dict[str, Any] = {
        "kind": "ppo",
        "name": name,
        "seed": seed,
        "output_dir": str(folder / "runs"),
        "model": {"path": str(folder / "policy")},
        "value_model": {"init": str(folder / "reward")},
        "data": {"train": str(folder / "prompts.jsonl")},
        "learner": {"workers": 2, "resources": {"CPU": 0.5}},
        "rollout": {
            "actors": 2,
            "resources": {"CPU": 0.25},
            "chunk_prompts": 32,
            "sampling": {"max_new_tokens": WORKLOAD["max_new_tokens"]},
        },
        "reward": {
            "actors": 2,
            "resources": {"CPU": 0.25},
            "sources": [{"name": "model", "model": str(folder / "reward")}],
        },
        "ppo": {**algorithm, "steps": steps},
        "checkpoint": {"every": 100000},
        "report_to": [],
    }
    raytrl("ppo", write_run_file(folder, name, values, {}))
    rows = metrics(folder / "runs" / name)[1:]
    split = {key: statistics.mean(row[f"time/{key}_s"] for row in rows) for key in [*sorted(SPLIT), "step"]}
    return split | {"length": statistics.mean(row["response/length"] for row in rows)}


def run_trl(python: str, folder: Path, name: str, processes: int, steps: int, seed: int) -> dict[str, float]:
    out = folder / f"{name}.json"
    launcher = [] if processes == 1 else ["-m", "torch.distributed.run", "--nproc-per-node", str(processes)]
    done = subprocess.run(
        [python, *launcher, PEER, str(folder), str(steps), str(seed), str(out)],
        env=os.environ | ENVIRONMENT | {"OMP_NUM_THREADS": "1" if processes == 2 else "2"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    if done.returncode:
        raise SystemExit(done.stdout[-3000:])
    result = json.loads(out.read_text())
    rows = result["steps"][1:]
    split = {key: statistics.mean(row.get(key, 0.0) for row in rows) for key in sorted({*rows[0]} - {"step"})}
    step = statistics.mean(row["step"] for row in rows)
    split["forward passes and the rest"] = step - sum(split.values())
    length = statistics.mean(result["lengths"][1:] or [WORKLOAD["max_new_tokens"]])
    return split | {"step": step, "length": length}


def told(result: dict[str, float]) -> str:
    rate = WORKLOAD["batch_size"] / result["step"]
    phases = ", ".join(f"{key} {value:.2f}" for key, value in result.items() if key not in ("step", "length"))
    return f"{rate:6.2f} samples/s, step {result['step']:.2f} s ({phases}), mean length {result['length']:.1f}"


def main() -> None:
    python, size = sys.argv[1:3]
    rounds, steps, full, ways = (int(a) for a in (sys.argv[3:] + ["2", "4", "0", "2"][len(sys.argv) - 3 :]))
    with tempfile.TemporaryDirectory() as where:
        folder = Path(where)
        make(folder, size, ends=not full)
        count = json.loads((folder / "workload.json").read_text())["parameters"]
        print(f"{count / 1e6:.2f} million parameters, responses {'of 48 tokens' if full else 'end by themselves'}")
        ratios = []
        for i in range(rounds):
            ours = run_raytrl(folder, f"raytrl-{i}", steps, seed=i)
            theirs = {
                p: run_trl(python, folder, f"trl-{p}-{i}", p, steps, seed=i) for p in ((1, 2) if ways == 0 else (ways,))
            }
            ratios.append(min(result["step"] for result in theirs.values()) / ours["step"])
            print(f"round {i}  raytrl          {told(ours)}")
            for processes, result in theirs.items():
                print(f"round {i}  TRL, {processes} processes {told(result)}")
            print(f"round {i}  ratio {ratios[-1]:.2f}", flush=True)
        print(f"median ratio {statistics.median(ratios):.2f}")


if __name__ == "__main__":
    main()
