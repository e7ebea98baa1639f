"""Which tasks of lm-eval a run file means, loaded with their data. lm-eval is imported when it is asked."""

import difflib
import importlib.util
import logging
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from raytrl.config.sections.benchmark import BenchmarkSection
from raytrl.errors import ConfigError
from raytrl.roles.benchmark.files import TaskFile, check_data_files, read_task_file

_TASKS = "benchmark.tasks"


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
    if section.include is None:
        return files
    if not os.path.isdir(section.include):
        raise ConfigError(
            f"benchmark.include: no such folder; found: {section.include!r} (working directory {Path.cwd()}); expected: a "
            f"folder with .yaml files of tasks"
        )
    wanted, included = set(section.names), list[TaskFile]()
    for path in sorted(Path(section.include).rglob("*.yaml")):
        try:
            included.append(read_task_file(str(path), "benchmark.include"))
        except ConfigError:
            if path.stem in wanted:
                raise
    while True:  # a group names further ones
        found = [file for file in included if wanted & _names_of(file) and file not in files]
        if not found:
            return files
        files += found
        wanted |= {str(name) for file in found for name in _members(file.says)}


def _names_of(file: TaskFile) -> set[str]:
    """By which it is asked for: its own name, and its tags."""
    tags = file.says.get("tag") or []
    names = [file.says.get("group"), file.says.get("task"), *(tags if isinstance(tags, list) else [tags])]
    return {name for name in names if isinstance(name, str)}


def _members(says: dict[str, Any]) -> list[str]:
    """The names of a group's tasks and groups."""
    members = says.get("task") if "group" in says else None
    found = []
    for member in members if isinstance(members, list) else ():
        found += [member] if isinstance(member, str) else [str(v) for k, v in member.items() if k in ("task", "group")]
    return found


def load_tasks(section: BenchmarkSection) -> Tasks:
    """Finds the tasks and loads their data.

    Raises:
        ConfigError: a task is unknown, cannot be read, or its data are missing.
    """
    files = own_files(section)
    for file in files:
        check_data_files(file, _TASKS)
    check_installed()
    import datasets
    from lm_eval.tasks import TaskManager

    datasets.disable_progress_bars()
    logging.getLogger("lm_eval").setLevel(logging.ERROR)
    known = {name for file in files for name in _names_of(file)}
    needed = {*section.names, *(name for file in files for name in _members(file.says))}
    # lm-eval's own are 14,000 files, which takes 5 s to read.
    manager = TaskManager(include_path=section.include, include_defaults=not needed <= known)
    if unknown := [name for name in section.names if name not in manager.task_index]:
        near = difflib.get_close_matches(unknown[0], manager.all_tasks, 3)
        raise ConfigError(
            f"{_TASKS}: no such task; found: {unknown[0]!r}; expected: a name of lm-eval or of a file in benchmark.include"
            f"{'; nearest: ' + ', '.join(near) if near else ''}; a file of your own ends in .yaml"
        )
    loaded: dict[str, Any] = {"tasks": {}, "groups": {}, "group_map": {}}
    for name in section.tasks:
        found = _load(manager, name, section.offline)
        if twice := loaded["tasks"].keys() & found["tasks"].keys():
            raise ConfigError(f"{_TASKS}: found: {', '.join(sorted(twice))} more than once; expected: each task once")
        for part, held in loaded.items():
            held |= found.get(part, {})
    return Tasks(loaded, files)


def _load(manager: Any, name: str, is_offline: bool) -> Any:
    try:
        found = manager.load([name])
        for task in found["tasks"].values():
            if not len(task.eval_docs):
                raise ValueError(f"{task.task_name}: has no documents")
    except Exception as error:  # what a task's YAML, Jinja, Python or data are wrong in raises anything
        reason = next(iter(str(error).splitlines()), "") or type(error).__name__
        remedy = "; what is not on this machine is not fetched: benchmark.offline: false does" if is_offline else ""
        raise ConfigError(
            f"{_TASKS}: {name}: cannot be loaded; found: {type(error).__name__}: {reason}; expected: a task of lm-eval whose "
            f"data can be had{remedy}"
        ) from error
    for task_name, task in found["tasks"].items():
        for flag, why in (("UNSAFE_CODE", "runs what the model writes"), ("MULTIMODAL", "asks about images or sound")):
            if getattr(task, flag, False):
                raise ConfigError(f"{_TASKS}: {task_name}: {why}; expected: a task of text that raytrl can ask")
    return found
