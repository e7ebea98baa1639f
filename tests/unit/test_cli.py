"""The command as a process: what it imports, what it prints, how it exits."""

import importlib.metadata
import json
import os
import platform
import subprocess
import sys
from importlib.metadata import PackageNotFoundError
from io import StringIO
from pathlib import Path

import pytest
from rich.console import Console
from typer.testing import CliRunner

from raytrl import __version__, cli
from raytrl.cli import app
from raytrl.versions import versions
from tests.runs import raytrl, run_file

HEAVY = ("torch", "ray", "transformers", "trl", "peft", "datasets", "deepspeed")


def modules_after(*words: str) -> tuple[int, set[str], str]:
    """Exit status and top-level modules of a `raytrl WORDS…` process at its end, and all it printed."""
    code = (
        "import atexit, sys\n"
        "atexit.register(lambda: print('MODULES', *{m.partition('.')[0] for m in sys.modules}))\n"
        "from raytrl.cli import main\n"
        "main()\n"
    )
    # Typer's word for: which shell it is, the words say. Else it looks at parent processes, of which none may be a shell.
    environment = os.environ | {"COLUMNS": "200", "_TYPER_COMPLETE_TEST_DISABLE_SHELL_DETECTION": "1"}
    done = subprocess.run([sys.executable, "-c", code, *words], capture_output=True, text=True, env=environment)
    modules = done.stdout.rpartition("MODULES")[2].split()
    assert "typer" in modules, done.stderr
    return done.returncode, set(modules), done.stdout + done.stderr


@pytest.mark.parametrize(
    ("words", "status"),
    [
        (["--help"], 0),
        (["--version"], 0),
        (["--show-completion", "bash"], 0),
        (["config", "show", "RUN"], 0),
        (["config", "show", "RUN", "--describe"], 0),
        (["config", "schema", "sft"], 0),
        (["sft", "RUN", "training.learnin_rate=1"], 2),
        (["sft", "nowhere.yaml"], 2),
        (["push", "nowhere", "someone/a"], 2),
    ],
)
def test_help_and_config_answers_import_no_heavy_library(words: list[str], status: int, tmp_path: Path) -> None:
    file = run_file(tmp_path, "a")
    found, modules, output = modules_after(*(file if word == "RUN" else word for word in words))
    assert found == status, output
    assert not modules & set(HEAVY)


def test_config_error_is_one_line_without_traceback_and_status_2(tmp_path: Path) -> None:
    file = run_file(tmp_path, "a", training={"learnin_rate": 1})
    line = next(i for i, text in enumerate(Path(file).read_text().splitlines(), 1) if "learnin_rate" in text)
    output = raytrl("sft", file, status=2)
    assert output == (f"error: {file}:{line}: training.learnin_rate: unknown key; nearest known key: learning_rate\n")


def test_debug_shows_the_traceback_too(tmp_path: Path) -> None:
    output = raytrl("sft", run_file(tmp_path, "a"), "seed=-1", "--debug", status=2)
    assert "Traceback (most recent call last)" in output
    assert "error: command line: seed:" in output


def test_a_data_error_is_found_before_ray_starts(tmp_path: Path) -> None:
    output = raytrl("sft", run_file(tmp_path, "a"), "learner.workers=1", status=2)
    assert "data.train: no such file" in output
    assert "Traceback" not in output


def test_config_show_in_a_pipe_keeps_each_value_on_one_line(tmp_path: Path) -> None:
    name = "n" * 300
    shown = CliRunner().invoke(app, ["config", "show", run_file(tmp_path, "a"), f"name={name}"])
    assert shown.exit_code == 0
    row = next(line for line in shown.output.splitlines() if line.startswith("name"))
    assert row.split() == ["name", json.dumps(name), "command", "line"]


def test_config_show_describes_each_key_on_its_line_in_a_pipe(tmp_path: Path) -> None:
    shown = CliRunner().invoke(app, ["config", "show", run_file(tmp_path, "a"), "lora.r=4", "--describe"])
    assert shown.exit_code == 0
    rows = {line.partition(" = ")[0]: line for line in shown.output.splitlines()}
    assert rows["seed"].startswith("seed = 0  default  What all random numbers of the run follow from")
    assert rows["lora.r"] == "lora.r = 4  command line  Lora attention dimension"
    assert all(len(row.rpartition("  ")[2].split()) > 2 for row in rows.values())


def test_config_show_describes_each_key_below_it_on_a_terminal(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    text = StringIO()
    monkeypatch.setattr(cli, "out", Console(file=text, force_terminal=True, color_system=None, width=60))
    cli.config_show(run_file(tmp_path, "a"), describe=True)
    lines = text.getvalue().splitlines()
    row = lines.index("seed = 0  default")
    assert lines[row + 1].startswith("    What all random numbers of the run follow from")
    assert lines[row + 2].startswith("    ")  # folded, and still below its key
    assert max(map(len, lines)) <= 60


def test_config_schema_of_an_unknown_kind_is_a_usage_error() -> None:
    done = CliRunner().invoke(app, ["config", "schema", "sftt"])
    assert done.exit_code == 2
    assert "'sftt'" in done.output
    assert "sft, reward, dpo" in done.output


def test_version_names_raytrl_first_and_then_what_decides_numbers() -> None:
    shown = CliRunner().invoke(app, ["--version"])
    first, second = shown.output.splitlines()
    assert first == f"raytrl {__version__}"
    libraries = ["python", "ray", "torch", "transformers", "trl", "peft", "accelerate", "datasets", "deepspeed"]
    assert [text.split()[0] for text in second.split(", ")] == libraries


def test_a_source_tree_knows_its_version_without_being_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(name: str) -> str:
        raise PackageNotFoundError(name)

    monkeypatch.setattr(importlib.metadata, "version", missing)
    assert versions() == {"python": platform.python_version(), "raytrl": __version__}


def test_a_shell_completes_commands_and_options() -> None:
    def completed(*words: str) -> list[str]:
        line = {"COMP_WORDS": " ".join(["raytrl", *words]), "COMP_CWORD": str(len(words))}
        return raytrl(_RAYTRL_COMPLETE="complete_bash", **line).split()

    assert completed("re") == ["reward", "report"]
    assert completed("ppo", "--fr") == ["--fresh"]


def test_a_working_directory_that_is_gone_is_one_message(tmp_path: Path) -> None:
    (tmp_path / "gone").mkdir()
    command = f"cd {tmp_path}/gone && rmdir {tmp_path}/gone && exec {sys.executable} -m raytrl plan a.yaml"
    done = subprocess.run(["bash", "-c", command], capture_output=True, text=True)
    assert done.returncode == 2
    assert "the working directory is gone" in done.stderr
    assert "Traceback" not in done.stderr
