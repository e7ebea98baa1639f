"""YAML 1.2, read with the line of every key, and written so that readers of 1.1 and of 1.2 see the same values.

yamlcore has the core schema of 1.2 for PyYAML: `yes` is a word, 0042 is 42. ruamel.yaml would bring merge keys too, but reads
dates, 12_000 and `=` as 1.1 does; PyYAML's own merge takes the last of `<<: [*a, *b]` where the specification says the first.
"""

import json
import math
import re
from collections.abc import Hashable, Mapping
from typing import Any

import yaml
from yamlcore import CoreLoader

from raytrl.errors import ConfigError

_MERGE = "tag:yaml.org,2002:merge"
_PLAIN = re.compile(r"[/\w][./\w\-]*")


class _Loader(CoreLoader):  # type: ignore[misc]
    """The core schema with merge keys; a key that stands twice is an error."""

    def __init__(self, text: str) -> None:
        super().__init__(text)
        self._merged: set[yaml.MappingNode] = set()

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        self._merge(node)
        return yaml.constructor.BaseConstructor.construct_mapping(self, node, deep)

    def _merge(self, node: yaml.MappingNode) -> None:
        """Gives a section the keys of those that it merges, once: its own win, then those of the first in a list."""
        if node in self._merged:
            return
        self._merged.add(node)
        self._refuse_doubles(node)
        pairs: dict[str, tuple[yaml.Node, yaml.Node]] = {}
        for section in reversed(self._sections(node)):
            self._merge(section)
            pairs |= {key.value: (key, value) for key, value in section.value}
        pairs |= {key.value: (key, value) for key, value in node.value if key.tag != _MERGE}
        node.value = list(pairs.values())

    def _sections(self, node: yaml.MappingNode) -> list[yaml.MappingNode]:
        merged = next((value for key, value in node.value if key.tag == _MERGE), None)
        if merged is None:
            return []
        sections = merged.value if isinstance(merged, yaml.SequenceNode) else [merged]
        for section in sections:
            if not isinstance(section, yaml.MappingNode):
                found = self.construct_object(section, deep=True)
                raise ConfigError(f"{_at(section)}: <<: found: {found!r}; expected: a section, or a list of sections")
        return list(sections)

    def _refuse_doubles(self, node: yaml.MappingNode) -> None:
        seen: dict[Any, int] = {}
        for key_node, _ in node.value:
            key = self.construct_object(key_node, deep=True)
            if not isinstance(key, Hashable):
                raise ConfigError(f"{_at(key_node)}: a key must be a word; found: {key!r}")
            if key in seen:
                raise ConfigError(f"{_at(key_node)}: key {key!r} stands twice; first on line {seen[key]}")
            seen[key] = key_node.start_mark.line + 1


_Loader.add_implicit_resolver(_MERGE, re.compile("^<<$"), ["<"])
_Loader.add_constructor(_MERGE, yaml.constructor.SafeConstructor.construct_yaml_str)  # quoted or not, elsewhere a word


class _Dumper(yaml.SafeDumper):
    """Quotes each string that YAML 1.1 or 1.2 would read as something else."""


for _first, _rules in CoreLoader.yaml_implicit_resolvers.items():
    for _tag, _pattern in _rules:
        _Dumper.add_implicit_resolver(_tag, _pattern, [_first])


def _at(node: yaml.Node) -> str:
    return f"{node.start_mark.name}:{node.start_mark.line + 1}"


def parse(text: str, name: str) -> tuple[Any, dict[str, int]]:
    """The value of a YAML text, and the line of every dotted key and list item.

    Args:
        name: stands for the text in messages.

    Raises:
        ConfigError: with name and line.
    """
    try:
        loader = _Loader(text)
    except yaml.reader.ReaderError as error:
        line = text.count("\n", 0, error.position) + 1
        raise ConfigError(f"{name}:{line}: not YAML: {error.reason}") from None
    loader.name = name
    try:
        node = loader.get_single_node()
        if node is None:
            return None, {}
        value = loader.construct_document(node)
        return value, dict(_lines(node))
    except yaml.MarkedYAMLError as error:
        mark = f":{error.problem_mark.line + 1}" if error.problem_mark else ""
        raise ConfigError(f"{name}{mark}: not YAML: {_problem(error)}") from None
    finally:
        loader.dispose()


def _problem(error: yaml.MarkedYAMLError) -> str:
    problem = str(error.problem)
    if "another document" in problem:
        return "a second document begins here (---); expected: one"
    return f"{problem}; indent with blanks, not with tabs" if "'\\t'" in problem else problem


def _lines(node: yaml.Node, prefix: str = "", parents: tuple[yaml.Node, ...] = ()) -> list[tuple[str, int]]:
    """(dotted key, line number) of everything below a node whose merges have been made."""
    if isinstance(node, yaml.MappingNode):
        children = [(str(key.value), key.start_mark.line + 1, value) for key, value in node.value]
    elif isinstance(node, yaml.SequenceNode):
        children = [(str(i), item.start_mark.line + 1, item) for i, item in enumerate(node.value)]
    else:
        return []
    found = []
    for name, line, child in children:
        key = f"{prefix}{name}"
        if child in (node, *parents):
            name = node.start_mark.name
            raise ConfigError(
                f"{name}:{line}: {key}: an alias (*) stands within its own anchor (&): it would have no end"
            )
        found += [(key, line), *_lines(child, f"{key}.", (node, *parents))]
    return found


def dump(values: Mapping[str, Any]) -> str:
    """A YAML text with a line for each key."""
    return _dump(dict(values), width=80)


def _dump(value: Any, width: float = math.inf, default_style: str | None = None) -> str:
    options: dict[str, Any] = {"width": width, "default_style": default_style}
    return str(yaml.dump(value, Dumper=_Dumper, sort_keys=False, allow_unicode=True, **options))


def yaml_text(value: Any) -> str:
    """A value in one line of YAML that reads back as the same value; quoted only where it has to be."""
    if isinstance(value, dict):
        return "{" + ", ".join(f"{yaml_text(key)}: {yaml_text(item)}" for key, item in value.items()) + "}"
    if isinstance(value, list | tuple):
        return "[" + ", ".join(map(yaml_text, value)) + "]"
    if isinstance(value, str):
        # Not plain, as one of the two YAMLs reads something else: true, yes, 1e3, 2026-11-25.
        is_plain = _PLAIN.fullmatch(value) and _dump(value).splitlines()[0] == value
        return value if is_plain else _dump(value, default_style='"')[:-1]
    if isinstance(value, float) and not math.isfinite(value):
        return str(value).replace("inf", ".inf").replace("nan", ".nan")
    return json.dumps(value)
