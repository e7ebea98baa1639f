"""The run directory: whole files, one driver at a time, each step once."""

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from safetensors import SafetensorError

from raytrl.errors import ConfigError, RunError
from raytrl.launch.runs.run import full_disk_told
from raytrl.rundir import MetricsLog, RunDirectory, StepLog, is_disk_full


def test_a_local_path_and_a_file_uri_are_one_place(tmp_path: Path) -> None:
    RunDirectory(str(tmp_path), "a").write("manifest.json", "{}")
    by_uri = RunDirectory(tmp_path.as_uri(), "a")
    assert by_uri.read("manifest.json") == "{}"
    by_uri.update_manifest(state="done")
    assert json.loads((tmp_path / "a" / "manifest.json").read_text()) == {"state": "done"}
    assert by_uri.uri == str(tmp_path / "a")


def test_runs_of_one_name_in_two_places_share_nothing_on_a_node(tmp_path: Path) -> None:
    places = [RunDirectory(f"s3://bucket/{who}?region=us-east-1", "ppo") for who in ("alice", "bob")]
    names = {place.own_name for place in places}
    assert len(names) == 2
    assert all(name.startswith("raytrl-ppo-") for name in names)
    assert RunDirectory("s3://bucket/bob?region=us-east-1", "ppo").own_name == places[1].own_name


@pytest.mark.parametrize(
    ("where", "path"),
    [
        ("runs/a/", "runs/a"),
        ("a", "a"),
        ("/a", "/a"),
        ("s3://bucket/runs/a?region=x&endpoint_override=http://localhost:1", "s3://bucket/runs/a"),
    ],
)
def test_a_run_as_it_is_named_on_the_command_line(where: str, path: str) -> None:
    run_dir = RunDirectory.named(where)
    assert (str(run_dir), run_dir.own_name.split("-")[1]) == (path, "a")
    assert run_dir.is_local or run_dir.uri == where


def test_a_mirrored_folder_keeps_what_was_there(tmp_path: Path) -> None:
    run_dir = RunDirectory(str(tmp_path), "a")
    run_dir.write("tensorboard/first", "1")
    run_dir.write("tensorboard/second", "half")
    (tmp_path / "events").mkdir()
    (tmp_path / "events/second").write_text("whole")
    run_dir.mirror(str(tmp_path / "events"), "tensorboard")
    assert run_dir.read("tensorboard/first") == "1"
    assert run_dir.read("tensorboard/second") == "whole"
    assert (tmp_path / "events/second").exists()


def test_shown_from_where_one_stands_or_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    assert str(RunDirectory("runs", "a")) == "runs/a"
    assert str(RunDirectory(str(tmp_path / "there"), "a")) == str(tmp_path / "there" / "a")


