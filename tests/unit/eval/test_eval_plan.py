"""`raytrl plan` of benchmarks and pairs: what would run, and what is refused; it starts nothing."""

from pathlib import Path
from typing import Any

import pytest
import yaml
from typer.testing import CliRunner

from raytrl.cli import app
from raytrl.config.load import load_run
from raytrl.errors import ConfigError
from raytrl.plan.checks.benchmark import check_benchmark, made_from
from tests.benchmark_files import make_tasks
from tests.ppo_files import make_policy
from tests.runs import pair_rows, write_rows


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    folder = tmp_path_factory.mktemp("plan")
    policy = make_policy(folder)
    make_tasks(folder)
    AutoModelForSequenceClassification.from_pretrained(policy, num_labels=1).save_pretrained(folder / "judge")
    AutoTokenizer.from_pretrained(policy).save_pretrained(folder / "judge")
    rows = [row | {"kind": "ab"[number % 2]} for number, row in enumerate(pair_rows(6))]
    same = {"prompt": "a", "chosen": " film", "rejected": " film", "kind": "c"}
    write_rows(folder / "pairs.jsonl", [*rows, same])
    return folder


def plan(folder: Path, status: int, *overrides: str, **sections: Any) -> str:
    path = folder / "e.yaml"
    path.write_text(yaml.safe_dump({"kind": "eval", "name": "e", "output_dir": str(folder / "runs"), **sections}))
    found = CliRunner().invoke(app, ["plan", str(path), *overrides], env={"COLUMNS": "250"})
    assert found.exit_code == status, found.output
    assert not (folder / "runs").exists()
    return " ".join(found.output.split())


def benchmark(folder: Path) -> dict[str, Any]:
    section = {"tasks": ["choose", "write"], "include": str(folder / "tasks"), "engine": "transformers"}
    return {"model": {"path": str(folder / "policy")}, "benchmark": section}


def pairs(folder: Path) -> dict[str, Any]:
    return {
        "model": {"path": str(folder / "judge")},
        "pairs": {"data": str(folder / "pairs.jsonl"), "category": "kind"},
    }


def test_of_a_benchmark(folder: Path) -> None:
    said = plan(folder, 0, "benchmark.limit=5", **benchmark(folder))
    for words in (
        "benchmark.actors 1 CPU 1",
        "log-probs",
        "tasks 2, with 10 documents: choose, write",
        "chat template not applied",
        "limit the first 5 documents of each task",
        "computes in float32",
    ):
        assert words in said


def test_python_of_a_task_is_told(folder: Path) -> None:
    (folder / "tasks/own.py").write_text("def keep(rows):\n    return rows\n")
    text = (folder / "tasks/choose.yaml").read_text().replace("task: choose", "task: coded")
    (folder / "tasks/coded.yaml").write_text(text + "process_docs: !function own.keep\n")
    said = plan(folder, 0, "benchmark.tasks=[coded]", **benchmark(folder))
    assert f"runs Python {folder}/tasks/own.py: !function of task files, in the driver, with this user's rights" in said
    run = load_run(str(folder / "e.yaml"), ["benchmark.tasks=[coded]"]).run
    files = made_from(run)["benchmark.tasks"]  # type: ignore[arg-type]
    assert {Path(file).name for file in files} == {"coded.yaml", "own.py", "questions.jsonl"}


def test_of_pairs(folder: Path) -> None:
    said = plan(folder, 0, **pairs(folder))
    for words in (
        "pairs.actors 1 CPU 1",
        "pairs 7 pairs, in 3 categories",
        "compares prompt, chosen, rejected, kind",
        "1 pairs have the same text on both sides",
    ):
        assert words in said
    assert "pairs 2 pairs, in 2 categories" in plan(folder, 0, "pairs.rows=2", **pairs(folder))


@pytest.mark.parametrize(
    ("form", "override", "message"),
    [
        (benchmark, "benchmark.chat=true", "benchmark.chat: the tokenizer has no chat template; found: true"),
        (benchmark, "benchmark.tasks=[gone.yaml]", "benchmark.tasks: gone.yaml: cannot be read"),
        (
            benchmark,
            "benchmark.max_length=129",
            "benchmark.max_length: model takes fewer tokens; found: 129; expected: at most 128",
        ),
        (benchmark, "model.path=gone/model/here", "model.path: no such folder; found: 'gone/model/here'"),
        (pairs, "pairs.category=sort", "pairs.category: no such column; found: prompt, chosen, rejected, kind"),
        (pairs, "pairs.data=gone.jsonl", "pairs.data: no such file; found: 'gone.jsonl'"),
    ],
)
def test_what_is_wrong_is_refused(folder: Path, form: Any, override: str, message: str) -> None:
    assert message in plan(folder, 2, override, **form(folder))


def test_a_model_that_is_not_here_names_the_key_that_fetches_it(folder: Path) -> None:
    plan(folder, 0, **benchmark(folder))
    run = load_run(str(folder / "e.yaml"), ["model.path=gone/model"]).run
    with pytest.raises(ConfigError, match="offline is true, false downloads models, too"):
        check_benchmark(run)  # type: ignore[arg-type]


def test_without_lm_eval_the_extra_is_named(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As where it is not installed."""
    monkeypatch.setattr("raytrl.roles.benchmark.tasks.importlib.util.find_spec", lambda name: None)
    assert "pip install 'raytrl[benchmarks]'" in plan(folder, 2, **benchmark(folder))


def test_one_model_with_a_chat_template_and_one_without(folder: Path) -> None:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder / "policy")
    tokenizer.chat_template = "{% for m in messages %}{{ m['content'] }}<|end|>{% endfor %}"
    tokenizer.save_pretrained(folder / "chat")
    said = plan(folder, 0, f"model.tokenizer={folder}/chat", f"compare={folder}/policy", **benchmark(folder))
    assert "chat template model: applied, compare: not applied" in said
    assert "they are asked differently; benchmark.chat: false asks both alike" in said
