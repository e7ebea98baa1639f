"""Tasks of a benchmark: which are meant, and what is refused before anything starts. lm-eval itself is asked."""

from pathlib import Path
from typing import Any

import pytest
import yaml

from raytrl.config.sections.benchmark import BenchmarkSection
from raytrl.errors import ConfigError
from raytrl.roles.benchmark.files import files_of, read_task_file
from raytrl.roles.benchmark.tasks import load_tasks, offline, own_files
from tests.benchmark_files import make_tasks


@pytest.fixture
def tasks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return make_tasks(tmp_path).relative_to(tmp_path)


def section(*tasks: str, **more: Any) -> BenchmarkSection:
    return BenchmarkSection(tasks=list(tasks), **more)


def edit(file: Path, **keys: Any) -> str:
    file.write_text(yaml.safe_dump(yaml.safe_load(file.read_text()) | keys))
    return str(file)


def test_by_file_and_by_name(tasks: Path) -> None:
    found = load_tasks(section("write", str(tasks / "choose.yaml"), include=str(tasks)))
    assert sorted(found.names) == ["choose", "write"]
    assert (found.documents(None), found.documents(5)) == (48, 10)
    assert [Path(each).name for file in found.files for each in files_of(file)] == [
        *("choose.yaml", "questions.jsonl"),
        *("write.yaml", "questions.jsonl"),
    ]


def test_a_group_and_a_tag_by_name(tasks: Path) -> None:
    edit(tasks / "write.yaml", tag="prose")
    edit(tasks / "surprise.yaml", tag=["prose"])
    (tasks / "all.yaml").write_text("group: everything\ntask: [choose, {task: write}]\n")
    assert sorted(load_tasks(section("prose", include=str(tasks))).names) == ["surprise", "write"]
    group = load_tasks(section("everything", include=str(tasks)))
    assert sorted(group.names) == ["choose", "write"]
    assert {Path(file.path).stem for file in group.files} == {"all", "choose", "write"}


def test_data_of_the_hub_are_not_fetched(tasks: Path) -> None:
    file = edit(tasks / "choose.yaml", dataset_path="some/questions", dataset_kwargs={})
    with offline(True), pytest.raises(ConfigError, match=r"choose.yaml: cannot be loaded; .*offline: false does"):
        load_tasks(section(file))


def test_an_unknown_name_is_answered_with_near_ones(tasks: Path) -> None:
    with pytest.raises(ConfigError, match=r"no such task; found: 'arc_esy'; .*nearest: arc_easy"):
        load_tasks(section("arc_esy", include=str(tasks)))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("task: [a", "no YAML"),
        ("- a\n", "found: list"),
        ("tasks: a\n", "no task; found: tasks"),
        ("task: a\ntask: b\n", "'task' stands twice"),
        ("task: a\ninclude: gone.yaml\n", "cannot be read; found: No such file or directory: .*gone.yaml"),
        ("task: a\ninclude: own.yaml\n", "includes itself"),
        ("task: a\nprocess_docs: !function os.system\n", "does not lie beside the file; found: no .*os.py"),
    ],
)
def test_a_file_that_is_none_is_refused(tasks: Path, text: str, message: str) -> None:
    (tasks / "own.yaml").write_text(text)
    with pytest.raises(ConfigError, match=f"benchmark.tasks: {tasks}/own.yaml.*{message}"):
        load_tasks(section(str(tasks / "own.yaml")))


def test_missing_files_are_refused(tasks: Path) -> None:
    with pytest.raises(ConfigError, match=r"benchmark.tasks: gone.yaml: cannot be read; found: No such file"):
        own_files(section("gone.yaml"))
    with pytest.raises(ConfigError, match=r"benchmark.include: no such folder; found: 'gone'"):
        own_files(section("a", include="gone"))
    edit(tasks / "choose.yaml", dataset_kwargs={"data_files": {"test": ["questions.jsonl", "gone.jsonl"]}})
    with pytest.raises(ConfigError, match=r"dataset_kwargs.data_files.test: no such file; found: 'gone.jsonl'"):
        load_tasks(section(str(tasks / "choose.yaml")))


def test_what_lm_eval_cannot_load_names_the_task(tasks: Path) -> None:
    edit(tasks / "choose.yaml", test_split="nowhere")
    with pytest.raises(
        ConfigError, match=r"benchmark.tasks: .*choose.yaml: cannot be loaded; found: KeyError: 'nowhere'"
    ):
        load_tasks(section(str(tasks / "choose.yaml")))
    with pytest.raises(ConfigError, match="write more than once"):
        load_tasks(section("write", str(tasks / "write.yaml"), include=str(tasks)))


def test_own_python_is_found_and_never_run_to_find_it(tasks: Path) -> None:
    (tasks / "extra.py").write_text("raise SystemExit('it was run')\n")
    text = (tasks / "choose.yaml").read_text() + "process_docs: !function extra.keep\n"
    (tasks / "choose.yaml").write_text(text)
    assert read_task_file(str(tasks / "choose.yaml"), "a").python == (str(tasks / "extra.py"),)


def test_offline_is_undone() -> None:
    import datasets
    import huggingface_hub.constants as hub

    before = hub.HF_HUB_OFFLINE, datasets.config.HF_HUB_OFFLINE
    with offline(True):
        assert hub.HF_HUB_OFFLINE and datasets.config.HF_HUB_OFFLINE
    assert before == (hub.HF_HUB_OFFLINE, datasets.config.HF_HUB_OFFLINE)
