"""A sweep of learning rate × KL coefficient on an enumerable task, held against the exact reward/KL frontier.

python -m tests.benchmarks.sweep_frontier FOLDER [key=value ...]    runs the sweep in FOLDER (again: goes on), then compares

For each KL coefficient the best policy is known, pi*(y|x) ~ pi_ref(y|x) exp(r(x, y)/beta); a policy's distance to it in
nats orders the learning rates exactly, while the sweep itself sees noisy means over sampled batches only.
"""

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import torch
import yaml
from transformers import AutoModelForCausalLM

from tests.ray.test_known_optimum import LENGTH, RULE, write_digit_tokenizer
from tests.runs import ENVIRONMENT, write_rows

sys.path.insert(0, str(Path(__file__).parents[1] / "unit/ppo"))

from optimum import Optimum, exact_logprobs
from toy import PROMPTS, gpt2

RATES = [3e-4, 1e-3, 3e-3]
COEFFICIENTS = [0.1, 0.2, 0.5, 1.0]
METRIC = "objective/rlhf_reward"


def write_files(folder: Path) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    gpt2(1).save_pretrained(folder / "policy")
    write_digit_tokenizer(folder / "policy")
    write_rows(folder / "prompts.jsonl", [{"prompt": " ".join(map(str, PROMPTS[i % 4]))} for i in range(256)])
    (folder / "rule.py").write_text(RULE)
    base = {
        "kind": "ppo",
        "name": "base",
        "model": {"path": str(folder / "policy")},
        "data": {"train": str(folder / "prompts.jsonl")},
        "learner": {"workers": 1, "resources": {"CPU": 0.3}},
        "rollout": {
            "actors": 1,
            "resources": {"CPU": 0.3},
            "engine": "transformers",
            "sampling": {"max_new_tokens": LENGTH},
            "chunk_prompts": 256,
        },
        "reward": {"resources": {"CPU": 0.2}, "sources": [{"name": "rule", "function": f"{folder}/rule.py:rule"}]},
        "ppo": {"steps": 60, "batch_size": 256, "epochs": 4, "minibatches": 1},
        "report_to": [],
    }
    sweep = {
        "kind": "tune",
        "name": "frontier",
        "output_dir": str(folder / "runs"),
        "base": str(folder / "base.yaml"),
        "search": {"ppo.learning_rate": {"grid": RATES}, "ppo.kl.coef": {"grid": COEFFICIENTS}},
        "metric": METRIC,
        "average_last": 10,
        "mode": "max",
    }
    (folder / "base.yaml").write_text(yaml.safe_dump(base, sort_keys=False))
    (folder / "sweep.yaml").write_text(yaml.safe_dump(sweep, sort_keys=False))
    return folder / "sweep.yaml"


def reached(model: torch.nn.Module, optimum: Optimum) -> tuple[float, float, float]:
    """Exact E[r], KL to the reference and KL to the optimum of a policy, means over prompts."""
    rewards, kls = [], []
    for prompt, ref, values in zip(PROMPTS, optimum.reference, optimum.rewards, strict=True):
        logprobs = exact_logprobs(model, prompt, LENGTH)
        rewards.append(float((logprobs.exp() * values).sum()))
        kls.append(float((logprobs.exp() * (logprobs - ref)).sum()))
    return sum(rewards) / len(rewards), sum(kls) / len(kls), optimum.distance(model)


def best_possible(optimum: Optimum) -> tuple[float, float]:
    """Exact E[r] and KL of the optimum itself."""
    rewards, kls = [], []
    for ref, values in zip(optimum.reference, optimum.rewards, strict=True):
        best = torch.log_softmax(ref + values / optimum.beta, 0)
        rewards.append(float((best.exp() * values).sum()))
        kls.append(float((best.exp() * (best - ref)).sum()))
    return sum(rewards) / len(rewards), sum(kls) / len(kls)


def compare(sweep: Path) -> None:
    trials = json.loads((sweep / "trials.json").read_text())
    start = gpt2(1)
    print("beta   E*[r]  reached  KL*    reached  KL(pi,pi*) at start -> by learning rate   best exact, best by metric")
    for beta in COEFFICIENTS:
        optimum = Optimum.of(start, LENGTH, beta)
        found = {}
        for trial in trials:
            if trial["values"]["ppo.kl.coef"] == beta and trial["state"] == "done":
                model = AutoModelForCausalLM.from_pretrained(sweep / "trials" / trial["name"] / "model")
                found[trial["values"]["ppo.learning_rate"]] = (*reached(model, optimum), trial["metrics"][METRIC])
        exact = min(found, key=lambda rate: found[rate][2])
        by_metric = max(found, key=lambda rate: found[rate][3])
        reward, kl = best_possible(optimum)
        distances = "  ".join(f"{rate:g}: {values[2]:.4f}" for rate, values in found.items())
        print(
            f"{beta:<6} {reward:.3f}  {found[by_metric][0]:.3f}    {kl:.3f}  {found[by_metric][1]:.3f}    "
            f"{optimum.distance(start):.4f} -> {distances}   {exact:g}, {by_metric:g}"
        )


def main() -> None:
    folder = Path(sys.argv[1]).resolve()
    file = write_files(folder)
    started = time.monotonic()
    command = [sys.executable, "-m", "raytrl", "tune", str(file), *sys.argv[2:]]
    subprocess.run(command, check=True, env=os.environ | ENVIRONMENT)
    print(f"{time.monotonic() - started:.0f} s")
    compare(folder / "runs/frontier")


if __name__ == "__main__":
    main()
