"""The driver's part of a benchmark: what was measured is handed on model by model, and what tasks raise is told in a line."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from raytrl.config.runs.benchmark import BenchmarkRun
from raytrl.errors import RunError
from raytrl.launch.runs import benchmark as launched
from raytrl.plan.checks.benchmark import check_benchmark
from raytrl.records.progress import Progress
from raytrl.roles.benchmark.sliced import Answered
from tests.benchmark_files import make_tasks
from tests.ppo_files import make_policy


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("parts")
    make_policy(folder)
    make_tasks(folder)
    (folder / "tasks/own.py").write_text(
        "calls = 0\n\n\n"
        "def process(doc, results):\n"
        "    global calls\n"
        "    calls += 1\n"
        "    return {'acc': 1 / (calls != 30)}\n"  # in the second model's six of its 24 documents
    )
    text = (folder / "tasks/choose.yaml").read_text().replace("task: choose", "task: coded")
    (folder / "tasks/coded.yaml").write_text(text + "process_results: !function own.process\n")
    return folder


class Choosing:
    """Stands for the actors: likes answers that are long, or short."""

    def hold(self, key: str) -> None:
        self.sign = 1 if key == "model" else -1

    def ask(self, method: str, slices: Any, tell: Any) -> list[Answered]:
        tell(len(slices), len(slices))
        return [Answered([(self.sign * float(len(answer)), False) for _, answer in part], 0) for part in slices]


@contextmanager
def _choosing(*_: Any) -> Iterator[Choosing]:
    yield Choosing()


def parts(folder: Path, monkeypatch: pytest.MonkeyPatch, shown: list[Progress], **section: Any) -> Iterator[Any]:
    monkeypatch.setattr(launched, "asking", _choosing)
    values = {"include": str(folder / "tasks"), "engine": "transformers"} | section
    policy = str(folder / "policy")
    run = BenchmarkRun.model_validate(
        {"name": "b", "model": {"path": policy}, "compare": {"path": policy}, "benchmark": values}
    )
    return launched._Measured(run, check_benchmark(run)[0], shown.append).parts()


def test_each_part_is_handed_on(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shown: list[Progress] = []
    found = parts(folder, monkeypatch, shown, tasks=["choose"], limit=10)
    results, samples = next(found)
    assert "model" in results and "compare" not in results and len(samples) == 10
    results, samples = next(found)
    assert "comparison" not in results and len(samples) == 20
    results, samples = next(found)
    assert {row["metric"] for row in results["comparison"]} == {"acc", "acc_norm"}
    assert all(row["limit"] == 10 for row in results["comparison"])
    assert list(found) == []
    assert "comparing, metrics" in [event.text for event in shown]


def test_what_a_task_raises_is_told_with_its_place_and_takes_nothing_away(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = parts(folder, monkeypatch, [], tasks=["coded"])
    results, samples = next(found)
    assert results["benchmarks"][0]["value"] == 1.0 and len(samples) == 24
    with pytest.raises(RunError, match=r"benchmark: compare: a task failed: ZeroDivisionError: .* \(own\.py:7\)"):
        next(found)


def test_more_examples_than_documents_are_told_in_a_line(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    found = parts(folder, monkeypatch, [], tasks=["choose"], fewshot=30)
    with pytest.raises(RunError, match="benchmark: model: a task failed: ValueError: "):
        next(found)
