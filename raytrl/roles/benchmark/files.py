"""Task files of lm-eval, as far as they can be read without it: which data they need, and which Python they run."""

import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from raytrl.data_places import folder_of, local_files, matches, place_of
from raytrl.errors import ConfigError

_FORM = "a YAML file as lm-eval reads them, with task: and dataset_path:, or with group: and task:"
_DATA = ("dataset_path", "dataset_kwargs", "custom_dataset")  # keys that say what is loaded

Says = dict[str, Any]  # what a task file says, or a task within a group


@dataclass(frozen=True)
class _Function:
    """`!function module.name` of a task file: Python that lm-eval runs."""

    place: str


class _Loader(yaml.SafeLoader):
    """A safe loader that reads as lm-eval does (YAML 1.1), but that a key may stand once only, and that nothing is imported."""

    def compose_mapping_node(self, anchor: Any) -> yaml.MappingNode:
        """The keys as they are written: what `<<` brings is merged later."""
        node: yaml.MappingNode = super().compose_mapping_node(anchor)
        keys = [(key.tag, key.value) for key, _ in node.value if key.tag != "tag:yaml.org,2002:merge"]
        if twice := next((key for key in keys if keys.count(key) > 1), None):
            raise yaml.constructor.ConstructorError(None, None, f"{twice[1]!r} stands twice", node.start_mark)
        return node


_Loader.add_constructor("!function", lambda loader, node: _Function(str(node.value)))


@dataclass(frozen=True)
class TaskFile:
    """What one task file says, with all that it includes."""

    path: str
    says: Says
    parts: tuple[str, ...]  # the file, and those that it includes
    python: tuple[str, ...]  # files whose functions it calls
    known: Mapping[str, Sequence[Says]] = field(default_factory=dict)  # what own files say, by the names they go by

    @property
    def name(self) -> str:
        """By which lm-eval knows it."""
        return str(self.says["group"] if "group" in self.says else self.says["task"])

    @property
    def data(self) -> Iterator[Says]:
        """What is loaded by it, or by each task of a group as the group asks for it: those of the keys in _DATA that are said."""
        return _data_of(self.says, self.known, {})


def _data_of(says: Says, known: Mapping[str, Sequence[Says]], above: Says) -> Iterator[Says]:
    """
    Args:
        known: what own files say, by name.
        above: what the groups around it say, which goes first.
    """
    above = _of_data(says) | above
    members = says.get("task")
    if not isinstance(members, list):
        yield above
        return
    for member in members:
        own = member if isinstance(member, dict) else {"task": member}
        name = str(own.get("group", own.get("task")))
        if "group" in own and name not in known:
            yield from _data_of(own, known, above)  # a group that stands here alone
            continue
        others = {key: value for key, value in known.items() if key != name}  # no circle
        for base in known.get(name, [{}]):
            yield from _data_of(base, others, above | _of_data(own))


def _of_data(says: Says) -> Says:
    return {key: says[key] for key in _DATA if key in says}


def _arguments(data: Says) -> tuple[str | None, str | None, list[tuple[str, str]]]:
    """dataset_path and data_dir; of data_files the key and the path or pattern of each."""
    path, arguments = data.get("dataset_path"), data.get("dataset_kwargs")
    arguments = arguments if isinstance(arguments, dict) else {}
    folder = arguments.get("data_dir")
    files = list(_files_in(arguments.get("data_files"), "dataset_kwargs.data_files"))
    is_loaded = isinstance(path, str) and "custom_dataset" not in data
    return path if is_loaded else None, folder if isinstance(folder, str) else None, files


def _files_in(value: Any, key: str) -> Iterator[tuple[str, str]]:
    if isinstance(value, str):
        yield key, value
    for name, item in value.items() if isinstance(value, dict) else ():
        yield from _files_in(item, f"{key}.{name}")
    for item in value if isinstance(value, list) else ():
        yield from _files_in(item.get("path") if isinstance(item, dict) else item, key)


def read_task_file(path: str, where: str) -> TaskFile:
    """
    Args:
        where: the key that names it, for messages.

    Raises:
        ConfigError: it cannot be read, or calls a function that does not lie beside it.
    """
    python = dict[str, None]()
    says = _read(Path(path), f"{where}: {path}", python, parts := list[str]())
    key = "group" if "group" in says else "task"
    if key not in says:
        raise ConfigError(
            f"{where}: {path}: no task; found: {', '.join(map(str, says)) or 'nothing'}; expected: {_FORM}"
        )
    if not isinstance(says[key], str) or not says[key]:
        raise ConfigError(f"{where}: {path}: {key}: found: {says[key]!r}; expected: a name")
    return TaskFile(path, says, tuple(parts), tuple(python))


def _read(file: Path, where: str, python: dict[str, None], parts: list[str]) -> Says:
    if file.is_symlink():  # lm-eval looks beside the file itself
        file = file.resolve()
    if os.path.realpath(file) in map(os.path.realpath, parts):
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
    merged: Says = {}
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
    module = function.place.rpartition(".")[0].replace(".", "/")
    place = file.parent / f"{module}.py"
    if not module or module.startswith("/") or not place.is_file():
        found = place if place.is_file() else f"no {place}"
        raise ConfigError(
            f"{where}: !function {function.place}: runs Python that does not lie beside the file; found: {found}; "
            f"expected: a function in a .py file in {file.parent}/"
        )
    return str(place)


def check_data_files(task: TaskFile, where: str) -> None:
    """
    Raises:
        ConfigError: one is missing that would lie on this machine.
    """
    for path, folder, files in map(_arguments, task.data):
        for key, file in files:
            place = place_of(file, path, folder) if path is not None else None
            if path is not None and place is not None and not matches(place):
                raise ConfigError(
                    f"{where}: {task.path}: {key}: no such file; found: {place!r} (working directory {Path.cwd()}); "
                    f"expected: a path from {folder_of(path, folder) or 'the working directory'}, or a whole one"
                )


def files_of(task: TaskFile) -> list[str]:
    """All files on this machine that its numbers follow from."""
    data = []
    for path, folder, files in map(_arguments, task.data):
        # Without a path a function reads them (custom_dataset), or a task of lm-eval's: looked for as a builder does.
        data += local_files(path or "json", folder, [file for _, file in files])
    return list(dict.fromkeys([*task.parts, *task.python, *data]))
