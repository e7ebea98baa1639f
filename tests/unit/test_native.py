"""What raytrl reads from other libraries' source files is what their classes say when they are imported."""

import ast
import dataclasses
import types
import typing
from typing import Any

import pytest

from raytrl.config.foreign.native import LORA_CLASS, ZERO_CLASS, native_fields, type_name
from raytrl.config.renamed import OWNED, RENAMED
from raytrl.config.runs.base import TRACKERS
from raytrl.config.runs.supervised import DpoRun, RewardRun, SftRun

CLASSES = {
    "lora": LORA_CLASS,
    **{run.model_fields["kind"].default: run.native_class for run in (SftRun, RewardRun, DpoRun)},
}


@pytest.fixture(scope="module")
def classes() -> dict[str, Any]:
    import peft
    import trl  # 7 s, the one test module that needs it

    return {
        "sft": trl.SFTConfig,
        "reward": trl.RewardConfig,
        "dpo": trl.DPOConfig,
        "lora": peft.LoraConfig,
    }


@pytest.mark.parametrize("kind", ["sft", "reward", "dpo", "lora"])
def test_fields_and_defaults_are_those_of_the_class(kind: str, classes: dict[str, Any]) -> None:
    read = native_fields(CLASSES[kind])
    real = {f.name: f for f in dataclasses.fields(classes[kind]) if f.init}
    assert set(read) == set(real)
    wrong = {}
    for name, field in real.items():
        try:
            default = ast.literal_eval(read[name].default or "None")
        except ValueError:
            continue  # a constant or factory of the library
        if field.default is not dataclasses.MISSING and default != field.default:
            wrong[name] = (default, field.default)
    assert wrong == {}


@pytest.mark.parametrize("kind", ["sft", "reward", "dpo"])
def test_a_field_that_takes_null_by_default_may_be_null(kind: str, classes: dict[str, Any]) -> None:
    read = native_fields(CLASSES[kind])
    for field in dataclasses.fields(classes[kind]):
        kinds = typing.get_args(read[field.name].type) if read[field.name].type is not Any else ()
        if field.type is not Any and "None" in str(field.type) and read[field.name].type is not Any:
            assert types.NoneType in kinds, field.name


@pytest.mark.parametrize("kind", ["sft", "reward", "dpo"])
def test_owned_and_renamed_keys_exist_or_do_not(kind: str, classes: dict[str, Any]) -> None:
    real = {f.name for f in dataclasses.fields(classes[kind]) if f.init}
    assert set(OWNED) - real <= {"overwrite_output_dir"}  # gone from transformers, still in examples
    for old, today in RENAMED.items():
        target = today.partition(" ")[0].partition(":")[0].split(".")
        only_sft = ("dataset_text_field", "chat_template_path")
        if target[0] == "training" and (kind == "sft" or target[1] not in only_sft):
            assert target[1] in real, (old, today)


def test_trackers_are_those_of_transformers(classes: dict[str, Any]) -> None:
    from transformers.integrations.integration_utils import INTEGRATION_TO_CALLBACK

    assert set(TRACKERS) == {*INTEGRATION_TO_CALLBACK, "all"}


def test_deepspeeds_zero_fields_are_read_without_importing_it() -> None:
    fields = native_fields(ZERO_CLASS)
    assert {"stage", "overlap_comm", "offload_optimizer", "stage3_param_persistence_threshold"} <= {
        *fields,
        *(f"stage3_{name}" for name in fields),
    }


def test_types_read_as_python_writes_them() -> None:
    assert type_name(int | None) == "int | null"
    assert type_name(typing.Optional[float]) == "float | null"  # noqa: UP045 (as libraries write it)
    assert type_name(list[str]) == "list[str]"
