"""`rollout.weight_transfer`: what auto becomes, and what is refused."""

from pathlib import Path
from typing import Any

import pytest

from raytrl.config.load import load_run
from raytrl.config.runs.ppo import PpoRun
from raytrl.errors import ConfigError
from tests.ppo_files import ppo_file

GPU, CPU = {"GPU": 1.0}, {"CPU": 1.0}
LORA = {"r": 4, "target_modules": "all-linear"}


def loaded(
    folder: Path, asked: str | None, learner: dict[str, float], rollout: dict[str, float], actors: int, **sections: Any
) -> str:
    (folder / "policy").mkdir(exist_ok=True)
    (folder / "prompts.jsonl").write_text('{"prompt": "a"}\n')
    (folder / "rule.py").write_text("def spelling(completions, **columns): ...\n")
    rollouts: dict[str, Any] = {"resources": rollout, "actors": actors}
    rollouts |= {} if asked is None else {"weight_transfer": asked}
    workers = 1 if 0 < learner.get("GPU", 0) < 1 else 2
    file = ppo_file(folder, "a", learner={"resources": learner, "workers": workers}, rollout=rollouts, **sections)
    run = load_run(file, []).run
    assert isinstance(run, PpoRun)
    return run.rollout.weight_transfer


@pytest.mark.parametrize(
    ("learner", "rollout", "actors", "sections", "chosen"),
    [
        (GPU, GPU, 2, {}, "broadcast"),
        (GPU, GPU, 1, {}, "object_store"),  # if the only engine dies, nobody has the weights
        (GPU, GPU, 2, {"lora": LORA}, "object_store"),
        (CPU, CPU, 2, {}, "object_store"),
        (GPU, CPU, 2, {}, "object_store"),
        ({"GPU": 0.5}, {"GPU": 0.5}, 2, {}, "object_store"),  # NCCL wants a GPU a member
    ],
)
def test_auto(
    tmp_path: Path,
    learner: dict[str, float],
    rollout: dict[str, float],
    actors: int,
    sections: dict[str, Any],
    chosen: str,
) -> None:
    assert loaded(tmp_path, None, learner, rollout, actors, **sections) == chosen


@pytest.mark.parametrize("asked", ["object_store", "broadcast"])
def test_what_is_asked_for_is_taken(tmp_path: Path, asked: str) -> None:
    assert loaded(tmp_path, asked, CPU, CPU, 1) == asked
    assert loaded(tmp_path, asked, GPU, GPU, 1, lora=LORA) == asked


@pytest.mark.parametrize(
    ("learner", "rollout", "message"),
    [
        (GPU, CPU, "found: GPU 1 in learner.resources and 0 in rollout.resources"),
        (GPU, {"GPU": 0.5}, "needs whole GPUs"),
        ({"GPU": 0.5}, GPU, "needs whole GPUs"),
        (GPU, {"GPU": 2.0}, "holds only a part of the model"),
    ],
)
def test_what_cannot_be(tmp_path: Path, learner: dict[str, float], rollout: dict[str, float], message: str) -> None:
    with pytest.raises(ConfigError, match=f"rollout.weight_transfer: broadcast .*{message}.*set it to object_store"):
        loaded(tmp_path, "broadcast", learner, rollout, 2)
