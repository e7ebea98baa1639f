"""Which tasks of lm-eval a run file means, loaded with their data. lm-eval is imported when it is asked."""

import difflib
import importlib.util
import logging
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from raytrl.config.sections.benchmark import BenchmarkSection
from raytrl.errors import ConfigError
from raytrl.roles.benchmark.files import TaskFile, check_data_files, read_task_file

_TASKS, _INCLUDE = "benchmark.tasks", "benchmark.include"


@dataclass(frozen=True)
class Tasks:
    """Loaded tasks, as lm-eval's evaluator takes them, and the user's own files among them."""

    loaded: dict[str, Any]  # tasks, groups, group_map: what TaskManager.load returns
    files: Sequence[TaskFile]

    @property
    def names(self) -> list[str]:
        return list(self.loaded["tasks"])

    def documents(self, limit: int | None) -> int:
        """That a model is asked about, in all tasks."""
        counts = [len(task.eval_docs) for task in self.loaded["tasks"].values()]
        return sum(count if limit is None else min(count, limit) for count in counts)


def check_installed() -> None:
    """
    Raises:
        ConfigError: lm-eval is not there.
    """
    if importlib.util.find_spec("lm_eval") is None:
        raise ConfigError(
            "benchmark: its tasks are those of lm-eval; found: lm-eval is not installed; expected: pip install "
            "'raytrl[benchmarks]'"
        )


@contextmanager
def offline(is_wanted: bool) -> Iterator[None]:
    """Nothing is fetched from the hub within the block, by this process and those that it starts."""
    if not is_wanted:
        yield
        return
    import datasets
    import huggingface_hub.constants

    # Each library reads the environment once, when it is imported.
    places: list[tuple[Any, str]] = [
        (huggingface_hub.constants, "HF_HUB_OFFLINE"),
        *(
            (datasets.config, name)
            for name in ("HF_HUB_OFFLINE", "HF_DATASETS_OFFLINE")
            if hasattr(datasets.config, name)
        ),
    ]
    before = [getattr(module, name) for module, name in places]
    told = {name: os.environ.get(name) for name in OFFLINE}
    os.environ.update(OFFLINE)
    for module, name in places:
        setattr(module, name, True)
    try:
        yield
    finally:
        for (module, name), value in zip(places, before, strict=True):
            setattr(module, name, value)
        for name, text in told.items():
            os.environ.pop(name) if text is None else os.environ.update({name: text})


OFFLINE = {"HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1"}


def own_files(section: BenchmarkSection) -> list[TaskFile]:
    """The user's own task files that a run names, by path or, from `include`, by name; needs no lm-eval.

    Raises:
        ConfigError: one cannot be read. A file in `include` that nobody names may be anything.
    """
    files = [read_task_file(path, _TASKS) for path in section.files]
    for file in list(files):  # the tasks of a group may lie beside it
        if members := _members(file.says):
            beside = _asked_for(members, Path(file.path).parent.glob("*.yaml"), _TASKS, lambda other: {other.name})
            files += [other for other in beside if other not in files]
    if section.include is not None:
        if not os.path.isdir(section.include):
            raise ConfigError(
                f"{_INCLUDE}: no such folder; found: {section.include!r} (working directory {Path.cwd()}); expected: a "
                f"folder with .yaml files of tasks"
            )
        wanted = {*section.names, *(name for file in files for name in _members(file.says))}
        included = _asked_for(wanted, Path(section.include).rglob("*.yaml"), _INCLUDE, _names_of)
        files += [file for file in included if file not in files]
    known = dict[str, list[dict[str, Any]]]()
    for file in files:
        for name in _names_of(file):
            known.setdefault(name, []).append(file.says)
    return [replace(file, known=known) for file in files]


