"""A run file plus `dotted.key=value` overrides → one frozen, checked run; every value knows where it came from."""

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from pydantic import BaseModel, ValidationError

from raytrl.config.deepspeed import read_deepspeed
from raytrl.config.kinds import RUNS
from raytrl.config.nearest import unknown_key
from raytrl.config.runs import Run
from raytrl.errors import ConfigError


@dataclass(frozen=True)
class LoadedRun:
    """A checked run with the origin of each value that was written down ("file:line" or "command line")."""

    run: Run
    origins: dict[str, str]
    file: str

    def values(self) -> list[tuple[str, Any, str]]:
        """(dotted key, value, origin) of every value in force, defaults included."""
        return [(key, value, self._origin(key)) for key, value in _flatten(self.run.model_dump(mode="json"))]

    def _origin(self, key: str) -> str:
        """Where a value was written: its own line, or that of a parent written as one value (`train: file.jsonl`)."""
        while key:
            if key in self.origins:
                is_section = any(known.startswith(f"{key}.") for known in self.origins)
                return "default" if is_section else self.origins[key]
            key = key.rpartition(".")[0]
        return "default"


class _RunFileLoader(yaml.SafeLoader):
    """YAML where 1e-5 is a number (YAML 1.2) and a key that stands twice is an error."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen: dict[Any, int] = {}
        for key_node, _ in node.value:
            key = self.construct_object(key_node, deep=True)
            line = key_node.start_mark.line + 1
            if key in seen:
                raise ConfigError(
                    f"{key_node.start_mark.name}:{line}: key {key!r} stands twice; first on line {seen[key]}"
                )
            seen[key] = line
        return super().construct_mapping(node, deep)


_RunFileLoader.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"^[-+]?(\d+\.?\d*|\.\d+)[eE][-+]?\d+$"), list("-+.0123456789")
)


def load_run(path: str, overrides: list[str], kind: str | None = None) -> LoadedRun:
    """Reads, overrides and checks a run file.

    Args:
        path: the YAML file.
        overrides: `dotted.key=value`, values as YAML; list items by number (`reward.sources.0.weight=2`).
        kind: what the command line asked for; the file's `kind` must agree.

    Raises:
        ConfigError: with one line for each problem, naming file (and line) and key.
    """
    values, origins = _read(path)
    for override in overrides:
        _apply(values, origins, override)
    found = values.setdefault("kind", kind)
    if found not in RUNS:
        raise ConfigError(f"{path}: kind: found: {found!r}; expected: one of {', '.join(RUNS)}")
    if kind is not None and found != kind:
        raise ConfigError(
            f"{path}: kind: is {found!r}, but the command is `raytrl {kind}`; run `raytrl {found} {path}`"
        )
    try:
        run = RUNS[found].model_validate(values)
    except ValidationError as error:
        raise ConfigError("\n".join(_problems(error, RUNS[found], origins, path))) from None
    except ConfigError as error:
        raise ConfigError(f"{path}: {error}") from None
    return LoadedRun(run, origins, path)


def _read(path: str) -> tuple[dict[str, Any], dict[str, str]]:
    file = Path(path)
    if not file.is_file():
        near = sorted(p.name for p in file.parent.glob("*.yaml")) if file.parent.is_dir() else []
        hint = f"; run files there: {', '.join(near)}" if near else ""
        raise ConfigError(f"{path}: no such run file{hint}")
    loader = _RunFileLoader(file.read_text(encoding="utf-8"))
    loader.name = path
    try:
        node = loader.get_single_node()
        values = loader.construct_document(node) if node else {}
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        line = f":{mark.line + 1}" if mark else ""
        raise ConfigError(f"{path}{line}: not YAML: {getattr(error, 'problem', None) or error}") from None
    finally:
        loader.dispose()
    if not isinstance(values, dict):
        raise ConfigError(f"{path}: expected keys and values; found: {type(values).__name__}")
    origins = {key: f"{path}:{line}" for key, line in _lines(node)}
    return values, origins


def _lines(node: yaml.Node | None, prefix: str = "") -> list[tuple[str, int]]:
    """(dotted key, line number) of every key and list item below a YAML node."""
    if isinstance(node, yaml.MappingNode):
        children = [(str(key.value), key.start_mark.line + 1, value) for key, value in node.value]
    elif isinstance(node, yaml.SequenceNode):
        children = [(str(i), item.start_mark.line + 1, item) for i, item in enumerate(node.value)]
    else:
        return []
    found = []
    for name, line, child in children:
        key = f"{prefix}{name}"
        found += [(key, line), *_lines(child, f"{key}.")]
    return found


def _apply(values: dict[str, Any], origins: dict[str, str], override: str) -> None:
    key, equals, text = override.partition("=")
    if not equals or not re.fullmatch(r"[\w\-]+(\.[\w\-]+)*", key):
        raise ConfigError(
            f"{override!r}: not an override; expected: dotted.key=value, such as training.learning_rate=1e-5"
        )
    try:
        value = yaml.load(text, _RunFileLoader)  # noqa: S506 (a SafeLoader)
    except yaml.YAMLError as error:
        raise ConfigError(
            f"{key}: the value is not YAML; found: {text!r}; {getattr(error, 'problem', error)}"
        ) from None
    *parents, last = key.split(".")
    target: Any = values
    for depth, part in enumerate(parents):
        here = ".".join(parents[: depth + 1])
        child = _item(target, part, here, override)
        if here == "learner.deepspeed" and isinstance(child, str):
            origins[here] = child
            child = read_deepspeed(child)
        if child is None:
            child = {}
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
        raise ConfigError(f"{override!r}: {here}: no such list item; expected: a number from 0 to {len(target) - 1}")
    return target[int(part)]


def _set(target: Any, part: str, value: Any) -> None:
    target[int(part) if isinstance(target, list) else part] = value


def _problems(error: ValidationError, model: type[BaseModel], origins: dict[str, str], path: str) -> list[str]:
    """One line for each problem: `file:line: key: what is wrong; found; expected`."""
    lines: list[str] = []
    for problem in error.errors():
        # Branches of a union repeat the type's own name in `loc`; keys never contain brackets or capitals.
        loc = [
            str(part)
            for part in problem["loc"]
            if not re.search(r"[\[\]A-Z]|^(str|int|float|bool|dict|list)$", str(part))
        ]
        key = ".".join(loc)
        if problem["type"] == "extra_forbidden":
            texts = [unknown_key(".".join(loc[:-1]), loc[-1], _fields_at(model, loc[:-1]))]
        elif problem["type"] == "missing":
            texts = [f"{key}: missing"]
        elif problem["type"] == "value_error":
            message = str(problem["ctx"]["error"])
            joint = ": " if message.startswith("found:") else "."
            texts = [f"{key}{joint}{line}" if key else line for line in message.splitlines()]
        else:
            texts = [f"{key}: {problem['msg'][0].lower()}{problem['msg'][1:]}; found: {problem['input']!r}"]
        for text in texts:
            line = f"{_where(text.partition(':')[0], origins, path)}: {text}"
            if line not in lines:
                lines.append(line)
    return lines


def _where(key: str, origins: dict[str, str], path: str) -> str:
    while key:
        if key in origins:
            return origins[key]
        key = key.rpartition(".")[0]
    return path


def _fields_at(model: type[BaseModel], loc: list[str]) -> list[str]:
    """Field names of the section at a dotted place; the section may hide in a union such as `Section | None`."""
    for part in loc:
        field = model.model_fields.get(part)
        if field is None:
            return []
        kinds = [field.annotation, *getattr(field.annotation, "__args__", ())]
        sections = [k for k in kinds if isinstance(k, type) and issubclass(k, BaseModel)]
        if not sections:
            return []
        model = sections[0]
    return list(model.model_fields)


def _flatten(value: Any, prefix: str = "") -> list[tuple[str, Any]]:
    if isinstance(value, dict) and value:
        return [row for key, item in value.items() for row in _flatten(item, f"{prefix}{key}.")]
    if isinstance(value, list) and any(isinstance(item, dict) for item in value):
        return [row for i, item in enumerate(value) for row in _flatten(item, f"{prefix}{i}.")]
    return [(prefix.rstrip("."), value)]
