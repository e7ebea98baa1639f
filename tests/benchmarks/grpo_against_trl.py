"""`raytrl ppo` with `ppo.algorithm: grpo` against TRL's GRPOTrainer.

    python -m tests.benchmarks.grpo_against_trl SIZE [ROUNDS STEPS SEEDS]

SIZE 1m or 6m. Alternates both in one run, two cores each: same model, tokenizer, prompts, batch, group, lengths and rule,
transformers generates on both sides, one optimizer step a batch, no KL. raytrl: 2 learners, 2 rollout actors and a reward
actor of one thread. TRL: two processes of one thread under torchrun. A first step is not counted. Prints samples a second,
CPU-seconds a step, raytrl's split by phase, and the reward at the end over the seeds.
"""

import json
import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from tests.benchmarks.ppo_against_trl import SPLIT, timed_run
from tests.benchmarks.ppo_workload import WORKLOAD, make
from tests.runs import ENVIRONMENT

PEER = str(Path(__file__).with_name("trl_grpo.py"))
GROUP, LEARNING_RATE = 8, 1e-4
RULE = """
def low_words(completions, **columns):
    return [sum(int(word[1:]) < 256 for word in text.split()) / max(1, len(text.split())) for text in completions]
"""


def grpo_values(folder: Path, name: str, steps: int, **sections: Any) -> dict[str, Any]:
    """A run file of the workload; keyword arguments extend its sections."""
    values: dict[str, Any] = {
        "kind": "ppo",
        "name": name,
        "output_dir": str(folder / "runs"),
        "model": {"path": str(folder / "policy")},
        "data": {"train": str(folder / "prompts.jsonl")},
        "learner": {},
        "rollout": {"sampling": {"max_new_tokens": WORKLOAD["max_new_tokens"]}},
        "reward": {"sources": [{"name": "rule", "function": f"{folder}/rule.py:low_words"}]},
        "ppo": {
            "algorithm": "grpo",
            "steps": steps,
            "batch_size": WORKLOAD["batch_size"],
            "responses_per_prompt": GROUP,
        },
        "checkpoint": {"every": 100000},
        "report_to": [],
    }
    extended = {key: values[key] | more for key, more in sections.items() if isinstance(values.get(key), dict)}
    return values | sections | extended


def run_raytrl(folder: Path, name: str, steps: int, seed: int) -> dict[str, Any]:
    quarter = {"resources": {"CPU": 0.25}}
    values = grpo_values(
        folder,
        name,
        steps,
        seed=seed,
        learner={"workers": 2, "resources": {"CPU": 0.5}},
        rollout={
            "engine": "transformers",
            "actors": 2,
            "chunk_prompts": WORKLOAD["batch_size"] // GROUP // 2,
            **quarter,
        },
        reward=quarter,
        ppo={"learning_rate": LEARNING_RATE},
    )
    rows, cpu = timed_run(folder, name, values, steps)
    split = {key: statistics.median(row[f"time/{key}_s"] for row in rows[1:]) for key in sorted(SPLIT)}
    return {
        "step": statistics.median(row["time/step_s"] for row in rows[1:]),
        "cpu": cpu,
        "reward": [row["reward"] for row in rows],
        "length": statistics.mean(row["response/length"] for row in rows),
        "split": ", ".join(f"{key} {value:.2f}" for key, value in split.items()),
    }


def run_trl(folder: Path, name: str, steps: int, seed: int) -> dict[str, Any]:
    out = folder / f"{name}.json"
    launcher = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2"]
    done = subprocess.run(
        [*launcher, PEER, str(folder), str(steps), str(seed), str(out)],
        env=os.environ | ENVIRONMENT | {"OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    if done.returncode:
        raise SystemExit(done.stdout[-3000:])
    ranks = [json.loads(Path(f"{out}.{rank}").read_text()) for rank in range(2)]
    return {
        "step": statistics.median(ranks[0]["step"]),
        "cpu": sum(statistics.mean(rank["cpu"]) for rank in ranks),
        "reward": ranks[0]["reward"],
        "length": statistics.mean(ranks[0]["length"]),
        "split": "",
    }


def main() -> None:
    size = sys.argv[1]
    rounds, steps, seeds = (int(a) for a in (sys.argv[2:] + ["2", "12", "1"][len(sys.argv) - 2 :]))
    with tempfile.TemporaryDirectory() as where:
        folder = Path(where)
        make(folder, size, ends=True)
        workload = json.loads((folder / "workload.json").read_text())
        (folder / "workload.json").write_text(json.dumps(workload | {"grpo_learning_rate": LEARNING_RATE}))
        (folder / "rule.py").write_text(RULE)
        ratios, ends = [], {"raytrl": list[float](), "TRL": list[float]()}
        for i in range(max(rounds, seeds)):
            sides = {
                "raytrl": run_raytrl(folder, f"raytrl-{i}", steps, i),
                "TRL": run_trl(folder, f"trl-{i}", steps, i),
            }
            ratios.append(sides["TRL"]["step"] / sides["raytrl"]["step"])
            for side, found in sides.items():
                last = statistics.mean(found["reward"][-steps // 4 :])
                ends[side].append(last)
                print(
                    f"round {i}  {side:6s} {WORKLOAD['batch_size'] / found['step']:6.2f} samples/s, step {found['step']:.2f} s, "
                    f"{found['cpu']:.2f} CPU-s, length {found['length']:.1f}, reward {found['reward'][0]:.3f} -> {last:.3f}  "
                    f"{found['split']}"
                )
            cpu = sides["TRL"]["cpu"] / sides["raytrl"]["cpu"]
            print(f"round {i}  ratio {ratios[-1]:.2f}, in CPU-seconds {cpu:.2f}", flush=True)
        print(f"median ratio {statistics.median(ratios):.2f}")
        for side, found in ends.items():
            print(
                f"{side}: reward of the last quarter, mean {statistics.mean(found):.4f}, {[round(x, 4) for x in found]}"
            )


if __name__ == "__main__":
    main()
