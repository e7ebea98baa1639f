"""The JSON schema of each kind of run file, so that editors complete and check it."""

from typing import Any

from pydantic import TypeAdapter

from raytrl.config.foreign.native import LORA_CLASS, NativeClass, native_fields
from raytrl.config.kinds import RUNS
from raytrl.config.renamed import OWNED
from raytrl.config.runs.base import TrainingRun
from raytrl.config.runs.supervised import SupervisedRun
from raytrl.config.runs.sweep import DISTRIBUTIONS


def json_schema(kind: str) -> dict[str, Any]:
    """JSON schema (2020-12) of one kind, the foreign classes' fields included."""
    model = RUNS[kind]
    schema: dict[str, Any] = {"$schema": "https://json-schema.org/draft/2020-12/schema", **model.model_json_schema()}
    if issubclass(model, SupervisedRun):
        schema["properties"]["training"] = _native_schema(model.native_class, leave_out=set(OWNED))
    if issubclass(model, TrainingRun):
        schema["properties"]["lora"] = {"anyOf": [_native_schema(LORA_CLASS, {"task_type"}), {"type": "null"}]}
        # What the loader takes besides: one tracker's name, or null for none.
        schema["properties"]["report_to"]["anyOf"] = [{"type": "array"}, {"type": "string"}, {"type": "null"}]
        schema["properties"]["report_to"].pop("type")
        learner = schema["$defs"]["LearnerSection"]["properties"]
        learner["deepspeed"] = {"anyOf": [{"type": "string"}, *learner["deepspeed"]["anyOf"]]}
    sections = schema["$defs"]
    if "DataSource" in sections:
        sections["DataSource"] = {"anyOf": [{"type": "string"}, sections["DataSource"]]}
    if "Distribution" in sections:
        values: dict[str, Any] = {name: {} for name in (*DISTRIBUTIONS, "grid_search")}
        one = {"minProperties": 1, "maxProperties": 1}
        sections["Distribution"] = {"type": "object", "properties": values, "additionalProperties": False, **one}
    return schema


def _native_schema(native: NativeClass, leave_out: set[str]) -> dict[str, Any]:
    properties = {}
    for name, field in native_fields(native).items():
        if name in leave_out:
            continue
        entry = {} if field.type is Any else TypeAdapter(field.type).json_schema()
        if field.help:
            entry["description"] = field.help.replace("%%", "%")
        properties[name] = entry
    return {"type": "object", "title": str(native), "properties": properties, "additionalProperties": False}
