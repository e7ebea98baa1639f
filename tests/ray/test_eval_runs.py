"""Benchmarks and pairs as a user types them: over actors of which one is killed, with the numbers that lm-eval alone has."""

import json
import os
import signal
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.benchmark_files import make_tasks
from tests.ppo_files import make_policy
from tests.runs import output_of, pair_rows, raytrl, start, wait_for, worker_pids, write_rows


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("eval")
    make_policy(folder)
    (folder / "second").mkdir()
    make_policy(folder / "second", spread=0.4)
    make_tasks(folder)
    return folder


def run_file(folder: Path, name: str, **sections: Any) -> str:
    values = {"kind": "eval", "name": name, "output_dir": str(folder / "runs"), **sections}
    path = folder / f"{name}.yaml"
    path.write_text(yaml.safe_dump(values))
    return str(path)


def benchmark_file(folder: Path, name: str = "b", **keys: Any) -> str:
    benchmark = {
        "tasks": ["choose", "write"],
        "include": str(folder / "tasks"),
        "engine": "transformers",
        "actors": 2,
        "resources": {"CPU": 0.5},
        "batch_size": 4,
    }
    models = {"model": {"path": str(folder / "policy")}, "compare": {"path": str(folder / "second/policy")}}
    return run_file(folder, name, **models, benchmark=benchmark | keys)


def alone(folder: Path, model: Path) -> dict[tuple[str, str], tuple[float, float | None]]:
    """lm-eval's numbers without raytrl."""
    from lm_eval.evaluator import simple_evaluate
    from lm_eval.models.huggingface import HFLM
    from lm_eval.tasks import TaskManager

    found = simple_evaluate(
        model=HFLM(pretrained=str(model), device="cpu", dtype="float32", batch_size=4),
        tasks=["choose", "write"],
        task_manager=TaskManager(include_path=str(folder / "tasks"), include_defaults=False),
    )["results"]
    return {
        (task, key.partition(",")[0]): (values[key], values[key.replace(",", "_stderr,")])
        for task, values in found.items()
        for key in values
        if "," in key and "_stderr" not in key
    }


def test_a_benchmark_with_an_actor_killed_has_lm_evals_numbers(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    process = start("eval", file := benchmark_file(folder))
    wait_for("two actors", lambda: len(worker_pids(process, "MeasuringActor")) == 2, process)
    os.kill(worker_pids(process, "MeasuringActor")[0], signal.SIGKILL)
    output = output_of(process)
    assert process.returncode == 0, output
    results = json.loads((folder / "runs/b/results.json").read_text())
    monkeypatch.setattr("lm_eval.evaluator.add_env_info", lambda storage: None)
    for key, model in (("model", folder / "policy"), ("compare", folder / "second/policy")):
        rows = [row for row in results["benchmarks"] if row["model"] == key]
        ours = {(row["task"], row["metric"]): (row["value"], row["stderr"]) for row in rows}
        assert ours == {place: pytest.approx(numbers, rel=1e-9) for place, numbers in alone(folder, model).items()}
        assert {(row["n"], row["of"], row["limit"], row["chat"], row["engine"], row["dtype"]) for row in rows} == {
            (24, 24, None, False, "transformers", "float32")
        }
    assert {row["task"] for row in results["comparison"]} == {"choose", "write"}
    samples = [json.loads(line) for line in (folder / "runs/b/samples.jsonl").read_text().splitlines()]
    assert len(samples) == 2 * 2 * 24
    assert "model − compare" in output and "exact sign test" in output
    page = (folder / "runs/b/report.html").read_text()
    assert "Model against compare, document by document" in page
    assert "<h2>Answers</h2>" in page
    again = raytrl("eval", file)
    assert "this evaluation is finished already" in again and "exact sign test" in again
    with (folder / "questions.jsonl").open("a") as file_of_rows:  # the last: the other tests read it
        file_of_rows.write("\n")
    assert "questions.jsonl (other content)" in "".join(raytrl("eval", file).split("\n"))


def test_nothing_starts_for_what_is_wrong(folder: Path) -> None:
    file = benchmark_file(folder, "wrong", tasks=["gone.yaml"])
    assert "benchmark.tasks: gone.yaml: cannot be read" in raytrl("eval", file, status=2)
    assert not (folder / "runs/wrong/manifest.json").exists()


def test_pairs_of_two_reward_models(folder: Path) -> None:
    import torch
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    for name, seed in (("judge", 1), ("other", 2)):
        torch.manual_seed(seed)
        model = AutoModelForSequenceClassification.from_pretrained(folder / "policy", num_labels=1)
        model.save_pretrained(folder / name)
        AutoTokenizer.from_pretrained(folder / "policy").save_pretrained(folder / name)
    rows = [row | {"kind": ["short", "long"][number % 2]} for number, row in enumerate(pair_rows(20))]
    data = write_rows(folder / "pairs.jsonl", [*rows, rows[0] | {"prompt": "film " * 200}])
    models = {"model": {"path": str(folder / "judge")}, "compare": str(folder / "other")}
    pairs = {"data": data, "category": "kind", "actors": 2, "resources": {"CPU": 0.5}, "batch_size": 4}
    file = run_file(folder, "p", **models, pairs=pairs)
    output = raytrl("eval", file)
    results = json.loads((folder / "runs/p/results.json").read_text())
    counts = [(row["model"], row["category"], row["n"], row["too_long"]) for row in results["pairs"]]
    assert counts == [
        (key, *each) for key in ("model", "compare") for each in ((None, 20, 1), ("long", 10, 0), ("short", 10, 1))
    ]
    assert [(row["category"], row["n"], row["left_out"]) for row in results["comparison"]] == [
        (None, 20, 1),
        ("long", 10, 0),
        ("short", 10, 1),
    ]
    assert "mean of the categories" in output and "too long" in output
    assert "pair by pair" in (folder / "runs/p/report.html").read_text()
