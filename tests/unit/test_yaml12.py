"""A run file is YAML 1.2: what is read, what is refused with its line, and what is written for readers of both YAMLs."""

import math
from pathlib import Path
from typing import Any

import pytest
import yaml

from raytrl.config.load import load_run, overrides_of
from raytrl.config.sections.reward import SourceSection
from raytrl.config.yaml12 import dump, parse, yaml_text
from raytrl.errors import ConfigError
from tests.runs import run_file


def read(text: str) -> Any:
    return parse(text, "run.yaml")[0]


@pytest.mark.parametrize(
    ("text", "value"),
    [
        *[(word, word) for word in ("yes", "Yes", "no", "on", "OFF", "y", "n", "1:30", "190:20:30", "12_000", "0b11")],
        *[(word, word) for word in ("2026-11-25", "2026-11-25T10:00:00Z", "=", "nULL", "tRUE", "0x", "1__0", "-.nan")],
        *[
            ("0042", 42),
            ("08", 8),
            ("-017", -17),
            ("+7", 7),
            ("0o17", 15),
            ("0x1F", 31),
            ("true", True),
            ("FALSE", False),
        ],
        *[(".5", 0.5), ("5.", 5.0), ("1e5", 1e5), ("1e-5", 1e-5), ("-1E+3", -1000.0), ("1.5e3", 1500.0)],
        *[(".inf", math.inf), ("-.Inf", -math.inf), ("+.INF", math.inf)],
        *[(word, None) for word in ("~", "null", "Null", "NULL", "")],
        *[('"yes"', "yes"), ("'0042'", "0042"), ("!!str 0042", "0042"), ('"<<"', "<<"), ("<<", "<<")],
    ],
)
def test_a_value_is_what_the_core_schema_says(text: str, value: Any) -> None:
    found = read(f"x: {text}\n")["x"]
    assert (found, type(found)) == (value, type(value))
    assert read(f"x: [{text}]\n" if text else "x: [~]\n")["x"] == [value]
    assert read(text) == value


def test_nan_is_read() -> None:
    assert math.isnan(read("x: .nan")["x"])


@pytest.mark.parametrize(
    ("text", "first"),
    [("\ufeffa: 1\nb: yes\n", 1), ("a: 1\r\nb: yes\r\n", 1), ("%YAML 1.2\n---\na: 1\nb: yes\n...\n", 3)],
)
def test_files_as_editors_write_them(text: str, first: int) -> None:
    assert parse(text, "f") == ({"a": 1, "b": "yes"}, {"a": first, "b": first + 1})


MERGES = """\
a: &a {workers: 1, start_timeout_s: 10}
b: &b {workers: 2, stall_timeout_s: 20}
one: {<<: *a}
after: {<<: *a, workers: 5}
before: {workers: 5, <<: *a}
both: {<<: [*a, *b]}
other: {<<: [*b, *a]}
again: &again
  <<: *a
  workers: 7
used: *again
third: {<<: *again, workers: 8}
"""


def test_merge_keys() -> None:
    found = read(MERGES)
    assert found["one"] == {"workers": 1, "start_timeout_s": 10}
    assert found["after"] == found["before"] == {"workers": 5, "start_timeout_s": 10}
    assert found["both"] == {"workers": 1, "start_timeout_s": 10, "stall_timeout_s": 20}  # the first of several wins
    assert found["other"]["workers"] == 2
    assert found["again"] == found["used"] == {"workers": 7, "start_timeout_s": 10}
    assert found["third"] == {"workers": 8, "start_timeout_s": 10}
    assert found["a"] == {"workers": 1, "start_timeout_s": 10}


def test_a_merged_key_has_the_line_where_it_is_written() -> None:
    _, lines = parse("a: &a\n  workers: 1\n  x: {y: 1}\nb:\n  <<: *a\n  workers: 2\n  list:\n  - {p: 1}\n", "f")
    found = {key: lines[key] for key in ("b.workers", "b.x", "b.x.y", "b.list.0.p")}
    assert found == {"b.workers": 6, "b.x": 3, "b.x.y": 3, "b.list.0.p": 8}
    assert not [key for key in lines if "<<" in key]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a: 1\nb: 2\na: 3\n", "run.yaml:3: key 'a' stands twice; first on line 1"),
        ("s:\n  a: 1\n  b: {c: 1,\n    c: 2}\n", "run.yaml:4: key 'c' stands twice; first on line 3"),
        ("l:\n- a: 1\n  a: 2\n", "run.yaml:3: key 'a' stands twice; first on line 2"),
        ("a: &a {x: 1, x: 2}\nb: {<<: *a}\n", "run.yaml:1: key 'x' stands twice"),
        ("b:\n  <<: {x: 1}\n  <<: {x: 2}\n", "run.yaml:3: key '<<' stands twice; first on line 2"),
        ("b:\n  <<: 3\n", "run.yaml:2: <<: found: 3; expected: a section, or a list of sections"),
        ("b:\n  <<: [{x: 1}, 3]\n", "run.yaml:2: <<: found: 3"),
        ("b: {<<: *nothing}\n", "run.yaml:1: not YAML: found undefined alias 'nothing'"),
        ("0042: 1\n42: 2\n", "run.yaml:2: key 42 stands twice; first on line 1"),
        ("a: 1\n---\nb: 2\n", "run.yaml:2: not YAML: a second document begins here (---)"),
        ("a: 1\n\tb: 2\n", "run.yaml:2: not YAML: "),
        ("a:\n\tb: 2\n", "run.yaml:2: not YAML: found character '\\t' that cannot start any token; indent with blanks"),
        ("a: &a\n  b: *a\n", "run.yaml:2: a.b: an alias (*) stands within its own anchor (&)"),
        ("a: &a [*a]\n", "run.yaml:1: a.0: an alias (*) stands within its own anchor (&)"),
        ("a: !!timestamp 2026-11-25\n", "run.yaml:1: not YAML: "),
    ],
)
def test_what_is_refused_is_named_with_its_line(text: str, message: str) -> None:
    with pytest.raises(ConfigError) as error:
        read(text)
    assert message in str(error.value)


