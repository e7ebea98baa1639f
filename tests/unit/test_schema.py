"""The JSON schema takes what the loader takes, and refuses what it refuses."""

from pathlib import Path
from typing import Any

import jsonschema
import pytest
import yaml

from raytrl.config.kinds import RUNS
from raytrl.config.load import load_run
from raytrl.config.schema import json_schema
from raytrl.config.sections.base import Section
from raytrl.errors import ConfigError

CONFIGS = Path(__file__).parents[2] / "configs"
RUN: dict[str, Any] = {
    "name": "a",
    "model": {"path": "gpt2"},
    "data": {"train": "train.jsonl"},
    "training": {"learning_rate": 1e-5, "max_steps": 3},
    "lora": {"r": 4, "target_modules": "all-linear"},
    "learner": {"workers": [1, 2], "resources": {"CPU": 1}},
    "report_to": ["tensorboard"],
}


def validator(kind: str) -> jsonschema.Draft202012Validator:
    schema = json_schema(kind)
    jsonschema.Draft202012Validator.check_schema(schema)
    return jsonschema.Draft202012Validator(schema)


def changed(dotted: str, value: Any) -> dict[str, Any]:
    copy: dict[str, Any] = yaml.safe_load(yaml.safe_dump(RUN))
    *parents, last = dotted.split(".")
    section = copy
    for parent in parents:
        section = section.setdefault(parent, {})
    section[last] = value
    return copy


def loads(kind: str, values: dict[str, Any], folder: Path) -> bool:
    file = folder / "run.yaml"
    file.write_text(yaml.safe_dump(values))
    try:
        load_run(str(file), [], kind)
    except ConfigError:
        return False
    return True


def shipped() -> list[Path]:
    files = sorted(CONFIGS.glob("*.yaml"))
    return [file for file in files if yaml.safe_load(file.read_text()).get("kind") in RUNS]


def test_there_are_shipped_files_to_check() -> None:
    assert shipped()


@pytest.mark.parametrize("file", shipped(), ids=lambda file: file.name)
def test_shipped_files_are_valid_and_load(file: Path) -> None:
    loaded = load_run(str(file), [])
    values = yaml.safe_load(yaml.safe_dump(loaded.run.model_dump(mode="json", exclude_unset=True)))
    validator(loaded.run.kind).validate(values)


@pytest.mark.parametrize("kind", ["sft", "reward", "dpo"])
def test_a_resolved_run_file_is_valid(kind: str, tmp_path: Path) -> None:
    file = tmp_path / "run.yaml"
    file.write_text(yaml.safe_dump(RUN))
    validator(kind).validate(load_run(str(file), [], kind).run.model_dump(mode="json"))


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("nmae", "a"),
        ("training.learnin_rate", 1e-5),
        ("training.output_dir", "x"),
        ("training.max_steps", "many"),
        ("lora.lora_alpa", 3),
        ("lora.task_type", "CAUSAL_LM"),
        ("learner.worker", 2),
        ("checkpoint.every", 0),
        ("model.dtype", "bf16"),
        ("data.trian", "x.jsonl"),
        ("model.tokenizer", {"vocabsize": 300}),
        ("report_to", 3),
    ],
)
def test_what_the_loader_refuses_the_schema_refuses(key: str, value: Any, tmp_path: Path) -> None:
    values = changed(key, value)
    assert not loads("sft", values, tmp_path)
    assert not validator("sft").is_valid(values)


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("report_to", "wandb"),
        ("report_to", None),
        ("learner.deepspeed", {"zero_optimization": {"stage": 2}}),
        ("learner.workers", 2),
        ("data.train", {"path": "csv", "data_files": "a.csv", "sep": ";"}),
        ("data.eval", "test.jsonl"),
        ("lora", None),
    ],
)
def test_what_the_loader_takes_the_schema_takes(key: str, value: Any, tmp_path: Path) -> None:
    values = changed(key, value)
    if key == "learner.deepspeed":
        values["learner"]["workers"] = 2
    assert loads("sft", values, tmp_path)
    validator("sft").validate(values)


def undescribed(node: Any, place: str = "") -> list[str]:
    """The properties below a node of a schema that no text describes; other libraries' fields are theirs to describe.

    pydantic leaves out a text that repeats the docstring of the section: that counts as none, too.
    """
    if isinstance(node, list):
        return [found for item in node for found in undescribed(item, place)]
    found = []
    for key, value in node.items() if isinstance(node, dict) else ():
        for name, child in value.items() if key == "properties" else ():
            here = f"{place}.{name}"
            found += [] if child.get("description", "").strip() else [here]
            found += [] if here in (".training", ".lora") else undescribed(child, here)
        if key != "properties":
            found += undescribed(value, f"{place}/{key}")
    return found


@pytest.mark.parametrize("kind", RUNS)
def test_every_key_is_described(kind: str) -> None:
    assert undescribed(json_schema(kind)) == []


def test_a_key_without_a_text_is_found_wherever_it_stands() -> None:
    class Inner(Section):
        told: int = 0
        """Here."""
        inner_untold: int = 0

    class Outer(Section):
        section: Inner = Inner()
        choice: Inner | None = None
        """Here, the key; what stands below it has texts of its own."""

    assert undescribed(Outer.model_json_schema()) == ["/$defs/Inner.inner_untold", ".section"]


def test_keys_of_other_libraries_are_described() -> None:
    training = json_schema("dpo")["properties"]["training"]["properties"]
    assert "beta" in training
    assert training["beta"]["description"]
    assert "beta" not in json_schema("sft")["properties"]["training"]["properties"]
