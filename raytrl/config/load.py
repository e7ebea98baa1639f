"""A run file plus `dotted.key=value` overrides → one frozen, checked run; every value knows where it came from."""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from raytrl.config.credentials import refuse_credentials
from raytrl.config.describe import fields_at
from raytrl.config.foreign.deepspeed import read_deepspeed
from raytrl.config.kinds import FORMS, RUNS, run_class
from raytrl.config.renamed import unknown_key
from raytrl.config.runs.base import Run
from raytrl.config.sections.algorithms import PRESETS
from raytrl.config.yaml12 import dump, parse, yaml_text
from raytrl.errors import ConfigError


@dataclass(frozen=True)
class LoadedRun:
    """A checked run with the origin of each value that was written down ("file:line" or "command line")."""

    run: Run
    origins: dict[str, str]
    file: str

    def as_yaml(self) -> str:
        """A run file with every value resolved."""
        return dump(self.run.model_dump(mode="json"))

    def values(self) -> list[tuple[str, Any, str]]:
        """(dotted key, value, origin) of every value in force, defaults included.

        The origin is the value's own line, or that of a parent written as one value (`train: file.jsonl`).
        """
        written = {key for key, _ in flatten(self.run.model_dump(mode="json", exclude_unset=True))}
        return [
            (key, value, self.where(key) if key in written else self.run.origin_of_default(key))
            for key, value in flatten(self.run.model_dump(mode="json"))
        ]

    def where(self, key: str) -> str:
        """The origin of a dotted key or else of its nearest parent that has one; the file where none has."""
        return _where(key, self.origins, self.file)


def load_run(path: str, overrides: list[str], kind: str | None = None, *, elsewhere: bool = False) -> LoadedRun:
    """Reads, overrides and checks a run file.

    Args:
        path: the YAML file; or a folder: a run or model, to be served.
        overrides: `dotted.key=value`, values as YAML; list items by number (`reward.sources.0.weight=2`).
        kind: what the command line asked for; the file's `kind` must agree.
        elsewhere: it is looked at for machines that are not this one, which need not have what they have.

    Raises:
        ConfigError: with one line for each problem, naming file (and line) and key.
    """
    served = kind in (None, "serve") and Path(path).is_dir()
    values, origins = ({"kind": "serve", "run": path}, {}) if served else _read(path)
    for override in overrides:
        key, _, text = override.partition("=")
        refuse_credentials({key: text}, "command line")  # first, since what else is wrong with it is told with its text
        _apply(values, origins, override)
    _open_deepspeed(values, origins)
    refuse_credentials(dict(flatten(values)), path)
    if kind is not None and "kind" not in values:
        values["kind"], origins["kind"] = kind, "command line"
    return _checked(values, origins, path, kind, elsewhere)


def load_values(values: dict[str, Any], where: str) -> LoadedRun:
    """A run of values that stand in no run file.

    Args:
        where: what messages name in place of a file.

    Raises:
        ConfigError: with one line for each problem.
    """
    refuse_credentials(dict(flatten(values)), where)
    return _checked(values, {}, where)


def _checked(
    values: dict[str, Any], origins: dict[str, str], path: str, kind: str | None = None, elsewhere: bool = False
) -> LoadedRun:
    found = values.get("kind")
    if not isinstance(found, str) or found not in RUNS:
        expected = f"one of {', '.join(RUNS)}"
        if isinstance(found, str) and found in PRESETS:
            expected = f"kind: ppo, and ppo.algorithm: {found}"
        raise ConfigError(f"{_where('kind', origins, path)}: kind: found: {found!r}; expected: {expected}")
    if kind is not None and found != kind:
        where = _where("kind", origins, path)
        raise ConfigError(
            f"{where}: kind: is {found!r}, but the command is `raytrl {kind}`; run `raytrl {found} {path}`"
        )
    try:
        model = run_class(found, values)
    except ConfigError as error:
        raise ConfigError(f"{_where('kind', origins, path)}: {error}") from None
    values = {key: value for key, value in values.items() if value is not None or key not in FORMS.get(found, {})}
    try:
        run = model.model_validate(values, context={"elsewhere": elsewhere})
    except ValidationError as error:
        raise ConfigError("\n".join(_problems(error, model, values, origins, path))) from None
    except ConfigError as error:
        raise ConfigError(f"{path}: {error}") from None
    for key, value in flatten(values):
        if value != value:
            raise ConfigError(f"{_where(key, origins, path)}: {key}: found: .nan; expected: a number")
    return LoadedRun(run, origins, path)


def _read(path: str) -> tuple[dict[str, Any], dict[str, str]]:
    file = Path(path)
    if not file.is_file():
        near = sorted(p.name for p in file.parent.glob("*.yaml")) if file.parent.is_dir() else []
        hint = f"; run files there: {', '.join(near)}" if near else ""
        raise ConfigError(f"{path}: no such run file{hint}")
    try:
        values, lines = parse(file.read_text(encoding="utf-8"), path)
    except UnicodeDecodeError as error:
        raise ConfigError(f"{path}: not a text file in UTF-8: {error.reason} at byte {error.start}") from None
    values = {} if values is None else values
    if not isinstance(values, dict):
        raise ConfigError(f"{path}: not a run file; found: {type(values).__name__}; expected: keys and values")
    return values, {key: f"{path}:{line}" for key, line in lines.items()}