WORDS = (
    *(
        "yes",
        "no",
        "on",
        "off",
        "y",
        "true",
        "null",
        "~",
        "",
        "0042",
        "08",
        "0o17",
        "017",
        "1e5",
        "1e-5",
        ".5",
        "5.",
        "1:30",
    ),
    *(
        "12_000",
        "0x1F",
        "2026-11-25",
        "2026-13-45",
        ".inf",
        ".nan",
        "=",
        "<<",
        "a: b",
        "#",
        "- a",
        "all-linear",
        "0b11",
    ),
)


@pytest.mark.parametrize(
    "value", [*WORDS, 42, 1e-5, 1e5, 1e22, True, None, math.inf, [1, "no"], {"on": "off", "1e3": [{}]}]
)
def test_what_is_written_is_read_alike_by_both_yamls(value: Any) -> None:
    text = dump({"x": value})
    assert read(text) == yaml.safe_load(text) == {"x": value}
    override = f"x: {yaml_text(value)}"
    assert read(override) == {"x": value}
    if not isinstance(value, float):  # 1e-05 is what a command line shows, and is no number to YAML 1.1
        assert yaml.safe_load(override) == {"x": value}


def test_the_config_of_an_earlier_version_is_read_as_it_was_written() -> None:
    """It was written by PyYAML, for YAML 1.1: `launch.runs.resume` reads it, and what this version writes, with PyYAML."""
    values = {"words": list(WORDS), "seed": 42, "lr": 1e-5, "strategy": "no", "bf16": True}
    assert yaml.safe_load(yaml.safe_dump(values)) == yaml.safe_load(dump(values)) == values


def test_overrides_are_read_by_the_same_rules(tmp_path: Path) -> None:
    found = load_run(
        run_file(tmp_path, "a"), ["seed=0042", "training.eval_strategy=no", "training.learning_rate=1e-5"]
    ).run
    assert (found.seed, found.training["eval_strategy"], found.training["learning_rate"]) == (42, "no", 1e-5)  # type: ignore[attr-defined]
    assert overrides_of({"label": "yes", "x": 1e-5}) == ['label="yes"', "x=1e-05"]


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("training.bf16=yes", "training.bf16: found: 'yes'; expected: true or false (trl.SFTConfig)"),
        ("training.packing=Off", "training.packing: found: 'Off'; expected: true or false"),
        ('training.bf16="1"', "training.bf16: found: '1'; expected: true or false"),
        ("training.eval_strategy=yes", "training.eval_strategy: found: 'yes'; expected: no | steps | epoch"),
        ("lora={r: 4, use_rslora: yes}", "lora.use_rslora: found: 'yes'; expected: true or false (peft.LoraConfig)"),
        ("lora={r: 4, init_lora_weights: no}", "lora.init_lora_weights: found: 'no'; expected: true or false"),
        (
            "learner.deepspeed={zero_optimization: {stage: 2, overlap_comm: no}}",
            "overlap_comm: found: 'no'; expected: true",
        ),
        (
            "learner.deepspeed={bf16: {enabled: on}}",
            "learner.deepspeed.bf16.enabled: found: 'on'; expected: true or false",
        ),
        (
            "learner.deepspeed={wandb: {enabled: on}}",
            "learner.deepspeed.wandb.enabled: found: 'on'; expected: true or false",
        ),
        (
            "learner.deepspeed={prescale_gradients: no}",
            "learner.deepspeed.prescale_gradients: found: 'no'; expected: true",
        ),
        ("model.trust_remote_code=on", "model.trust_remote_code: found: 'on'; expected: true or false"),
        (
            "model.config.tie_word_embeddings=no",
            "model.config.tie_word_embeddings: found: 'no'; expected: true or false",
        ),
        (
            "data.train={path: csv, data_files: a.csv, skip_blank_lines: no}",
            "data.train.skip_blank_lines: found: 'no'; ",
        ),
        ("report_to=no", "report_to: found: 'no'; expected: some of"),
    ],
)
def test_a_word_is_no_boolean(override: str, message: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError) as error:
        load_run(run_file(tmp_path, "a"), [override])
    assert message in str(error.value)


def test_true_and_auto_stay_what_they_are(tmp_path: Path) -> None:
    deepspeed = "learner.deepspeed={bf16: {enabled: auto}, zero_optimization: {stage: 2, overlap_comm: true}}"
    found = load_run(run_file(tmp_path, "a"), ["training.bf16=true", "training.eval_strategy=no", deepspeed]).run
    assert found.training["bf16"] is True  # type: ignore[attr-defined]


def test_a_setting_that_is_not_a_number_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"^command line: training.learning_rate: found: .nan; expected: a number"):
        load_run(run_file(tmp_path, "a"), ["training.learning_rate=.nan"])


def test_labels_of_a_judge() -> None:
    def label(text: str) -> Any:
        return SourceSection.model_validate(read(f"{{name: a, model: m, label: {text}}}")).label

    assert (label("yes"), label("no"), label("0042"), label('"true"')) == ("yes", "no", 42, "true")
    with pytest.raises(ValueError, match=r'found: True; expected: a number, or a name: "true" in quotes'):
        label("true")