def test_a_tilde_is_the_home_folder(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/somewhere")
    assert RunDirectory("~/runs", "a").path == "/somewhere/runs/a"


def test_a_path_with_a_question_mark_is_a_path(tmp_path: Path) -> None:
    run_dir = RunDirectory(str(tmp_path / "why?"), "a")
    assert run_dir.path == str(tmp_path / "why?" / "a")


def test_options_of_a_uri_stay_behind_the_run_and_out_of_sight() -> None:
    run_dir = RunDirectory("s3://bucket/runs/?region=x&endpoint_override=http://localhost:1", "a")
    assert run_dir.uri == "s3://bucket/runs/a?region=x&endpoint_override=http://localhost:1"
    assert (run_dir.path, str(run_dir)) == ("bucket/runs/a", "s3://bucket/runs/a")


def test_a_uri_that_cannot_be_opened_is_a_config_error() -> None:
    with pytest.raises(ConfigError, match=r"^output_dir: cannot be opened; found: 'foo://bucket/a'"):
        RunDirectory("foo://bucket", "a")


def in_memory(tmp_path: Path) -> RunDirectory:
    """A run directory on a file system that is not local: pyarrow's own in-memory one."""
    run_dir = RunDirectory("mock://runs", "a")
    assert not run_dir.is_local
    run_dir.filesystem.create_dir(run_dir.path, recursive=True)  # an object store needs no folders
    return run_dir


def local(tmp_path: Path) -> RunDirectory:
    return RunDirectory(str(tmp_path), "a")


@pytest.mark.parametrize("make", [local, in_memory])
def test_files_and_folders_are_written_read_listed_and_deleted(
    make: Callable[[Path], RunDirectory], tmp_path: Path
) -> None:
    run_dir = make(tmp_path)
    assert run_dir.read("manifest.json") is None
    assert run_dir.manifest() == {}
    run_dir.update_manifest(state="running", seed=1)
    run_dir.update_manifest(state="done")
    assert run_dir.manifest() == {"state": "done", "seed": 1}
    for content in ("first", "second"):
        folder = tmp_path / "made"
        (folder / "sub").mkdir(parents=True)
        (folder / "sub" / f"{content}.txt").write_text(content)
        run_dir.store(str(folder), "model")
        shutil.rmtree(folder, ignore_errors=True)  # store() may move or copy
    with run_dir.local_copy("model") as copy:
        assert [str(p.relative_to(copy)) for p in Path(copy).rglob("*.txt")] == ["sub/second.txt"]
    assert run_dir.folders("model") == ["sub"]
    assert run_dir.folders("nowhere") == []
    assert run_dir.exists("model/sub/second.txt")
    run_dir.clear()
    assert not run_dir.exists("model")
    assert run_dir.manifest() == {}


def test_a_write_that_fails_half_way_leaves_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run_dir = local(tmp_path)
    run_dir.write("manifest.json", '{"state": "running"}')

    def full_disk(*_: object) -> None:
        raise OSError("no space left on device")

    monkeypatch.setattr(os, "replace", full_disk)
    with pytest.raises(OSError, match="no space"):
        run_dir.write("manifest.json", '{"state": "done"}')
    assert run_dir.manifest() == {"state": "running"}


HOLD = """
import sys
from raytrl.rundir import RunDirectory
with RunDirectory(sys.argv[1], "a").locked():
    print("held", flush=True)
    sys.stdin.read()
"""


def test_a_second_process_is_refused_until_the_first_ends_however_it_ends(tmp_path: Path) -> None:
    holder = subprocess.Popen(
        [sys.executable, "-c", HOLD, str(tmp_path)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    try:
        assert holder.stdout is not None
        assert holder.stdout.readline() == "held\n"
        with pytest.raises(ConfigError, match="another process is running this run"), local(tmp_path).locked():
            pass
    finally:
        holder.kill()
        holder.communicate()
    with local(tmp_path).locked():
        local(tmp_path).clear()
        assert (tmp_path / "a" / ".lock").exists()


def steps(run_dir: RunDirectory) -> list[dict[str, float]]:
    return [json.loads(line) for line in (run_dir.read("metrics.jsonl") or "").splitlines()]


def test_each_step_stands_once_and_an_evaluation_joins_it(tmp_path: Path) -> None:
    run_dir = local(tmp_path)
    run_dir.write("manifest.json", "{}")
    log = MetricsLog(run_dir)
    log.append({"step": 1, "loss": 3.0})
    log.append({"step": 2, "loss": 2.0})
    log.append({"step": 2, "eval_loss": 2.5})
    log.append({"step": 3, "loss": 1.0})
    assert steps(run_dir) == [
        {"step": 1, "loss": 3.0},
        {"step": 2, "loss": 2.0, "eval_loss": 2.5},
        {"step": 3, "loss": 1.0},
    ]


def test_a_redone_step_replaces_its_line(tmp_path: Path) -> None:
    run_dir = local(tmp_path)
    run_dir.write("metrics.jsonl", '{"step": 1, "loss": 3.0}\n{"step": 2, "loss": 2.0}\n{"step": 3, "loss": 1.0}\n')
    log = MetricsLog(run_dir)
    log.rewind(1)
    log.append({"step": 2, "loss": 2.5})
    assert steps(run_dir) == [{"step": 1, "loss": 3.0}, {"step": 2, "loss": 2.5}]


@pytest.mark.parametrize("half", ['{"step": 2, "lo', '{"step": 2}x', "null", "{}"])
def test_a_half_written_last_line_is_dropped(half: str, tmp_path: Path) -> None:
    run_dir = local(tmp_path)
    run_dir.write("metrics.jsonl", '{"step": 1, "loss": 3.0}\n' + half)
    log = MetricsLog(run_dir)
    log.rewind(5)
    log.append({"step": 2, "loss": 2.5})
    assert steps(run_dir) == [{"step": 1, "loss": 3.0}, {"step": 2, "loss": 2.5}]


def test_without_append_the_lines_are_stored_when_asked(tmp_path: Path) -> None:
    run_dir = in_memory(tmp_path)
    log = MetricsLog(run_dir)
    log.append({"step": 1, "loss": 3.0})
    assert run_dir.read("metrics.jsonl") is None
    log.flush()
    assert steps(run_dir) == [{"step": 1, "loss": 3.0}]


def test_a_folder_of_somebody_else_is_not_cleared(tmp_path: Path) -> None:
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine/thesis.txt").write_text("do not lose")
    with pytest.raises(ConfigError, match=r"not a run directory; found: thesis\.txt"):
        RunDirectory(str(tmp_path), "mine").clear()
    assert (tmp_path / "mine/thesis.txt").read_text() == "do not lose"


def test_text_with_line_separators_stays_one_row(tmp_path: Path) -> None:
    """JSON leaves them as they are; a model may sample them."""
    run_dir = RunDirectory(str(tmp_path), "a")
    os.makedirs(run_dir.path)
    row = {"step": 1, "response": "one\u2028two\x85three"}
    StepLog(run_dir, "samples.jsonl").extend([row])
    assert run_dir.rows("samples.jsonl") == [row]
    log = StepLog(run_dir, "samples.jsonl")
    assert log.last_step == 1
    log.rewind(1)
    assert run_dir.rows("samples.jsonl") == [row]


@pytest.mark.parametrize("folder", ["file", "file/below", "/proc/runs", "/dev/full"])
def test_a_place_that_cannot_be_written_is_named(folder: str, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with (
        pytest.raises(ConfigError, match=rf"^output_dir: cannot be written to; found: .*{folder}/a: \w.*; expected: "),
        RunDirectory(str(tmp_path / folder), "a").locked(),
    ):
        pass


def test_a_full_disk_is_told_from_other_errors(tmp_path: Path) -> None:
    with pytest.raises(OSError, match="No space left on device") as full, open("/dev/full", "w", buffering=1) as file:
        file.write("a\n")
    assert is_disk_full(full.value)
    assert is_disk_full(SafetensorError("I/O error: No space left on device (os error 28)"))  # as it says it
    with pytest.raises(OSError, match="No such file") as other:
        (tmp_path / "gone").read_text()
    assert not is_disk_full(other.value)


def test_a_driver_that_finds_the_disk_full_says_so_in_one_message(tmp_path: Path) -> None:
    run_dir = local(tmp_path)
    os.makedirs(run_dir.path)
    log = StepLog(run_dir, "metrics.jsonl")  # before the file is /dev/full, which can be read without end
    os.symlink("/dev/full", run_dir.at("metrics.jsonl"))
    with pytest.raises(RunError, match=r"No space left on device.*the same command continues"), full_disk_told(run_dir):
        log.extend([{"step": 1}])
