"""What raytrl costs beside the bare trainer: python -m tests.benchmarks.sft_overhead [ROUNDS] [STEPS]

Alternates, in one run: `raytrl sft` and the bare SFTTrainer (1 worker), `raytrl sft` and torchrun (2 workers); same
model, data, batch and steps, one thread a process. Prints medians and the ratios, pair by pair.
"""

import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import yaml

from tests.runs import ENVIRONMENT, metrics, raytrl

CONFIG = "configs/sft-reviews.yaml"
BARE = str(Path(__file__).with_name("bare_sft.py"))


def run_raytrl(folder: Path, name: str, workers: int, steps: int) -> dict[str, Any]:
    begun = time.time()
    raytrl(
        "sft", CONFIG, f"name={name}", f"output_dir={folder}", f"learner.workers={workers}", f"training.max_steps={steps}",
        "data.eval=null", "checkpoint.every=100000", "report_to=null",
    )  # fmt: skip
    rows = metrics(folder / name)
    startup = json.loads((folder / name / "manifest.json").read_text())["startup"]
    return {
        "step_s": [row["time/step_s"] for row in rows[1:]],
        "first_step_s": startup["checks_s"] + startup["ray_s"] + startup["first_step_s"],
        "peak_gib": rows[-1]["memory/peak_gib"],
        "startup": startup,
        "total_s": time.time() - begun,
    }


def run_bare(folder: Path, name: str, workers: int, steps: int, train: str, base: str) -> dict[str, Any]:
    out = folder / f"{name}.json"
    launcher = [] if workers == 1 else ["-m", "torch.distributed.run", "--nproc-per-node", str(workers)]
    begun = time.time()
    subprocess.run(
        [sys.executable, *launcher, BARE, base, train, str(steps), str(out)],
        check=True,
        env=os.environ | ENVIRONMENT,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    result: dict[str, Any] = json.loads(out.read_text())
    return result | {"total_s": time.time() - begun}


def ray_alone() -> float:
    """Seconds that Ray itself takes to start and to enter an empty train function on one worker."""
    code = (
        "import ray, ray.train.torch as t; from ray.train import ScalingConfig\n"
        "ray.init(address='local', include_dashboard=False, log_to_driver=False, logging_level='ERROR')\n"
        "t.TorchTrainer(lambda: None, scaling_config=ScalingConfig(num_workers=1)).fit()\n"
    )
    begun = time.time()
    quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
    subprocess.run([sys.executable, "-c", code], check=True, env=os.environ | ENVIRONMENT, **quiet)  # type: ignore[call-overload]
    return time.time() - begun


def main() -> None:
    rounds, steps = (int(a) for a in (sys.argv[1:] + ["3", "30"][len(sys.argv) - 1 :]))
    with tempfile.TemporaryDirectory() as where:
        folder = Path(where)
        train = yaml.safe_load(Path(CONFIG).read_text())["data"]["train"]
        run_raytrl(folder, "warm-up", 1, 2)  # makes the base model, fills the caches
        base = str(folder / "warm-up/base")
        for workers in (1, 2):
            ratios, starts = [], []
            for i in range(rounds):
                ours = run_raytrl(folder, f"ours-{workers}-{i}", workers, steps)
                bare = run_bare(folder, f"bare-{workers}-{i}", workers, steps, train, base)
                ray_s = ray_alone()
                ratios.append(statistics.median(ours["step_s"]) / statistics.median(bare["step_s"]))
                starts.append(ours["first_step_s"] / (bare["first_step_s"] + ray_s))
                print(
                    f"{workers} workers, round {i}: step {statistics.median(ours['step_s']):.4f} s against "
                    f"{statistics.median(bare['step_s']):.4f} s, ratio {ratios[-1]:.3f}; first step {ours['first_step_s']:.1f} s "
                    f"against {bare['first_step_s']:.1f} s and {ray_s:.1f} s of Ray alone, "
                    f"ratio {starts[-1]:.2f}; peak {ours['peak_gib']:.2f} GiB against {bare['peak_gib']:.2f} GiB; "
                    f"start { ({k: round(v, 1) for k, v in ours['startup'].items()}) }",
                    flush=True,
                )
            print(
                f"{workers} workers: median ratio of step times {statistics.median(ratios):.3f}, of starts "
                f"{statistics.median(starts):.2f}",
                flush=True,
            )


if __name__ == "__main__":
    main()
