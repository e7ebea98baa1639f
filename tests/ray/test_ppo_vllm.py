"""PPO by the command a user types, with vLLM in the rollout actors."""

import os
import re
import signal
from pathlib import Path
from typing import Any

from tests.ppo_files import make_files, make_policy, ppo_file
from tests.runs import last_step, metrics, output_of, raytrl, start, wait_for, weights_hash, worker_pids


def written(folder: Path, name: str, actors: int) -> str:
    sections: dict[str, Any] = {
        "lora": {"r": 4, "lora_alpha": 16, "target_modules": "all-linear"},
        "rollout": {"engine": "auto", "actors": actors, "resources": {"CPU": 0.25}, "max_prompt_length": 32},
        "ppo": {"steps": 24, "batch_size": 16, "epochs": 2, "minibatches": 2, "learning_rate": 1e-2},
        "checkpoint": {"every": 8},
    }
    return ppo_file(folder, name, **sections)


def test_the_same_weights_whoever_samples(tmp_path: Path) -> None:
    """Two engines, and one that is killed in the middle: the bits of every response, and so the model, stay the same."""
    make_files(tmp_path)
    make_policy(tmp_path, head_size=32)
    output = raytrl("ppo", written(tmp_path, "two", actors=2))
    assert re.search(r"rollout\.actors +2 x CPU 0\.25 ", output)
    assert re.search(r"rollout +vllm ", output)
    assert "WARNING" not in output
    assert "Traceback" not in output
    process = start("ppo", written(tmp_path, "one", actors=1))
    wait_for("step 9", lambda: last_step(tmp_path / "runs/one") >= 9, process)
    (engine,) = worker_pids(process, "RolloutActor")
    os.kill(engine, signal.SIGKILL)
    output = output_of(process)
    assert process.returncode == 0, output
    two, one = (metrics(tmp_path / "runs" / name) for name in ("two", "one"))
    assert [row["step"] for row in one] == list(range(1, 25))
    for row, other in zip(two, one, strict=True):
        same = [key for key in row if not key.startswith("time/") and key != "rollout/actors"]
        assert [row[key] for key in same] == [other[key] for key in same], row["step"]
    assert max(row["rollout/logprob_gap_max"] for row in two) < 1e-4
    assert weights_hash(tmp_path / "runs/two/model") == weights_hash(tmp_path / "runs/one/model")
    assert two[-1]["objective/scores_raw"] > two[0]["objective/scores_raw"]
