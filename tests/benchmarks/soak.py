"""A long PPO run that loses one of its processes again and again, against one that is left alone.

    python -m tests.benchmarks.soak FOLDER [STEPS EVERY]

Two learner workers, two rollout and two reward actors; every EVERY (50) of STEPS (500) steps one of them, the driver, or
everything is killed with SIGKILL; the driver is started again where it went. Prints for each stretch between two kills the
median step, the resident memory of each kind of process at the stretch's end (the largest of its kind), and what the kill
before it cost until the next step. Exit status 1 where memory of a kind grew by more than 5 % and 20 MiB between the second
and the last stretch, where steps of the last are more than 1.5 times those of the second, or where a bit differs at the end.
"""

import itertools
import os
import signal
import statistics
import sys
import time
from pathlib import Path
from typing import Any

import psutil

from tests.ppo_files import make_files, ppo_file
from tests.runs import kill_everything, last_step, metrics, start, wait_for, weights_hash, worker_pids

KINDS = {"driver": "raytrl", "board": "ray::Board", "learner": "RayTrainWorker", "rollout": "RolloutActor"}
KINDS |= {"reward": "RewardActor", "controller": "TrainController", "raylet": "raylet/raylet", "gcs": "gcs_server"}
MODELS = ("model", "value_model")
VICTIMS = ("rollout", "reward", "learner", "driver", "everything")


def memory_mib(driver: psutil.Process) -> dict[str, float]:
    """Resident memory of the largest process of each kind, without what it shares with others (the object store)."""
    found: dict[str, float] = {}
    for process in [driver, *driver.children(recursive=True)]:
        try:
            line, info = " ".join(process.cmdline()), process.memory_info()
        except psutil.NoSuchProcess:  # ended while we looked
            continue
        own = (info.rss - info.shared) / 2**20
        for kind, word in KINDS.items():
            if word in line:
                found[kind] = max(found.get(kind, 0.0), own)
                break
    return found


def kill(process: Any, victim: str) -> bool:
    """Whether the driver has to be started again."""
    if victim == "everything":
        kill_everything(process)
        return True
    if victim == "driver":
        process.kill()
        process.communicate()
        return True
    os.kill(worker_pids(process, KINDS[victim])[-1], signal.SIGKILL)
    return False


def file_of(folder: Path, name: str, steps: int) -> str:
    ppo = {"steps": steps, "batch_size": 16, "epochs": 2, "minibatches": 2, "learning_rate": 1e-3}
    learner = {"workers": 2, "resources": {"CPU": 0.25}, "max_failures": 100}
    reward = {"actors": 2, "resources": {"CPU": 0.25}}
    return ppo_file(
        folder,
        name,
        ppo=ppo,
        learner=learner,
        reward=reward,
        checkpoint={"every": 10},
    )


def main(folder: Path, steps: int, every: int) -> int:
    folder.mkdir(parents=True, exist_ok=True)
    make_files(folder)
    file, run = file_of(folder, "killed", steps), folder / "runs/killed"
    process, victims = start("ppo", file), itertools.cycle(VICTIMS)
    kinds = list(KINDS)
    print(
        f"{'steps':>9} {'step s':>7} {'next s':>7}  " + " ".join(f"{kind:>10}" for kind in kinds) + "   killed after",
        flush=True,
    )
    stretches: list[tuple[float, dict[str, float]]] = []
    cost = 0.0
    for end in range(every, steps + 1, every):
        wait_for(f"step {end}", lambda end=end: last_step(run) >= end - 1, process, 60 * every)  # type: ignore[misc]
        used = memory_mib(psutil.Process(process.pid))
        times = [row["time/step_s"] for row in metrics(run) if end - every < row["step"] <= end]
        stretches.append((statistics.median(times), used))
        victim = next(victims) if end < steps else "-"
        shown = " ".join(f"{used.get(kind, 0.0):>6.0f} MiB" for kind in kinds)
        print(f"{end - every + 1:>4}-{end:<4} {stretches[-1][0]:>7.3f} {cost:>7.1f}  {shown}   {victim}", flush=True)
        if end < steps:
            at, began = last_step(run), time.monotonic()
            if kill(process, victim):
                process = start("ppo", file)
            wait_for("the next step", lambda at=at: last_step(run) > at, process, 300)  # type: ignore[misc]
            cost = time.monotonic() - began
    output, _ = process.communicate(timeout=300)
    if process.returncode:
        raise SystemExit(output[-3000:])
    raytrl_whole(folder, steps)
    hashes = {(name, run): weights_hash(folder / "runs" / run / name) for name in MODELS for run in ("killed", "whole")}
    problems = [f"{name}: other bits" for name in MODELS if hashes[name, "killed"] != hashes[name, "whole"]]
    (early_s, early), (late_s, late) = stretches[1], stretches[-1]
    problems += [
        f"{kind}: {early[kind]:.0f} MiB became {late[kind]:.0f}"
        for kind in kinds
        if kind in early and kind in late and late[kind] > 1.05 * early[kind] and late[kind] > early[kind] + 20
    ]
    problems += [f"a step of {early_s:.3f} s became {late_s:.3f}"] if late_s > 1.5 * early_s else []
    print("; ".join(problems) or f"{steps} steps: equal bits, flat memory, flat steps")
    return int(bool(problems))


def raytrl_whole(folder: Path, steps: int) -> None:
    process = start("ppo", file_of(folder, "whole", steps))
    output, _ = process.communicate()
    if process.returncode:
        raise SystemExit(output[-3000:])


if __name__ == "__main__":
    given = [int(word) for word in sys.argv[2:]]
    sys.exit(main(Path(sys.argv[1]), *(given + [500, 50][len(given) :])))
