"""raytrl/README.md draws the package: every file is on the map, with a text, and nothing else is."""

import re
from pathlib import Path

import pytest

ROOT = Path("raytrl")
_LINE = re.compile(r"(?P<indent>(?:  )*)(?P<name>[\w.]+(?:\.py|/))(?: {2,}(?P<text>\S.*))?")


def tree_in(page: str) -> dict[str, str]:
    """Path → text of each line of the fenced blocks that are trees: two spaces a level, `name.py` or `folder/`.

    Raises:
        ValueError: a line of a tree is no such line, or stands below no folder.
    """
    found: dict[str, str] = {}
    for block in re.findall(r"^```\n(.*?)^```$", page, re.DOTALL | re.MULTILINE):
        lines = block.splitlines()
        if not any(_LINE.fullmatch(line) for line in lines):
            continue  # a picture
        folders: list[str] = []
        for line in lines:
            match = _LINE.fullmatch(line)
            if match is None or (depth := len(match["indent"]) // 2) > len(folders):
                raise ValueError(f"not a line of a tree: {line!r}")
            path = "".join([*folders[:depth], match["name"]])
            if path in found:
                raise ValueError(f"stands twice: {path}")
            folders = [*folders[:depth], match["name"]] if path.endswith("/") else folders[:depth]
            found[path] = match["text"] or ""
    return found


def files_in(root: Path) -> set[str]:
    """Modules but for `__init__.py`, and the folders, which end in a slash."""
    paths = [path for path in root.rglob("*") if "__pycache__" not in path.parts]
    modules = {str(path.relative_to(root)) for path in paths if path.suffix == ".py" and path.name != "__init__.py"}
    return modules | {f"{path.relative_to(root)}/" for path in paths if path.is_dir()}


def test_the_map_is_the_package() -> None:
    drawn, there = tree_in((ROOT / "README.md").read_text()), files_in(ROOT)
    assert there - drawn.keys() == set(), "not on the map in raytrl/README.md"
    assert drawn.keys() - there == set(), "on the map, but not there"
    assert [path for path, text in drawn.items() if not text] == []


def test_files_of_one_folder_stand_in_order() -> None:
    """So that one who adds a file knows where its line goes: modules by name, then folders by name."""
    paths = list(tree_in((ROOT / "README.md").read_text()))

    def place(path: str) -> list[tuple[bool, str]]:
        parts = Path(path).parts
        return [(depth < len(parts) - 1 or path.endswith("/"), part) for depth, part in enumerate(parts)]

    assert paths == sorted(paths, key=place)


def test_the_check_finds_a_file_without_a_line_and_a_line_without_a_file(tmp_path: Path) -> None:
    (tmp_path / "room").mkdir()
    for name in ("__init__.py", "a.py", "room/__init__.py", "room/b.py"):
        (tmp_path / name).touch()
    page = "text\n```\n picture ── of it\n```\n```\na.py  one\nroom/  its things\n  gone.py  another\n```\n"
    assert files_in(tmp_path) == {"a.py", "room/", "room/b.py"}
    assert tree_in(page) == {"a.py": "one", "room/": "its things", "room/gone.py": "another"}
    assert tree_in("```\na.py\n```\n") == {"a.py": ""}


@pytest.mark.parametrize("line", ["    deep.py  below nothing", "a.py one space is no gap", "a.py  twice"])
def test_a_line_that_is_none_is_refused(line: str) -> None:
    with pytest.raises(ValueError):
        tree_in(f"```\na.py  one\n{line}\n```\n")
