"""A sweep of learning rate x KL coefficient on an enumerable task, held against the exact reward/KL frontier.

    python -m tests.benchmarks.sweep_frontier FOLDER [grid at1 at2 at3 asha ...]    one that was cut off goes on

grid    12 trials, 3 at a time: reached against exact for each KL coefficient. The best policy is known, pi*(y|x) ~
        pi_ref(y|x) exp(r(x, y)/beta); a policy's distance to it in nats orders the learning rates exactly, while the sweep
        itself sees noisy means over sampled batches only.
at1 ... 6 of these trials, so many at a time: wall time, and the share of it that is not steps.
asha    the trials of one coefficient under ASHA: the steps that it saved, and whether the winner is the grid's.
"""

import json
import os
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import torch
import yaml
from transformers import AutoModelForCausalLM

from tests.runs import ENVIRONMENT, metrics, write_rows

sys.path.extend(str(Path(__file__).parents[1] / place) for place in ("unit/ppo", "learning"))

from optimum import Optimum, exact_logprobs
from test_known_optimum import LENGTH, RULE, write_digit_tokenizer
from toy import PROMPTS, gpt2

RATES = [1e-4, 3e-4, 1e-3, 3e-3]
COEFFICIENTS = [0.1, 0.3, 1.0]
METRIC = "objective/rlhf_reward"
STEPS = 60
AVERAGED = 10  # values of the metric, one a step, that count
RATE, COEFFICIENT = "ppo.learning_rate", "ppo.kl.coef"
# Name of a sweep -> its keys.
SWEEPS: dict[str, dict[str, Any]] = {
    "grid": {"search": {RATE: {"grid": RATES}, COEFFICIENT: {"grid": COEFFICIENTS}}, "max_concurrent": 3},
    **{
        f"at{count}": {
            "search": {RATE: {"grid": RATES[2:]}, COEFFICIENT: {"grid": COEFFICIENTS}},
            "max_concurrent": count,
        }
        for count in (1, 2, 3)
    },
    "asha": {
        "search": {RATE: {"grid": RATES[::-1]}},
        "fixed": {COEFFICIENT: COEFFICIENTS[1]},
        "max_concurrent": 2,
        "scheduler": {"name": "asha", "grace_period": 15, "reduction_factor": 2},
    },
}


def write_files(folder: Path, name: str) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    if not (folder / "policy/tokenizer.json").exists():
        gpt2(1).save_pretrained(folder / "policy")  # type: ignore[operator]
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
        "ppo": {"steps": STEPS, "batch_size": 256, "epochs": 4, "minibatches": 1},
        "report_to": [],
    }
    sweep = {
        "kind": "tune",
        "name": name,
        "output_dir": str(folder / "runs"),
        "base": str(folder / "base.yaml"),
        "metric": METRIC,
        "average_last": AVERAGED,
        "mode": "max",
        **SWEEPS[name],
    }
    (folder / "base.yaml").write_text(yaml.safe_dump(base, sort_keys=False))
    (folder / f"{name}.yaml").write_text(yaml.safe_dump(sweep, sort_keys=False))
    return folder / f"{name}.yaml"


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


def trials_of(sweep: Path) -> list[dict[str, Any]]:
    file = sweep / "trials.json"
    return list(json.loads(file.read_text())) if file.exists() else []


def compare(sweep: Path) -> None:
    """Reached against exact for each coefficient, and how the learning rate that the sweep would pick compares.

    The regret is what the pick lacks of the best objective in the grid, E[r] - beta KL, exactly: beta times the difference
    of the distances. A sweep cannot see differences below the error of its metric.
    """
    start = gpt2(1)
    for beta in COEFFICIENTS:
        optimum = Optimum.of(start, LENGTH, beta)
        found = {}
        for trial in trials_of(sweep):
            if trial["values"][COEFFICIENT] == beta and trial["state"] == "done":
                model = AutoModelForCausalLM.from_pretrained(sweep / "trials" / trial["name"] / "model")
                last = [row[METRIC] for row in metrics(sweep / "trials" / trial["name"])[-AVERAGED:]]
                error = statistics.stdev(last) / len(last) ** 0.5
                found[trial["values"][RATE]] = (*reached(model, optimum), trial["metrics"][METRIC], error)
        exact = min(found, key=lambda rate: found[rate][2])
        pick = max(found, key=lambda rate: found[rate][3])
        reward, kl = best_possible(optimum)
        distances = ", ".join(f"{rate:g}: {values[2]:.4f}" for rate, values in found.items())
        print(
            f"beta {beta}: optimum E[r] {reward:.3f} at KL {kl:.3f}; reached {found[pick][0]:.3f} at {found[pick][1]:.3f} "
            f"(the sweep's pick, {pick:g})\n  KL(pi, pi*) {optimum.distance(start):.4f} at the start; by learning rate "
            f"{distances}; best {exact:g}\n  regret of the pick {beta * (found[pick][2] - found[exact][2]):.4f}, standard "
            f"error of its metric {found[pick][4]:.4f}"
        )


def times(sweep: Path, wall: float) -> None:
    """Where a sweep's wall time went; its trials' own seconds overlap where they run side by side."""
    trials = trials_of(sweep)
    each = [[row["time/step_s"] for row in metrics(sweep / "trials" / trial["name"])] for trial in trials]
    seconds = sum(trial["seconds"] for trial in trials)
    stepping = sum(sum(steps) for steps in each)
    print(
        f"{sweep.name}: {wall:.0f} s of wall time, {wall / len(trials):.1f} s a trial; the {len(trials)} trials lived "
        f"{seconds:.0f} s, of them {stepping:.0f} s ({stepping / seconds:.0%}) in {sum(map(len, each))} steps, the rest "
        f"starts and ends"
    )
    for trial in trials:
        print(f"  {trial['name']}: {trial['state']}, step {trial['step']}, {trial['seconds']:.0f} s {trial['cause']}")


def against_grid(asha: Path, grid: Path) -> None:
    """What ASHA saved of the same trials of the grid, and whether it kept the best of them."""
    trials = trials_of(asha)
    steps = sum(trial["step"] for trial in trials)
    best = max((t for t in trials if t["state"] == "done"), key=lambda trial: trial["metrics"][METRIC])
    print(f"asha: {steps} of {STEPS * len(trials)} steps; winner {best['values'][RATE]:g}")
    same = [t for t in trials_of(grid) if t["values"][COEFFICIENT] == COEFFICIENTS[1] and t["state"] == "done"]
    if same:
        found = max(same, key=lambda trial: trial["metrics"][METRIC])["values"][RATE]
        print(f"the grid's winner for this coefficient, of {len(same)}: {found:g}")


def main() -> None:
    folder = Path(sys.argv[1]).resolve()
    for name in sys.argv[2:] or list(SWEEPS):
        file, sweep = write_files(folder, name), folder / "runs" / name
        was_done, started = (sweep / "results.csv").exists(), time.monotonic()
        command = [sys.executable, "-m", "raytrl", "tune", str(file)]
        subprocess.run(command, check=True, env=os.environ | ENVIRONMENT)
        if not was_done:
            times(sweep, time.monotonic() - started)
        if name == "grid":
            compare(sweep)
        if name == "asha":
            against_grid(sweep, folder / "runs/grid")


if __name__ == "__main__":
    main()
