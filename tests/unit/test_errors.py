"""What raytrl raises on purpose crosses Ray as it is."""

import pickle
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

from raytrl import errors
from raytrl.errors import RaytrlError


def below(kind: type[RaytrlError]) -> Iterator[type[RaytrlError]]:
    yield kind
    for child in kind.__subclasses__():
        yield from below(child)


KINDS = list(dict.fromkeys(below(RaytrlError)))


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.__name__)
def test_an_error_pickles_with_its_message(kind: type[RaytrlError]) -> None:
    text = "rollout.actors: found: 2; expected: 1 ü"
    copy = pickle.loads(pickle.dumps(kind(text)))
    assert type(copy) is kind
    assert str(copy) == text
    assert copy.args == (text,)
    assert copy.exit_status == kind.exit_status


def test_all_are_defined_in_one_module_and_drawn_there() -> None:
    names = {kind.__name__ for kind in KINDS}
    parents = {0: "Exception"}  # by depth in the tree, four columns each
    drawn = re.findall(r"^    ([│├└─ ]*)(\w+Error)\b *(\d?)", str(errors.__doc__), re.MULTILINE)
    for indent, name, status in drawn:
        kind, depth = getattr(errors, name), len(indent) // 4
        parents[depth + 1] = name
        assert kind.__base__.__name__ == parents[depth]
        assert not status or kind.exit_status == int(status)
    assert sorted(name for _, name, _ in drawn) == sorted(names)
    for path in Path("raytrl").rglob("*.py"):
        bases = re.findall(r"^ *class \w+\((.*)\):", path.read_text(), re.MULTILINE)
        found = {word for base in bases for word in re.findall(r"\w+", base)} & names
        assert path.name == "errors.py" or not found, path
