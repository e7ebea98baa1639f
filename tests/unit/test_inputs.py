"""What a run is made from: what is digested, what counts as a change, and what a run says to it."""

import json
import os
import shutil
from pathlib import Path
from typing import Any

import pytest

from raytrl.config.load import load_run
from raytrl.config.yaml12 import dump
from raytrl.errors import ConfigError
from raytrl.launch.runs.resume import changed_inputs
from raytrl.launch.runs.run import Lent, _write_start, run_to_end
from raytrl.launch.runs.supervised import SupervisedKind
from raytrl.launch.sweep.sweep import SweepKind
from raytrl.plan import inputs
from raytrl.plan.inputs import Inputs, changes, inputs_of
from raytrl.rundir import RunDirectory
from tests.runs import text_rows, write_rows
from tests.unit.test_resume import commit


@pytest.fixture(autouse=True)
def in_a_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def model(folder: str, weights: bytes = b"weights") -> str:
    os.makedirs(folder, exist_ok=True)
    Path(folder, "config.json").write_text(json.dumps({"model_type": "llama"}))
    Path(folder, "model.safetensors").write_bytes(weights)
    return folder


def found(tmp_path: Path, **sections: Any) -> Inputs:
    inputs._digest_of.cache_clear()  # a process sees one state of the world
    values = {"kind": "sft", "name": "a", "model": {"path": "base"}, "data": {"train": "train.jsonl"}, **sections}
    (tmp_path / "a.yaml").write_text(dump(values))
    return inputs_of(load_run("a.yaml", []).run)


def test_rows_model_and_tokenizer_are_remembered(tmp_path: Path) -> None:
    rows = write_rows(tmp_path / "train.jsonl", text_rows(5))
    tokenizer = {"path": model("base"), "tokenizer": model("words")}
    made = found(tmp_path, model=tokenizer, data={"train": rows, "eval": rows})
    assert set(made) == {"data.train", "data.eval", "model.path", "model.tokenizer"}
    assert set(made["model.path"]) == {"base/config.json", "base/model.safetensors"}
    assert changes(made, made) == {}


def test_other_rows_of_the_same_size_and_time_are_other_rows(tmp_path: Path) -> None:
    rows = Path("train.jsonl")
    rows.write_text('{"text": "good"}\n')
    before, status = found(tmp_path), rows.stat()
    rows.write_text('{"text": "dull"}\n')
    os.utime(rows, ns=(status.st_atime_ns, status.st_mtime_ns))
    assert "train.jsonl (other content)" in changes(before, found(tmp_path))["data.train"]


def test_a_copy_is_no_change(tmp_path: Path) -> None:
    write_rows(tmp_path / "train.jsonl", text_rows(5))
    before = found(tmp_path, model={"path": model("base")})
    shutil.copy("train.jsonl", "copy")
    os.replace("copy", "train.jsonl")
    os.utime("base/model.safetensors", (1, 1))
    Path("base/README.md").write_text("a card")
    os.makedirs("base/merged")
    assert changes(before, found(tmp_path, model={"path": "base"})) == {}


@pytest.mark.parametrize(
    ("change", "told"),
    [
        (lambda: Path("base/model.safetensors").write_bytes(b"WEIGHTS"), "base/model.safetensors (other content)"),
        (lambda: Path("base/model-2.safetensors").write_bytes(b""), "base/model-2.safetensors (new)"),
        (lambda: Path("base/config.json").unlink(), "base/config.json (gone)"),
        (lambda: shutil.rmtree("base"), "base/config.json (gone), base/model.safetensors (gone)"),
    ],
)
def test_another_model_in_the_folder(change: Any, told: str, tmp_path: Path) -> None:
    before = found(tmp_path, model={"path": model("base")})
    change()
    assert changes(before, found(tmp_path, model={"path": "base"}))["model.path"] == f"model.path: {told}"


