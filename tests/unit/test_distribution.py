"""What `pip install` gets: the files of the package that are not code, and what is said about it."""

import re
import shutil
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path

import pytest

from raytrl import __version__

PROJECT = tomllib.loads(Path("pyproject.toml").read_text())
DATA = {"py.typed", *(f"quickstart/{kind}.yaml" for kind in ("sft", "reward", "ppo", "eval"))}


def test_package_data_names_every_file_that_code_needs() -> None:
    root = Path("raytrl")
    named = {
        str(path.relative_to(root))
        for pattern in PROJECT["tool"]["setuptools"]["package-data"]["raytrl"]
        for path in root.glob(pattern)
    }
    there = {
        str(path.relative_to(root)) for path in root.rglob("*") if path.is_file() and "__pycache__" not in path.parts
    }
    assert named == DATA
    assert {name for name in there - named if not name.endswith((".py", ".md"))} == set()


def test_the_version_stands_in_one_place_and_in_the_changelog() -> None:
    assert "version" not in PROJECT["project"]
    assert PROJECT["tool"]["setuptools"]["dynamic"]["version"] == {"attr": "raytrl.__version__"}
    released = re.findall(r"^## \[([^]]+)\]", Path("CHANGELOG.md").read_text(), re.MULTILINE)
    assert released[:2] == ["Unreleased", __version__]


@pytest.mark.slow
def test_a_wheel_holds_the_package_and_nothing_else(tmp_path: Path) -> None:
    source = tmp_path / "source"  # a build leaves files behind
    shutil.copytree("raytrl", source / "raytrl", ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(name, source)
    command = [sys.executable, "-m", "pip", "wheel", str(source), "--no-deps", "--quiet", "--wheel-dir", str(tmp_path)]
    subprocess.run(command, check=True)
    (wheel,) = tmp_path.glob("*.whl")
    assert wheel.name == f"raytrl-{__version__}-py3-none-any.whl"
    names = set(zipfile.ZipFile(wheel).namelist())
    code = {str(path) for path in Path("raytrl").rglob("*.py")}
    assert {name for name in names if ".dist-info/" not in name} == code | {f"raytrl/{name}" for name in DATA}
