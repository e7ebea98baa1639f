"""A run that was killed and started again ends with the very weights of a run that was not."""

import os
import signal
from pathlib import Path
from typing import Any

import pytest

from tests.runs import (
    is_committed,
    kill_everything,
    last_step,
    metrics,
    output_of,
    raytrl,
    run_file,
    start,
    text_rows,
    wait_for,
    weights_hash,
    worker_pids,
    write_rows,
)

KINDS: dict[str, dict[str, Any]] = {
    "plain": {},
    "lora": {"lora": {"r": 4, "target_modules": "all-linear"}},
    "bf16": {"model": {"dtype": "bfloat16"}},
    "zero2": {"learner": {"workers": 2, "deepspeed": {"zero_optimization": {"stage": 2}, "train_batch_size": "auto"}}},
}
LONG = {"training": {"max_steps": 40}}  # whoever is killed has not ended meanwhile
# One run that dies twice in CI; every kind of run by every kind of death with `-m slow`.
CASES = [
    pytest.param("zero2", ("worker", "driver"), id="zero2-worker-driver"),
    *(
        pytest.param(kind, (victim,), marks=pytest.mark.slow, id=f"{kind}-{victim}")
        for kind in KINDS
        for victim in ("worker", "driver", "everything")
    ),
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("kills")
    write_rows(path / "train.jsonl", text_rows(80))
    return path


@pytest.fixture(scope="module")
def undisturbed(folder: Path) -> Any:
    hashes: dict[str, str] = {}

    def of(kind: str) -> str:
        if kind not in hashes:
            raytrl("sft", run_file(folder, f"{kind}-whole", **LONG, **KINDS[kind]))
            hashes[kind] = weights_hash(folder / f"runs/{kind}-whole/model")
        return hashes[kind]

    return of


@pytest.mark.parametrize(("kind", "victims"), CASES)
def test_same_weights(folder: Path, undisturbed: Any, kind: str, victims: tuple[str, ...]) -> None:
    name = "-".join((kind, *victims))
    file, run = run_file(folder, name, **LONG, **KINDS[kind]), folder / "runs" / name
    process = start("sft", file)
    output = ""
    for death, victim in enumerate(victims, 1):
        step = 3 * death  # two checkpoints, and a step that is lost
        wait_for(f"step {step}", lambda step=step: last_step(run) >= step and is_committed(run), process)  # type: ignore[misc]
        if victim == "worker":
            os.kill(worker_pids(process)[1], signal.SIGKILL)
            continue
        if victim == "driver":
            process.kill()
            process.communicate()
        else:
            kill_everything(process)
        process = start("sft", file)
    output = output_of(process)
    assert process.returncode == 0, output
    assert "continues from step" in output
    assert [row["step"] for row in metrics(run)] == list(range(1, 41))
    assert weights_hash(run / "model") == undisturbed(kind)
    assert len(list((run / "checkpoints").glob("checkpoint_2*"))) == 2
