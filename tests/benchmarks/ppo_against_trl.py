"""`raytrl ppo` against the last PPOTrainer.

python -m tests.benchmarks.ppo_against_trl TRL_PYTHON SIZE [ROUNDS STEPS FULL PROCESSES]

TRL_PYTHON is the Python of an environment of its own with `torch==2.13.0 trl==1.12`; SIZE 1m or 6m; FULL 1: responses
never end before their longest, else after 24 tokens on average, 48 at most. Alternates both in one run: same models,
tokenizer, prompts, batch, epochs and minibatches, two cores each. raytrl: 2 learners, 2 rollout and 2 reward actors of
one thread. TRL: PROCESSES 1: one of two threads; 2 (the faster one here): two of one; 0: both. A first step is not
counted. Prints samples a second, CPU-seconds a step (all processes, Ray's own included), which a busy machine changes
less, the ratio to TRL's better way, and the split by phase.
"""

import json
import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import psutil

from tests.benchmarks.ppo_workload import WORKLOAD, make
from tests.runs import ENVIRONMENT, last_step, metrics, start, wait_for, write_run_file

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
    rows, cpu = timed_run(folder, name, values, steps)
    rows = rows[1:]
    split = {key: statistics.mean(row[f"time/{key}_s"] for row in rows) for key in [*sorted(SPLIT), "step"]}
    return split | {"length": statistics.mean(row["response/length"] for row in rows), "cpu": cpu}


def timed_run(folder: Path, name: str, values: dict[str, Any], steps: int) -> tuple[list[dict[str, Any]], float]:
    """Its metrics, and CPU-seconds a step after the first of all its processes."""
    # Ray starts its workers at niceness 15, so whatever else the machine does would slow this side alone.
    run = folder / "runs" / name
    process = start("ppo", write_run_file(folder, name, values, {}), RAY_worker_niceness="0")
    spent = []
    for step in (1, steps):
        wait_for(f"step {step}", lambda step=step: last_step(run) >= step, process, 280)  # type: ignore[misc]
        spent.append(cpu_seconds(process.pid))
    output, _ = process.communicate(timeout=120)
    if process.returncode:
        raise SystemExit(output[-3000:])
    return metrics(run), (spent[1] - spent[0]) / (steps - 1)


def cpu_seconds(pid: int) -> float:
    """Of a process and of everything below it, Ray's own processes included."""
    total = 0.0
    for process in [psutil.Process(pid), *psutil.Process(pid).children(recursive=True)]:
        try:
            times = process.cpu_times()
        except psutil.NoSuchProcess:  # ended while we looked
            continue
        total += times.user + times.system
    return total


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
    results = [json.loads(Path(f"{out}.{rank}").read_text()) for rank in range(processes)]
    result = results[0]
    rows = result["steps"][1:]
    split = {key: statistics.mean(row.get(key, 0.0) for row in rows) for key in sorted({*rows[0]} - {"step", "cpu"})}
    step = statistics.mean(row["step"] for row in rows)
    split["forward passes and the rest"] = step - sum(split.values())
    length = statistics.mean(result["lengths"][1:] or [WORKLOAD["max_new_tokens"]])
    cpu = sum(statistics.mean(row["cpu"] for row in other["steps"][1:]) for other in results)
    return split | {"step": step, "length": length, "cpu": cpu}


def told(result: dict[str, float]) -> str:
    rate = WORKLOAD["batch_size"] / result["step"]
    phases = ", ".join(f"{key} {value:.2f}" for key, value in result.items() if key not in ("step", "length", "cpu"))
    work = f"step {result['step']:.2f} s, {result['cpu']:.2f} CPU-s"
    return f"{rate:6.2f} samples/s, {work} ({phases}), mean length {result['length']:.1f}"


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
            best = min(theirs.values(), key=lambda result: result["step"])
            ratios.append(best["step"] / ours["step"])
            print(f"round {i}  raytrl          {told(ours)}")
            for processes, result in theirs.items():
                print(f"round {i}  TRL, {processes} processes {told(result)}")
            print(f"round {i}  ratio {ratios[-1]:.2f}, in CPU-seconds {best['cpu'] / ours['cpu']:.2f}", flush=True)
        print(f"median ratio {statistics.median(ratios):.2f}")


if __name__ == "__main__":
    main()
