"""A PPO run that lost actors, workers or everything ends with the very weights of a run that did not."""

import os
import signal
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.ppo_files import make_files, ppo_file
from tests.runs import (
    kill_everything,
    last_step,
    metrics,
    output_of,
    raytrl,
    start,
    wait_for,
    weights_hash,
    worker_pids,
)

STEPS = 32
SETTINGS: dict[str, dict[str, Any]] = {
    "full": {},
    "lora": {"lora": {"r": 4, "target_modules": "all-linear"}},
    "bf16": {"model": {"dtype": "bfloat16"}},
    "lora-bf16": {"model": {"dtype": "bfloat16"}, "lora": {"r": 4, "target_modules": "all-linear"}},
    "broadcast": {"rollout": {"weight_transfer": "broadcast"}},
    "grpo": {"ppo": {"algorithm": "grpo", "responses_per_prompt": 4, "candidates": 2}, "rollout": {"chunk_prompts": 2}},
    "rloo-lora": {
        "ppo": {"algorithm": "rloo", "responses_per_prompt": 4},
        "rollout": {"chunk_prompts": 2},
        "lora": {"r": 4, "target_modules": "all-linear"},
    },
    "shared": {"value_model": {"shared": True}},
    "lag1": {"ppo": {"max_lag": 1}},
    "lanes": {"ppo": {"max_lag": 2}, "rollout": {"versions": 1}},
    "versions": {"ppo": {"max_lag": 3}},
    "zero2": {"learner": {"workers": 2, "resources": {"CPU": 0.25}, "deepspeed": {"zero_optimization": {"stage": 2}}}},
}
# The run that the others must equal. How weights get to the engines must not matter, so CI, which has time for one run
# that loses each of its parts, takes one by broadcast. Every kind of run by every kind of loss: `-m slow`.
WHOLE = {"broadcast": "full"}
CASES = [
    pytest.param("broadcast", ("RolloutActor", "RewardActor", "RayTrainWorker", "everything")),
    *(
        pytest.param(kind, (victim,), marks=pytest.mark.slow)
        for kind in SETTINGS
        for victim in ("RolloutActor", "RewardActor", "RayTrainWorker", "driver", "everything")
    ),
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("ppo-kills")
    make_files(path)
    return path


def written(folder: Path, name: str, kind: str, **more: Any) -> str:
    ppo = {"steps": STEPS, "batch_size": 16, "epochs": 2, "minibatches": 2, "learning_rate": 3e-3}
    settings = SETTINGS[kind] | {"ppo": ppo | SETTINGS[kind].get("ppo", {})}
    return ppo_file(folder, name, **{"checkpoint": {"every": 4}, **settings, **more})


@pytest.fixture(scope="module")
def undisturbed(folder: Path) -> Any:
    found: dict[str, Path] = {}

    def of(kind: str) -> Path:
        if kind not in found:
            raytrl("ppo", written(folder, f"{kind}-whole", kind))
            found[kind] = folder / f"runs/{kind}-whole"
        return found[kind]

    return of


@pytest.mark.parametrize(("kind", "victims"), CASES)
def test_same_weights(folder: Path, undisturbed: Any, kind: str, victims: tuple[str, ...]) -> None:
    name = "-".join((kind, *victims))
    file, run = written(folder, name, kind), folder / "runs" / name
    process = start("ppo", file)
    for death, victim in enumerate(victims, 1):
        step = 7 * death  # a checkpoint at least, and steps that are lost
        wait_for(f"step {step}", lambda step=step: last_step(run) >= step, process)  # type: ignore[misc]
        if victim in ("driver", "everything"):
            if victim == "driver":
                process.kill()
                process.communicate()
            else:
                kill_everything(process)
            process = start("ppo", file)
        else:
            os.kill(worker_pids(process, victim)[-1], signal.SIGKILL)
    output = output_of(process)
    assert process.returncode == 0, output
    rows, whole = metrics(run), undisturbed(WHOLE.get(kind, kind))
    assert [row["step"] for row in rows] == list(range(1, STEPS + 1))
    for model in ("model", "value_model") if (whole / "value_model").exists() and kind != "shared" else ("model",):
        assert weights_hash(run / model) == weights_hash(whole / model)
    for row, expected in zip(rows, metrics(whole), strict=True):
        same = [key for key in expected if not key.startswith("time/") and key != "rollout/actors"]
        assert [row[key] for key in same] == [expected[key] for key in same], row["step"]
    assert (run / "samples.jsonl").read_text() == (whole / "samples.jsonl").read_text()
    lives = 1 + sum(victim in ("driver", "everything") for victim in victims)
    starts = [log.read_text().count(" starts on node ") for log in (run / "logs").glob("rollout-*.log")]
    assert sum(starts) == 2 * lives + ("RolloutActor" in victims)
    by_broadcast = (run / "logs/learner-0.log").read_text().count("weights go by broadcast from version")
    assert bool(by_broadcast) == (kind == "broadcast")


PHASES = ("generate", "score", "update", "sync", "checkpoint")
PAUSED = str(Path(__file__).with_name("paused"))


@pytest.mark.slow
def test_a_batch_whose_weights_nobody_has_any_more_is_made_by_newer_ones(folder: Path) -> None:
    """Two lanes of one actor each, which get their weights by broadcast, once: the lost one's batch is made by the other."""
    how = {"ppo": {"max_lag": 2, "steps": STEPS, "batch_size": 16, "minibatches": 2}, "checkpoint": {"every": 1000}}
    file = ppo_file(folder, "lost", rollout={"versions": 1, "weight_transfer": "broadcast"}, **how)
    run, places = folder / "runs/lost", folder / "places-lost"
    places.mkdir()
    process = start("ppo", file, PYTHONPATH=PAUSED, RAYTRL_TEST_PAUSES=str(places))
    wait_for("step 7", lambda: last_step(run) >= 7, process)
    (places / "want").write_text("generate")
    wait_for("generate", lambda: bool(list(places.glob("at-*"))), process)
    (here,) = places.glob("at-*")
    here.unlink()
    os.kill(int(here.name.removeprefix("at-")), signal.SIGKILL)
    output = output_of(process)
    assert process.returncode == 0, output
    newer = [row["rollout/redone_newer"] for row in metrics(run)]
    assert len(newer) == STEPS and sorted(newer) == [0.0] * (STEPS - 1) + [16.0]
    assert "16 responses were made by newer weights than planned" in " ".join(output.split())
    assert metrics(run)[-1]["rollout/actors"] == 2


@pytest.mark.slow
@pytest.mark.parametrize("victim", ["RolloutActor", "RewardActor", "RayTrainWorker", "driver"])
def test_killed_in_every_phase(folder: Path, undisturbed: Any, victim: str) -> None:
    """One run that loses the same part once in each phase; prints the seconds that each death cost."""
    name, places = f"phases-{victim}", folder / f"places-{victim}"
    file, run = written(folder, name, "full", learner={"max_failures": len(PHASES)}), folder / "runs" / name
    places.mkdir()
    environment = {"PYTHONPATH": PAUSED, "RAYTRL_TEST_PAUSES": str(places)}
    process = start("ppo", file, **environment)
    for death, phase in enumerate(PHASES, 1):
        step = 5 * death
        wait_for(f"step {step}", lambda step=step: last_step(run) >= step, process)  # type: ignore[misc]
        (places / "want").write_text(phase)
        wait_for(phase, lambda: bool(list(places.glob("at-*"))), process)
        (here,) = places.glob("at-*")
        at, pid = last_step(run), int(here.name.removeprefix("at-"))
        here.unlink()
        process = killed(process, victim, pid, lambda: start("ppo", file, **environment))
        began = time.monotonic()
        wait_for("the next step", lambda at=at: last_step(run) > at, process)  # type: ignore[misc]
        print(f"{victim} in {phase}: the next step came {time.monotonic() - began:.1f} s later")
    output = output_of(process)
    assert process.returncode == 0, output
    for model in ("model", "value_model"):
        assert weights_hash(run / model) == weights_hash(undisturbed("full") / model)
    assert [row["step"] for row in metrics(run)] == list(range(1, STEPS + 1))


@pytest.mark.slow
@pytest.mark.parametrize("phase", ["generate", "sync", "score"])
def test_an_actor_that_keeps_raising_is_started_anew(folder: Path, undisturbed: Any, phase: str) -> None:
    """It lives, and so does its process: what broke in it (a CUDA context, an engine's core) does not come back by itself."""
    name, places = f"broken-{phase}", folder / f"broken-{phase}"
    file, run = written(folder, name, "full"), folder / "runs" / name
    places.mkdir()
    process = start("ppo", file, PYTHONPATH=PAUSED, RAYTRL_TEST_PAUSES=str(places))
    wait_for("step 5", lambda: last_step(run) >= 5, process)
    (places / "want").write_text(f"break {phase}")
    output = output_of(process)
    assert process.returncode == 0, output
    assert list(places.glob("at-*"))
    for model in ("model", "value_model"):
        assert weights_hash(run / model) == weights_hash(undisturbed("full") / model)
    role = "reward" if phase == "score" else "rollout"
    logs = "".join(log.read_text() for log in (run / "logs").glob(f"{role}-*.log"))
    assert logs.count(" starts on node ") == {"reward": 2, "rollout": 3}[role]
    assert "RuntimeError: CUDA error: an illegal memory access was encountered" in logs
    assert "starts on node" in (learner := (run / "logs/learner-0.log").read_text())
    assert learner.count(" starts on node ") == 1  # nobody else had to start again


def killed(
    process: subprocess.Popen[str], victim: str, paused: int, again: Callable[[], subprocess.Popen[str]]
) -> subprocess.Popen[str]:
    """Kills the process that is paused where it is of the wanted kind, else another of that kind."""
    if victim == "driver":
        process.kill()
        process.communicate()
        return again()
    pids = worker_pids(process, victim)
    os.kill(paused if paused in pids else pids[-1], signal.SIGKILL)
    return process
