"""Task files of lm-eval, as far as they can be read without it: which data they need, and which Python they run."""

import glob
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from raytrl.errors import ConfigError

_FORM = "a YAML file as lm-eval reads them, with task: and dataset_path:, or with group: and task:"


@dataclass(frozen=True)
class _Function:
    """`!function module.name` of a task file: Python that lm-eval runs."""

    place: str


class _Loader(yaml.SafeLoader):
    """A safe loader that reads as lm-eval does (YAML 1.1), but that a key may stand once only, and that nothing is imported."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        keys = [self.construct_object(key, deep=True) for key, _ in node.value]
        for key, (found, _) in zip(keys, node.value, strict=True):
            if keys.count(key) > 1:
                raise yaml.constructor.ConstructorError(None, None, f"{key!r} stands twice", found.start_mark)
        return super().construct_mapping(node, deep)


_Loader.add_constructor("!function", lambda loader, node: _Function(str(node.value)))


@dataclass(frozen=True)
class TaskFile:
    """What one task file says, with all that it includes."""

    path: str
    says: dict[str, Any]
    parts: tuple[str, ...]  # the file, and those that it includes
    python: tuple[str, ...]  # files whose functions it calls

    @property
    def data_files(self) -> Iterator[tuple[str, str]]:
        """(key, path or pattern) of each data file on this machine that it names."""
        arguments = self.says.get("dataset_kwargs")
        if isinstance(arguments, dict):
            yield from _files_in(arguments.get("data_files"), "dataset_kwargs.data_files")


def _files_in(value: Any, key: str) -> Iterator[tuple[str, str]]:
    if isinstance(value, str) and "://" not in value:
        yield key, value
    for name, item in value.items() if isinstance(value, dict) else ():
        yield from _files_in(item, f"{key}.{name}")
    for item in value if isinstance(value, list) else ():
        yield from _files_in(item, key)


def read_task_file(path: str, where: str) -> TaskFile:
    """
    Args:
        where: the key that names it, for messages.

    Raises:
        ConfigError: it cannot be read, or calls a function that does not lie beside it.
    """
    python = dict[str, None]()
    says = _read(Path(path), f"{where}: {path}", python, parts := list[str]())
    if not ({"task", "group"} & says.keys()):
        raise ConfigError(
            f"{where}: {path}: no task; found: {', '.join(map(str, says)) or 'nothing'}; expected: {_FORM}"
        )
    return TaskFile(path, says, tuple(parts), tuple(python))


def _read(file: Path, where: str, python: dict[str, None], parts: list[str]) -> dict[str, Any]:
    if str(file) in parts:
        raise ConfigError(f"{where}: includes itself; found: {' → '.join([*parts, str(file)])}; expected: no circle")
    parts.append(str(file))
    try:
        says = yaml.load(file.read_text(encoding="utf-8"), Loader=_Loader)  # noqa: S506
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else error.reason
        raise ConfigError(
            f"{where}: cannot be read; found: {reason}: {file} (working directory {Path.cwd()}); expected: {_FORM}"
        ) from None
    except yaml.YAMLError as error:
        raise ConfigError(
            f"{where}: {file}: no YAML; found: {' '.join(str(error).split())}; expected: {_FORM}"
        ) from None
    if not isinstance(says, dict):
        raise ConfigError(f"{where}: {file}: found: {type(says).__name__}; expected: {_FORM}")
    for function in _functions_in(says):
        python[_own_file(function, file, where)] = None
    merged: dict[str, Any] = {}
    included = says.pop("include", [])
    for name in included if isinstance(included, list) else [included]:
        merged |= _read(file.parent / str(name), where, python, parts)
    return merged | says


def _functions_in(value: Any) -> Iterator[_Function]:
    if isinstance(value, _Function):
        yield value
    items = value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()
    for item in items:
        yield from _functions_in(item)


def _own_file(function: _Function, file: Path, where: str) -> str:
    """The Python file beside a task file; what lies anywhere else is not to be run because a YAML file says so."""
    module = function.place.rpartition(".")[0]
    place = file.parent / f"{module.replace('.', '/')}.py"
    if not module or not place.is_file():
        raise ConfigError(
            f"{where}: !function {function.place}: runs Python that does not lie beside the file; found: no {place}; "
            f"expected: a function in a .py file in {file.parent}/"
        )
    return str(place)


def check_data_files(task: TaskFile, where: str) -> None:
    """
    Raises:
        ConfigError: one is missing.
    """
    for key, path in task.data_files:
        if not os.path.exists(path) and not glob.glob(path, recursive=True):
            raise ConfigError(
                f"{where}: {task.path}: {key}: no such file; found: {path!r} (working directory {Path.cwd()}); expected: a "
                f"path from the working directory, or a whole one"
            )


def files_of(task: TaskFile) -> list[str]:
    """All files on this machine that its numbers follow from."""
    data = [found for _, path in task.data_files for found in sorted(glob.glob(path, recursive=True)) or [path]]
    return [each for each in dict.fromkeys([*task.parts, *task.python, *data]) if os.path.isfile(each)]
