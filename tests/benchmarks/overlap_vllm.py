"""What `ppo.max_lag` brings in real runs with vLLM on a CPU: one learner and one engine, a core each.

    python -m tests.benchmarks.overlap_vllm [ROUNDS STEPS]

Alternates the lags in one run; GRPO with two optimizer steps a batch on a model of 6 million parameters, in full (lags 0 and 1)
and with LoRA (0, 1, and 2 with adapters side by side). Prints seconds a step, and their ratio to the longer of sampling and
learning at lag 0.
"""

import statistics
import sys
import tempfile
from pathlib import Path

from tests.benchmarks.grpo_against_trl import RULE, grpo_values
from tests.benchmarks.ppo_against_trl import timed_run
from tests.benchmarks.ppo_workload import make

LORA = {"r": 8, "target_modules": "all-linear"}


def seconds(folder: Path, name: str, lag: int, lora: bool, steps: int) -> dict[str, float]:
    """Medians of a step's phases."""
    values = grpo_values(
        folder,
        name,
        steps,
        learner={"workers": 1, "resources": {"CPU": 1}},
        rollout={"engine": "vllm", "resources": {"CPU": 0.9}, "chunk_prompts": 2, "max_prompt_length": 32},
        reward={"resources": {"CPU": 0.1}},
        ppo={"minibatches": 2, "max_lag": lag},
        **({"lora": LORA} if lora else {}),
    )
    rows, _ = timed_run(folder, name, values, steps)
    phases = ("generate", "score", "experience", "update", "sync", "step")
    return {name: statistics.median(row[f"time/{name}_s"] for row in rows[3:-3]) for name in phases}


def main() -> None:
    rounds, steps = (int(a) for a in (sys.argv[1:] + ["2", "14"][len(sys.argv) - 1 :]))
    with tempfile.TemporaryDirectory() as where:
        folder = Path(where)
        make(folder, "6m", ends=True)
        (folder / "rule.py").write_text(RULE)
        for i in range(rounds):
            for lora, lags in ((False, (0, 1)), (True, (0, 1, 2))):
                longer = None
                for lag in lags:
                    found = seconds(folder, f"{'lora' if lora else 'full'}-{lag}-{i}", lag, lora, steps)
                    learning = found["score"] + found["experience"] + found["update"]
                    longer = longer or max(found["generate"], learning)
                    split = ", ".join(f"{name} {value:.2f}" for name, value in found.items())
                    print(
                        f"round {i} {'LoRA' if lora else 'full'} lag {lag}: {split}; {found['step'] / longer:.2f} of the longer",
                        flush=True,
                    )


if __name__ == "__main__":
    main()