def test_large_weights_are_looked_at_in_places(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(inputs, "_WHOLE_WEIGHTS", 1000)
    monkeypatch.setattr(inputs, "_BLOCK", 16)
    weights = bytes(100_000)
    before = found(tmp_path, model={"path": model("base", weights)})
    for other in (
        weights[:-1] + b"x",
        b"x" + weights[1:],
        weights + b"\0",
        bytes(50_000) + b"x" * 1000 + bytes(49_000),
    ):
        assert "other content" in changes(before, found(tmp_path, model={"path": model("base", other)}))["model.path"]


def test_globs_folders_and_saved_datasets(tmp_path: Path) -> None:
    os.makedirs("rows/.hidden")
    for name in ("a", "b"):
        write_rows(tmp_path / f"rows/{name}.jsonl", text_rows(3))
    sources: list[dict[str, Any] | str] = [
        {"path": "json", "data_files": "rows/*.jsonl"},
        {"path": "json", "data_files": ["rows/a.jsonl", "rows/b.jsonl"]},
        {"path": "rows"},
        {"path": "rows", "data_files": "*.jsonl"},
        {"path": "json", "data_dir": "rows"},
        {"path": "json", "data_dir": "rows", "data_files": ["a.jsonl", "b.jsonl"]},
    ]
    write_rows(tmp_path / "a.jsonl", text_rows(3))  # in the working directory, where datasets would not look
    for source in sources:
        assert set(found(tmp_path, data={"train": source})["data.train"]) == {"rows/a.jsonl", "rows/b.jsonl"}
    before = found(tmp_path, data={"train": "rows"})
    Path("rows/cache-0123.arrow").write_bytes(b"left by datasets")
    assert changes(before, found(tmp_path, data={"train": "rows"})) == {}
    write_rows(tmp_path / "rows/c.jsonl", text_rows(3))
    assert changes(before, found(tmp_path, data={"train": "rows"}))["data.train"] == "data.train: rows/c.jsonl (new)"


def test_many_files_are_one_line_of_the_manifest(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(inputs, "_MANY", 2)
    os.makedirs("rows")
    for name in "abc":
        write_rows(tmp_path / f"rows/{name}.jsonl", text_rows(3))
    before = found(tmp_path, data={"train": "rows"})["data.train"]
    assert list(before) == ["rows"]
    write_rows(tmp_path / "rows/b.jsonl", text_rows(3, seed=1))
    assert found(tmp_path, data={"train": "rows"})["data.train"] != before


def test_what_is_on_the_hub_is_the_commit_in_the_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    (tmp_path / "datasets--org--rows/refs").mkdir(parents=True)
    (tmp_path / "datasets--org--rows/refs/main").write_text("c0ffee")
    cached = str(tmp_path / "snapshots/abc/config.json")
    monkeypatch.setattr("huggingface_hub.try_to_load_from_cache", lambda path, *_, **__: cached)
    made = found(tmp_path, model={"path": "org/model"}, data={"train": "org/rows"})
    assert made == {"data.train": {"org/rows": "c0ffee"}, "model.path": {"org/model": "abc"}}
    write_rows(tmp_path / "train.jsonl", text_rows(3))  # nor is a file of the hub's dataset one that lies here
    made = found(tmp_path, data={"train": {"path": "org/rows", "data_files": "train.jsonl"}})
    assert made["data.train"] == {"org/rows": "c0ffee"}


def test_code_is_what_it_says(tmp_path: Path) -> None:
    rows = {
        "path": "json",
        "data_files": write_rows(tmp_path / "train.jsonl", text_rows(3)),
        "transform": "rows.py:same",
    }
    code = Path("rows.py")
    code.write_text("def same(rows):\n    return rows\n")
    before = found(tmp_path, data={"train": rows})
    code.write_text("# rows as they are\ndef same(\n    rows,\n):\n    return rows\n")
    assert changes(before, found(tmp_path, data={"train": rows})) == {}
    code.write_text("def same(rows):\n    return rows.shuffle()\n")
    assert set(changes(before, found(tmp_path, data={"train": rows}))) == {"data.train.transform"}


def started(tmp_path: Path, made_from: Inputs) -> RunDirectory:
    run_dir = RunDirectory(str(tmp_path / "runs"), "a")
    run_dir.update_manifest(state="running", inputs=made_from)
    return run_dir


OLD: Inputs = {"data.train": {"a": "1"}, "model.path": {"m/x": "1"}, "reward.sources.0.function": {"r.py": "1"}}


@pytest.mark.parametrize("key", ["data.train", "model.path"])
def test_a_run_does_not_go_on_with_other_rows_or_another_model(key: str, tmp_path: Path) -> None:
    now = {**OLD, key: dict.fromkeys(OLD[key], "2")}
    with pytest.raises(ConfigError, match=r"has changed since: .* \(other content\); expected: .*--fresh") as error:
        changed_inputs(started(tmp_path, OLD), now, "continue")
    assert f"{key}: {next(iter(OLD[key]))}" in str(error.value)


def test_a_mended_reward_function_is_told(tmp_path: Path) -> None:
    run_dir, now = started(tmp_path, OLD), {**OLD, "reward.sources.0.function": {"r.py": "2"}}
    (notice,) = changed_inputs(run_dir, now, "continue")
    assert "reward.sources.0.function: r.py (other content)" in notice
    assert changed_inputs(run_dir, OLD, "continue") == []


def test_a_finished_run_says_that_it_is_of_what_was_there(tmp_path: Path) -> None:
    now = {**OLD, "model.path": {"m/x": "2"}}
    (notice,) = changed_inputs(started(tmp_path, OLD), now, "done")
    assert "answers for what was there when it was made; changed since: model.path: m/x (other content)" in notice
    assert changed_inputs(started(tmp_path, OLD), OLD, "done") == []


def finished(tmp_path: Path) -> SupervisedKind:
    """A finished SFT run."""
    write_rows(tmp_path / "train.jsonl", text_rows(5))
    found(tmp_path, model={"path": model("base")}, output_dir=str(tmp_path / "runs"))
    kind = SupervisedKind(load_run("a.yaml", []))
    run_dir = RunDirectory(str(tmp_path / "runs"), "a")
    _write_start(kind, run_dir, "raytrl sft a.yaml")
    run_dir.update_manifest(state="done", model="m", metrics={"loss": 1.0})
    return kind


def test_the_frame_tells_and_refuses(tmp_path: Path) -> None:
    kind, shown = finished(tmp_path), list[str]()
    run_dir = RunDirectory(str(tmp_path / "runs"), "a")
    assert set(run_dir.manifest()["inputs"]) == {"data.train", "model.path"}
    assert run_to_end(kind, "", False, lambda event: shown.append(event.text)).already_done
    assert shown == []
    model("base", b"WEIGHTS")
    assert run_to_end(kind, "", False, lambda event: shown.append(event.text)).already_done
    assert "changed since: model.path: base/model.safetensors" in shown[0]
    run_dir.update_manifest(state="running")
    commit(run_dir, [4], world_size=1)
    with pytest.raises(ConfigError, match=r"has changed since: model\.path: base/model\.safetensors"):
        run_to_end(kind, "", False, lambda event: None)
    assert run_dir.manifest()["inputs"]["model.path"] != kind.made_from()["model.path"]  # nothing was written


def test_a_sweep_remembers_for_its_trials(tmp_path: Path) -> None:
    kind = finished(tmp_path)
    assert SupervisedKind(kind.loaded, Lent(None, None)).made_from() == {}
    model("other")
    search = {"model.path": {"choice": ["base", "other"]}, "training.learning_rate": {"loguniform": [1e-5, 1e-4]}}
    sweep = {
        "kind": "tune",
        "name": "s",
        "base": "a.yaml",
        "search": search,
        "trials": 2,
        "metric": "loss",
        "mode": "min",
    }
    Path("sweep.yaml").write_text(dump(sweep))
    made = SweepKind(load_run("sweep.yaml", [])).made_from()
    assert {os.path.dirname(file) for file in made["model.path"]} == {"base", "other"}
    assert set(made) == {"data.train", "model.path"}


def test_a_run_directory_of_before_goes_on(tmp_path: Path) -> None:
    run_dir = RunDirectory(str(tmp_path / "runs"), "b")
    run_dir.update_manifest(state="running")
    assert changed_inputs(run_dir, OLD, "continue") == changed_inputs(run_dir, OLD, "done") == []


def test_the_base_of_a_reward_models_adapter_is_remembered(tmp_path: Path) -> None:
    write_rows(tmp_path / "train.jsonl", [{"prompt": "a"}])
    model("base")
    model("judge-base")
    Path("judge").mkdir()
    Path("judge/adapter_config.json").write_text('{"base_model_name_or_path": "judge-base"}')
    source = {"name": "judge", "model": "judge"}
    sections: dict[str, Any] = {"kind": "ppo", "ppo": {"steps": 1}, "reward": {"sources": [source]}}
    before = found(tmp_path, **sections)
    model("judge-base", b"weight2")
    told = changes(before, found(tmp_path, **sections))
    assert told == {"reward.sources.0.model": "reward.sources.0.model: judge-base/model.safetensors (other content)"}
