"""A PPO run that lost actors, workers or everything ends with the very weights of a run that did not."""

import os
import signal
from pathlib import Path
from typing import Any

import pytest

from tests.ppo_files import make_files, ppo_file
from tests.runs import kill_everything, last_step, metrics, raytrl, start, wait_for, weights_hash, worker_pids

# Three or four starts of Ray in one test.
pytestmark = pytest.mark.timeout(600)

STEPS = 32
SETTINGS: dict[str, dict[str, Any]] = {
    "full": {},
    "lora": {"lora": {"r": 4, "target_modules": "all-linear"}},
    "zero2": {"learner": {"workers": 2, "resources": {"CPU": 0.25}, "deepspeed": {"zero_optimization": {"stage": 2}}}},
}
# One run that loses each of its parts in CI; every kind of run by every kind of loss with `-m slow`.
CASES = [
    pytest.param("full", ("RolloutActor", "RewardActor", "RayTrainWorker", "everything")),
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


def written(folder: Path, name: str, kind: str) -> str:
    ppo = {"steps": STEPS, "batch_size": 16, "epochs": 2, "minibatches": 2, "learning_rate": 3e-3}
    return ppo_file(folder, name, **{"ppo": ppo, "checkpoint": {"every": 4}, **SETTINGS[kind]})


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
    output, _ = process.communicate(timeout=240)
    assert process.returncode == 0, output
    rows, whole = metrics(run), undisturbed(kind)
    assert [row["step"] for row in rows] == list(range(1, STEPS + 1))
    for model in ("model", "value_model"):
        assert weights_hash(run / model) == weights_hash(whole / model)
    for row, expected in zip(rows, metrics(whole), strict=True):
        same = [key for key in expected if not key.startswith("time/") and key != "rollout/actors"]
        assert [row[key] for key in same] == [expected[key] for key in same], row["step"]
    assert (run / "samples.jsonl").read_text() == (whole / "samples.jsonl").read_text()
    if "RolloutActor" in victims:
        assert {row["rollout/actors"] for row in rows} == {1.0, 2.0}
