"""What each key of a run file means: the text below its field, or the help of the library that it belongs to."""

import typing
from collections.abc import Sequence
from typing import Any

from pydantic.fields import FieldInfo

from raytrl.config.foreign.native import native_fields
from raytrl.config.runs.base import Run
from raytrl.config.sections.base import Section


def meaning(run: type[Run], key: str) -> str:
    """What a dotted key says. What is no field itself (`learner.resources.CPU`) is told by the field that it is part of."""
    parts = key.split(".")
    if len(parts) > 1 and (native := run.foreign().get(parts[0])) is not None:
        theirs = native_fields(native).get(parts[1])
        if theirs is not None and theirs.help:
            return native_help(theirs.help)
    for depth in reversed(range(len(parts))):
        if (field := fields_at(run, parts[:depth]).get(parts[depth])) is not None:
            return " ".join((field.description or "").split())
    return ""


def native_help(text: str) -> str:
    """A field's help as a person reads it: it was written for argparse, where `%%` stands for `%`."""
    return " ".join(text.replace("%%", "%").split())


def fields_at(run: type[Run], parts: Sequence[str]) -> dict[str, FieldInfo]:
    """The fields below a dotted place by name, of an item of a list too; none where it holds no section."""
    sections: list[type[Section]] = [run]
    for part in parts:
        if not part.isdecimal():
            fields = [section.model_fields[part] for section in sections if part in section.model_fields]
            sections = [section for field in fields for section in _sections_in(field.annotation)]
    return {name: field for section in sections for name, field in section.model_fields.items()}


def _sections_in(annotation: Any) -> list[type[Section]]:
    """Alone, in a union or in a list; the keys of a dictionary of sections are free."""
    if isinstance(annotation, type) and issubclass(annotation, Section):
        return [annotation]
    if typing.get_origin(annotation) is dict:
        return []
    return [section for argument in typing.get_args(annotation) for section in _sections_in(argument)]