def _asked_for(
    names: set[str], paths: Iterable[Path], where: str, names_of: Callable[[TaskFile], set[str]]
) -> list[TaskFile]:
    """Of the files those that are asked for by name, or by a group that is."""
    there, broken = list[TaskFile](), dict[str, ConfigError]()
    for path in sorted(paths):
        try:
            there.append(read_task_file(str(path), where))
        except ConfigError as error:
            broken[path.stem] = error
    asked, wanted = list[TaskFile](), set(names)
    while found := [file for file in there if wanted & names_of(file) and file not in asked]:
        asked += found
        wanted |= {name for file in found for name in _members(file.says)}
    for name in sorted(broken.keys() & wanted):
        raise broken[name]
    return asked


def _names_of(file: TaskFile) -> set[str]:
    """By which it is asked for: its own name, and its tags."""
    tags = file.says.get("tag") or []
    names = [file.says.get("group"), file.says.get("task"), *(tags if isinstance(tags, list) else [tags])]
    return {name for name in names if isinstance(name, str)}


def _members(says: dict[str, Any]) -> set[Any]:
    """The names of a group's tasks, groups and tags, and of those of the groups that stand within it."""
    found = set[Any]()
    members = says.get("task") if "group" in says else None
    for member in members if isinstance(members, list) else ():
        if isinstance(member, dict):
            names = [member[key] for key in ("task", "group") if key in member]
            found |= {name for name in names if not isinstance(name, list | dict)} | _members(member)
        elif isinstance(member, str):
            found.add(member)
    return found


def load_tasks(section: BenchmarkSection) -> Tasks:
    """Finds the tasks and loads their data.

    Raises:
        ConfigError: a task is unknown, cannot be read, or its data are missing.
    """
    files = own_files(section)
    for file in files:
        if file.path in section.files or _names_of(file) & set(section.names):  # others as the group asks for them
            check_data_files(file, _TASKS)
    check_installed()
    import datasets

    datasets.disable_progress_bars()
    logging.getLogger("lm_eval").setLevel(logging.ERROR)
    _sandbox_templates()
    own_names = {file.path: file.name for file in files}
    names = {task: own_names.get(task, task) for task in section.tasks}
    manager, reached = _manager(section, files, names.values())
    for file in files:
        if file.name in reached:
            _check_members(file, reached)
    if unknown := [name for name in section.names if name not in reached]:
        near = difflib.get_close_matches(unknown[0], manager.all_tasks, 3)
        raise ConfigError(
            f"{_TASKS}: no such task; found: {unknown[0]!r}; expected: a name of lm-eval or of a file in benchmark.include"
            f"{'; nearest: ' + ', '.join(near) if near else ''}; a file of your own ends in .yaml"
        )
    read = {os.path.realpath(file.path) for file in files}
    included = {str(entry.yaml_path) for entry in reached.values() if _is_included(section, entry.yaml_path)}
    # Of names that only lm-eval has seen: it runs nothing that was not looked at.
    files += [read_task_file(path, _INCLUDE) for path in sorted(included) if os.path.realpath(path) not in read]
    loaded: dict[str, Any] = {"tasks": {}, "groups": {}, "group_map": {}}
    for task, name in names.items():
        found = _load(manager, name, task, section.offline)
        if twice := loaded["tasks"].keys() & found["tasks"].keys():
            raise ConfigError(f"{_TASKS}: found: {', '.join(sorted(twice))} more than once; expected: each task once")
        for part, held in loaded.items():
            held |= found.get(part, {})
    return Tasks(loaded, files)


def _sandbox_templates() -> None:
    """Templates of tasks run no Python, as chat templates do not: lm-eval's own environment would let them."""
    from jinja2.sandbox import SandboxedEnvironment
    from lm_eval import utils

    plain = utils.env
    utils.env = SandboxedEnvironment(
        loader=plain.loader, undefined=plain.undefined, keep_trailing_newline=plain.keep_trailing_newline
    )
    utils.env.filters.update(plain.filters)


