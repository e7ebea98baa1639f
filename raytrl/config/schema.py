"""The JSON schema of each kind of run file, so that editors complete and check it."""

from typing import Any

from pydantic import TypeAdapter

from raytrl.config.describe import native_help
from raytrl.config.foreign.native import NativeClass, native_fields
from raytrl.config.kinds import forms_of
from raytrl.config.renamed import OWNED
from raytrl.config.runs.base import Run, TrainingRun
from raytrl.config.runs.sweep import DISTRIBUTIONS

_DIALECT, _VERSION = "$schema", "https://json-schema.org/draft/2020-12/schema"


def json_schema(kind: str) -> dict[str, Any]:
    """JSON schema (2020-12) of one kind, the foreign classes' fields included."""
    forms = [_schema_of(model) for model in forms_of(kind)]
    if len(forms) == 1:
        return {_DIALECT: _VERSION, **forms[0]}
    sections = {name: section for form in forms for name, section in form.pop("$defs").items()}
    named = {
        "kind": {"const": kind, "description": " ".join(form["properties"]["kind"]["description"] for form in forms)}
    }
    return {_DIALECT: _VERSION, "type": "object", "properties": named, "anyOf": forms, "$defs": sections}


def _schema_of(model: type[Run]) -> dict[str, Any]:
    schema: dict[str, Any] = model.model_json_schema()
    properties = schema["properties"]
    foreign = model.foreign()
    if native := foreign.get("training"):
        properties["training"] = _native_schema(native, set(OWNED)) | _described(properties["training"])
    if native := foreign.get("lora"):
        either = {"anyOf": [_native_schema(native, {"task_type"}), {"type": "null"}]}
        properties["lora"] = either | _described(properties["lora"])
    if issubclass(model, TrainingRun):
        # What the loader takes besides: one tracker's name, or null for none.
        properties["report_to"]["anyOf"] = [{"type": "array"}, {"type": "string"}, {"type": "null"}]
        properties["report_to"].pop("type")
        deepspeed = schema["$defs"]["LearnerSection"]["properties"]["deepspeed"]
        deepspeed["anyOf"] = [{"type": "string"}, *deepspeed["anyOf"]]
    sections = schema["$defs"]
    if "DataSource" in sections:
        sections["DataSource"] = {"anyOf": [{"type": "string"}, sections["DataSource"]]}
    if "Distribution" in sections:
        words = {**DISTRIBUTIONS, "grid_search": DISTRIBUTIONS["grid"]}
        values: dict[str, Any] = {name: {"description": text} for name, text in words.items()}
        one = {"minProperties": 1, "maxProperties": 1}
        sections["Distribution"] = {"type": "object", "properties": values, "additionalProperties": False, **one}
    return schema


def _described(field: dict[str, Any]) -> dict[str, Any]:
    return {"description": field["description"]}


def _native_schema(native: NativeClass, leave_out: set[str]) -> dict[str, Any]:
    properties = {}
    for name, field in native_fields(native).items():
        if name in leave_out:
            continue
        entry = {} if field.type is Any else TypeAdapter(field.type).json_schema()
        if field.help:
            entry["description"] = native_help(field.help)
        properties[name] = entry
    return {"type": "object", "title": str(native), "properties": properties, "additionalProperties": False}
