"""Tasks of a benchmark: which are meant, and what is refused before anything starts. lm-eval itself is asked."""

from pathlib import Path
from typing import Any

import pytest
import yaml

from raytrl.config.sections.benchmark import BenchmarkSection
from raytrl.errors import ConfigError
from raytrl.roles.benchmark.files import check_data_files, files_of, read_task_file
from raytrl.roles.benchmark.tasks import load_tasks, offline, own_files
from tests.benchmark_files import make_tasks


@pytest.fixture
def tasks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return make_tasks(tmp_path).relative_to(tmp_path)


@pytest.fixture
def no_lm_evals(tasks: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An empty folder lm_evals/ in place of lm-eval's own tasks."""
    Path("lm_evals").mkdir()
    monkeypatch.setattr("lm_eval.tasks.manager.__file__", str(Path("lm_evals/manager.py").absolute()))


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


def names_of_files(section: BenchmarkSection) -> list[str]:
    return sorted(Path(each).name for file in own_files(section) for each in files_of(file))


@pytest.mark.parametrize("members", ["[choose, write]", "[{task: choose}, {group: inner}]"])
def test_a_group_by_its_file_finds_what_lies_beside_it(tasks: Path, members: str) -> None:
    (tasks / "all.yaml").write_text(f"group: everything\ntask: {members}\n")
    (tasks / "other.yaml").write_text("group: inner\ntask: [write]\n")
    (tasks / "unread.yaml").write_text("task: [")
    found = load_tasks(section(str(tasks / "all.yaml")))
    assert sorted(found.names) == ["choose", "write"] and "everything" in found.loaded["groups"]
    assert {"all", "choose", "write"} <= {Path(file.path).stem for file in found.files}
    assert "surprise" not in {file.name for file in found.files}


def test_a_member_that_nobody_knows_is_refused(tasks: Path, no_lm_evals: None) -> None:
    edit(tasks / "write.yaml", tag="prose")
    (tasks / "all.yaml").write_text("group: everything\ntask: [prose]\n")
    with pytest.raises(
        ConfigError, match=r"tasks: tasks/all.yaml: task: no such task; found: 'prose'; expected: a name"
    ):
        load_tasks(section(str(tasks / "all.yaml")))
    assert load_tasks(section(str(tasks / "all.yaml"), include=str(tasks))).names == ["write"]
    edit(tasks / "all.yaml", **yaml.safe_load((tasks / "write.yaml").read_text()) | {"task": ["anew"]})
    assert load_tasks(section(str(tasks / "all.yaml"))).names == ["everything::anew"]


def test_a_group_of_nothing_is_refused(tasks: Path) -> None:
    (tasks / "all.yaml").write_text("group: everything\ntask: []\n")
    with pytest.raises(ConfigError, match=r"all.yaml: cannot be loaded; found: ValueError: everything: has no tasks"):
        load_tasks(section(str(tasks / "all.yaml")))


def test_members_of_groups_within_a_group_are_found(tasks: Path) -> None:
    (tasks / "own.py").write_text("")
    (tasks / "coded.yaml").write_text("task: coded\nprocess_docs: !function own.keep\n")
    (tasks / "nest.yaml").write_text("group: nest\ntask: [{group: inner, task: [{group: innermost, task: [coded]}]}]\n")
    expected = ["coded.yaml", "nest.yaml", "own.py"]
    assert names_of_files(section("nest", include=str(tasks))) == expected
    assert names_of_files(section(str(tasks / "nest.yaml"))) == expected


def test_data_of_the_hub_are_not_fetched(tasks: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = edit(tasks / "choose.yaml", dataset_path="some/questions", dataset_name="easy", dataset_kwargs={})
    with offline(True), pytest.raises(ConfigError, match=r"choose.yaml: cannot be loaded; .*offline: false does"):
        load_tasks(section(file))
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", str(tmp_path / "cache"))
    (tmp_path / "cache/some___questions/hard/0.0.0/c0ffee").mkdir(parents=True)
    with offline(True), pytest.raises(ConfigError, match=r"Couldn't find cache .* 'easy'; .*offline: false does"):
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
        ConfigError, match=r"benchmark.tasks: .*choose.yaml: cannot be loaded; found: KeyError: 'nowhere'.* can be had$"
    ):
        load_tasks(section(str(tasks / "choose.yaml")))
    with pytest.raises(ConfigError, match="write more than once"):
        load_tasks(section("write", str(tasks / "write.yaml"), include=str(tasks)))


def test_a_template_runs_no_python(tasks: Path) -> None:
    edit(tasks / "choose.yaml", doc_to_text="{{ ''.__class__.__mro__[1].__subclasses__() | length }}")
    with pytest.raises(ConfigError, match=r"choose.yaml: cannot be loaded; found: SecurityError: access to attribute"):
        load_tasks(section(str(tasks / "choose.yaml")))
    edit(tasks / "choose.yaml", doc_to_text="{{ prompt | regex_replace('film', 'movie') | trim }} {{ choices[0] }}")
    assert load_tasks(section(str(tasks / "choose.yaml"))).names == ["choose"]


def test_own_python_is_found_and_never_run_to_find_it(tasks: Path) -> None:
    (tasks / "extra.py").write_text("raise SystemExit('it was run')\n")
    text = (tasks / "choose.yaml").read_text() + "process_docs: !function extra.keep\n"
    (tasks / "choose.yaml").write_text(text)
    assert read_task_file(str(tasks / "choose.yaml"), "a").python == (str(tasks / "extra.py"),)


EVIL = "process_docs: !function evil_mod_x.keep\n"


@pytest.fixture
def evil(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Python that could be imported, and leaves a file where it is run."""
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.syspath_prepend(tmp_path / "elsewhere")
    file = tmp_path / "elsewhere/evil_mod_x.py"
    file.write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\ndef keep(rows):\n    return rows\n")
    return file


@pytest.mark.parametrize("asked", ["quiz", "prose", "whole", "nest", "tasks/all.yaml"])
def test_python_of_elsewhere_is_refused_by_whatever_name_it_is_reached(tasks: Path, evil: Path, asked: str) -> None:
    quiz = (tasks / "choose.yaml").read_text().replace("task: choose", "task: quiz\ntag: prose")
    (tasks / "some_file.yaml").write_text(quiz + EVIL)
    (tasks / "all.yaml").write_text("group: whole\ntask: [write, quiz]\n")
    (tasks / "nest.yaml").write_text("group: nest\ntask: [{group: whole}]\n")
    with pytest.raises(
        ConfigError, match=r"some_file.yaml: !function evil_mod_x.keep: .* does not lie beside the file"
    ):
        load_tasks(section(asked, include=str(tasks)))
    assert not Path("ran").exists()


def test_what_a_group_of_lm_evals_finds_in_the_folder_is_looked_at(tasks: Path, evil: Path, no_lm_evals: None) -> None:
    Path("lm_evals/whole.yaml").write_text("group: whole\ntask: [quiz]\n")
    text = (tasks / "choose.yaml").read_text().replace("task: choose", "task: quiz")
    (tasks / "some_file.yaml").write_text(text + EVIL)
    with pytest.raises(ConfigError, match=r"benchmark.include: .*some_file.yaml: !function evil_mod_x.keep: "):
        load_tasks(section("whole", include=str(tasks)))
    assert not Path("ran").exists()
    evil.rename(tasks / "evil_mod_x.py")
    assert [file.python for file in load_tasks(section("whole", include=str(tasks))).files] == [
        (str(tasks / "evil_mod_x.py"),)
    ]


def test_a_name_that_is_no_text_is_refused(tasks: Path) -> None:
    (tasks / "five.yaml").write_text("task: 5\n")
    with pytest.raises(ConfigError, match=r"five.yaml: task: found: 5; expected: a name"):
        own_files(section(str(tasks / "five.yaml")))
    with pytest.raises(
        ConfigError, match=r"benchmark.include: lm-eval cannot read tasks; .*expected: names that are text"
    ):
        load_tasks(section("choose", include=str(tasks)))


def test_beside_a_file_is_where_lm_eval_looks(tasks: Path, evil: Path) -> None:
    text = (tasks / "choose.yaml").read_text()
    (tasks / "choose.yaml").write_text(text + f"process_docs: !function {evil.with_suffix('')}.keep\n")
    with pytest.raises(ConfigError, match=r"does not lie beside the file; found: /.*evil_mod_x.py"):
        own_files(section(str(tasks / "choose.yaml")))
    Path("there").mkdir()
    (tasks / "evil_mod_x.py").write_text("")
    Path("there/choose.yaml").write_text(text + EVIL)
    (tasks / "linked.yaml").symlink_to(Path("there/choose.yaml").absolute())
    with pytest.raises(ConfigError, match=r"does not lie beside the file; found: no .*there/evil_mod_x.py"):
        own_files(section(str(tasks / "linked.yaml")))


@pytest.mark.parametrize(
    ("path", "arguments"),
    [
        ("set", {"data_files": {"test": "q.jsonl"}}),
        ("set", {"data_files": {"test": "*.jsonl"}}),
        ("set", {"data_files": [{"split": "test", "path": ["q.jsonl"]}]}),
        ("set", {"data_dir": "part", "data_files": {"test": "p.jsonl"}}),
        ("set", {"data_dir": "part"}),
        ("json", {"data_dir": "set", "data_files": {"test": "q.jsonl"}}),
        ("json", {"data_dir": "set/part"}),
    ],
)
def test_data_are_found_where_datasets_finds_them(tasks: Path, path: str, arguments: dict[str, Any]) -> None:
    Path("set/part").mkdir(parents=True)
    Path("questions.jsonl").rename("set/q.jsonl")
    Path("set/part/p.jsonl").write_text(Path("set/q.jsonl").read_text())
    split = "test" if "data_files" in arguments else "train"
    file = edit(
        tasks / "choose.yaml", dataset_path=path, dataset_kwargs=arguments, test_split=split, fewshot_split=split
    )
    found = load_tasks(section(file))
    assert found.documents(None) == 24
    data = "p.jsonl" if "part" in str(arguments) else "q.jsonl"
    assert [Path(each).name for each in files_of(found.files[0])] == ["choose.yaml", data]


def test_files_of_the_hub_are_not_looked_for_here(tasks: Path) -> None:
    file = edit(tasks / "choose.yaml", dataset_path="some/questions", dataset_kwargs={"data_files": "en/q.jsonl"})
    check_data_files(read_task_file(file, "a"), "a")
    with offline(True), pytest.raises(ConfigError, match="cannot be loaded; found: ConnectionError"):
        load_tasks(section(file))
    edit(tasks / "choose.yaml", dataset_path="tasks")
    with pytest.raises(ConfigError, match=r"data_files: no such file; found: 'tasks/en/q.jsonl' .*a path from tasks"):
        load_tasks(section(file))


def test_all_data_are_among_the_files(tasks: Path) -> None:
    """A finished run is asked by these whether it is made anew."""
    Path("set").mkdir()
    for name in ("a", "b", "c", "d"):
        Path(f"set/{name}.jsonl").write_text("{}\n")
    edit(tasks / "choose.yaml", dataset_path="set", dataset_kwargs={})
    assert names_of_files(section(str(tasks / "choose.yaml"))) == [
        *("a.jsonl", "b.jsonl", "c.jsonl", "choose.yaml", "d.jsonl"),
    ]
    edit(tasks / "choose.yaml", dataset_kwargs={"data_files": "a.jsonl"})
    members = [
        {"task": "choose", "dataset_kwargs": {"data_files": "b.jsonl"}},  # of the folder that choose.yaml names
        {
            "group": "inner",
            "dataset_path": "json",
            "task": [{"task": "new", "dataset_kwargs": {"data_files": "set/c.jsonl"}}],
        },
    ]
    (tasks / "all.yaml").write_text(yaml.safe_dump({"group": "all", "task": members}))
    expected = ["a.jsonl", "all.yaml", "b.jsonl", "c.jsonl", "choose.yaml"]
    assert names_of_files(section(str(tasks / "all.yaml"))) == expected
    assert names_of_files(section("all", include=str(tasks))) == expected
    edit(tasks / "all.yaml", task=["choose", "all"], dataset_kwargs={"data_files": "d.jsonl"})  # in a circle, too
    assert names_of_files(section("all", include=str(tasks))) == ["a.jsonl", "all.yaml", "choose.yaml", "d.jsonl"]


def test_what_a_group_replaces_need_not_be_there(tasks: Path) -> None:
    edit(tasks / "choose.yaml", dataset_kwargs={"data_files": {"test": "gone.jsonl"}})
    (tasks / "all.yaml").write_text(
        "group: all\ntask: [{task: choose, dataset_kwargs: {data_files: {test: questions.jsonl}}}]\n"
    )
    assert load_tasks(section("all", include=str(tasks))).documents(None) == 24
    edit(tasks / "all.yaml", task=["choose"])
    with pytest.raises(
        ConfigError, match=r"all.yaml: dataset_kwargs.data_files.test: no such file; found: 'gone.jsonl'"
    ):
        load_tasks(section("all", include=str(tasks)))


def test_merge_keys_are_yamls(tasks: Path) -> None:
    text = (tasks / "choose.yaml").read_text().replace("test_split: test\n", "")
    (tasks / "choose.yaml").write_text(
        "a: &a {test_split: test, output_type: x}\nb: &b {<<: *a, output_type: y}\n<<: [*b]\n" + text
    )
    says = read_task_file(str(tasks / "choose.yaml"), "a").says
    assert (says["test_split"], says["output_type"], says["b"]["output_type"]) == ("test", "multiple_choice", "y")
    (tasks / "choose.yaml").write_text("task: a\nb: {<<: {c: 1}, d: 1, d: 2}\n")
    with pytest.raises(ConfigError, match="'d' stands twice"):
        read_task_file(str(tasks / "choose.yaml"), "a")


def test_offline_is_undone() -> None:
    import datasets
    import huggingface_hub.constants as hub

    before = hub.HF_HUB_OFFLINE, datasets.config.HF_HUB_OFFLINE
    with offline(True):
        assert hub.HF_HUB_OFFLINE and datasets.config.HF_HUB_OFFLINE
    assert before == (hub.HF_HUB_OFFLINE, datasets.config.HF_HUB_OFFLINE)