def _check_members(file: TaskFile, reached: Mapping[str, Any]) -> None:
    """What is a name and nothing more has to be known, unless the group itself says what a task is."""
    members = file.says.get("task")
    names = [name for name in members if isinstance(name, str)] if isinstance(members, list) else []
    lost = [name for name in names if name not in reached]
    if lost and "dataset_path" not in file.says:
        raise ConfigError(
            f"{_TASKS}: {file.path}: task: no such task; found: {lost[0]!r}; expected: a name of lm-eval, of a file beside "
            f"this one, or a name or tag of a file in benchmark.include"
        )


def _is_included(section: BenchmarkSection, path: Path | None) -> bool:
    return section.include is not None and path is not None and path.is_relative_to(section.include)


def _manager(section: BenchmarkSection, files: Sequence[TaskFile], names: Iterable[str]) -> tuple[Any, dict[str, Any]]:
    """lm-eval's TaskManager, and its entries of all names and of what groups and tags among them ask for; nothing is run."""
    from lm_eval.tasks import TaskManager
    from lm_eval.tasks._index import Entry, Kind

    own = dict[str, Entry]()
    for file in files:
        if file.path in section.files or not _is_included(section, Path(file.path)):
            kind = Kind.GROUP if "group" in file.says else Kind.TASK
            own.setdefault(file.name, Entry(file.name, kind, Path(file.path).resolve(), file.says))
    for with_lm_evals in (False, True):  # which are 14,000 files, and take 5 s to read
        try:
            manager = TaskManager(include_path=section.include, include_defaults=with_lm_evals)
        except TypeError as error:  # it sorts the names
            raise ConfigError(
                f"{_INCLUDE}: lm-eval cannot read {section.include}; found: {error}; expected: names that are text as task: "
                f"and group: of all its files"
            ) from error
        manager.task_index.update(own)
        reached, unknown = dict[str, Any](), False
        left = list(names)
        while left:
            name = left.pop()
            if (entry := manager.task_index.get(name)) is None:
                unknown = True
            elif name not in reached:
                reached[name] = entry
                left += entry.tags if entry.cfg is None else _members(entry.cfg)
        if not unknown:
            break
    return manager, reached


def _load(manager: Any, name: str, task: str, is_offline: bool) -> Any:
    """
    Args:
        name: of the task or group.
        task: as it stands in the run file.
    """
    try:
        found = manager.load([name])
        if not found["tasks"]:
            raise ValueError(f"{name}: has no tasks")
        for each in found["tasks"].values():
            if not len(each.eval_docs):
                raise ValueError(f"{each.task_name}: has no documents")
    except Exception as error:  # what a task's YAML, Jinja, Python or data are wrong in raises anything
        reason = next(iter(str(error).splitlines()), "") or type(error).__name__
        is_fetched = is_offline and _is_not_here(error)
        remedy = "; what is not on this machine is not fetched: benchmark.offline: false does" if is_fetched else ""
        raise ConfigError(
            f"{_TASKS}: {task}: cannot be loaded; found: {type(error).__name__}: {reason}; expected: a task of lm-eval whose "
            f"data can be had{remedy}"
        ) from error
    for task_name, task in found["tasks"].items():
        for flag, why in (("UNSAFE_CODE", "runs what the model writes"), ("MULTIMODAL", "asks about images or sound")):
            if getattr(task, flag, False):
                raise ConfigError(f"{_TASKS}: {task_name}: {why}; expected: a task of text that raytrl can ask")
    return found


def _is_not_here(error: BaseException | None) -> bool:
    """Whether it comes of something that had to be fetched."""
    from huggingface_hub.errors import LocalEntryNotFoundError

    while error is not None:
        # The last is what datasets says of a dataset of the hub of which another configuration is here.
        if isinstance(error, ConnectionError | LocalEntryNotFoundError) or str(error).startswith("Couldn't find cache"):
            return True
        error = error.__cause__ or error.__context__
    return False