def _open_deepspeed(values: dict[str, Any], origins: dict[str, str]) -> None:
    """Puts the keys of a DeepSpeed file in place of its path, each with its line there as its origin."""
    key, learner = "learner.deepspeed", values.get("learner")
    if not isinstance(learner, dict) or not isinstance(learner.get("deepspeed"), str):
        return
    file = learner["deepspeed"]
    try:
        learner["deepspeed"] = read_deepspeed(file)
    except ConfigError as error:
        raise ConfigError(f"{_where(key, origins, 'command line')}: {error}") from None
    try:  # JSON is YAML, but for tabs
        _, lines = parse(Path(file).read_text(encoding="utf-8"), file)
    except ConfigError:
        lines = {}
    origins |= {key: file} | {f"{key}.{name}": f"{file}:{line}" for name, line in lines.items()}


def overrides_of(values: Mapping[str, Any]) -> list[str]:
    """`dotted.key=value` of each: what `load_run` reads back as these values."""
    return [f"{key}={yaml_text(value)}" for key, value in values.items()]


def _apply(values: dict[str, Any], origins: dict[str, str], override: str) -> None:
    key, equals, text = override.partition("=")
    if not equals or not re.fullmatch(r"[\w\-]+(\.[\w\-]+)*", key):
        raise ConfigError(
            f"{override!r}: not an override; expected: dotted.key=value, such as training.learning_rate=1e-5"
        )
    value, _ = parse(text, f"command line: {key}: {text!r}")
    if key.startswith("learner.deepspeed."):
        _open_deepspeed(values, origins)
    *parents, last = key.split(".")
    target: Any = values
    for depth, part in enumerate(parents):
        here = ".".join(parents[: depth + 1])
        child = _item(target, part, here, override)
        if child is None:
            child, origins[here] = {}, "command line"
        if not isinstance(child, dict | list):
            raise ConfigError(f"{override!r}: {here} is {child!r}, which has no keys; set {here} as a whole")
        _set(target, part, child)
        target = child
    if isinstance(target, list):
        _item(target, last, key, override)
    _set(target, last, value)
    for known in [k for k in origins if k == key or k.startswith(f"{key}.")]:
        del origins[known]
    origins[key] = "command line"


def _item(target: Any, part: str, here: str, override: str) -> Any:
    if isinstance(target, dict):
        return target.get(part)
    if not part.isdecimal() or int(part) >= len(target):
        expected = f"a number from 0 to {len(target) - 1}" if target else f"{here.rpartition('.')[0]} set as a whole"
        raise ConfigError(f"{override!r}: {here}: no such list item; expected: {expected}")
    return target[int(part)]


def _set(target: Any, part: str, value: Any) -> None:
    target[int(part) if isinstance(target, list) else part] = value


def _problems(
    error: ValidationError, model: type[Run], values: dict[str, Any], origins: dict[str, str], path: str
) -> list[str]:
    """One line for each problem: `file:line: key: what is wrong; found; expected`."""
    lines: list[str] = []
    places = [problem["loc"] for problem in error.errors()]
    for problem in error.errors():
        if problem["type"] == "string_type" and problem["loc"][-1] == "str" and isinstance(problem["input"], dict):
            continue  # `str | Section` got a section: what is wrong inside it says the other branch
        if problem["type"] == "too_short" and any(
            place != problem["loc"] == place[: len(problem["loc"])] for place in places
        ):
            continue  # a list is short of the items that have problems of their own
        loc = _keys(problem["loc"], values, problem["type"] == "missing")
        key = ".".join(loc)
        if problem["type"] == "extra_forbidden":
            texts = [unknown_key(".".join(loc[:-1]), loc[-1], fields_at(model, loc[:-1]), str(values["kind"]))]
        elif problem["type"] == "missing":
            texts = [f"{key}: missing"]
        elif problem["type"] == "value_error":
            texts = [_below(key, line) for line in str(problem["ctx"]["error"]).splitlines()]
        else:
            texts = [f"{key}: {problem['msg'][0].lower()}{problem['msg'][1:]}; found: {problem['input']!r}"]
        for text in texts:
            line = f"{_where(text.partition(':')[0], origins, path)}: {text}"
            if line not in lines:
                lines.append(line)
    return lines


def _below(key: str, line: str) -> str:
    """A problem that a section tells, with the section's key; it begins with a key of its own, or is about all of it."""
    is_key = re.match(r"(?!found:)[\w.\-]+: ", line)
    return f"{key}{'.' if is_key else ': '}{line}" if key else line


def _keys(loc: tuple[int | str, ...], values: Any, is_missing: bool) -> list[str]:
    """The keys in a pydantic location, which also names the branches of unions (`TokenizerSpec`, `tuple[int, int]`)."""
    keys = []
    for depth, part in enumerate(loc):
        is_item = isinstance(values, list) and isinstance(part, int) and part < len(values)
        if is_item or (isinstance(values, dict) and part in values):
            values = values[part]
        elif not (is_missing and depth == len(loc) - 1):
            continue
        keys.append(str(part))
    return keys


def _where(key: str, origins: dict[str, str], path: str) -> str:
    """The origin of a key or else of its nearest parent that has one; `path` where none has."""
    while key:
        if key in origins:
            return origins[key]
        key = key.rpartition(".")[0]
    return path


def flatten(value: Any, prefix: str = "") -> list[tuple[str, Any]]:
    """(dotted key, value) of everything in nested dictionaries, and in lists that hold dictionaries."""
    if isinstance(value, dict) and value:
        return [row for key, item in value.items() for row in flatten(item, f"{prefix}{key}.")]
    if isinstance(value, list) and any(isinstance(item, dict) for item in value):
        return [row for i, item in enumerate(value) for row in flatten(item, f"{prefix}{i}.")]
    return [(prefix.rstrip("."), value)]
