"""Datasets: every format loads, and what cannot be trained on is refused with its row."""

import json
from pathlib import Path
from typing import Any

import datasets
import pytest

from raytrl.config.kinds import RUNS
from raytrl.config.runs.supervised import SupervisedRun
from raytrl.config.sections.data import DataSource
from raytrl.data import check_columns, conversation_of, load_data, texts_of
from raytrl.errors import ConfigError, DataError
from tests.runs import write_rows

USER = {"role": "user", "content": "hi"}
BOT = {"role": "assistant", "content": "hello"}


@pytest.fixture(autouse=True)
def _in_empty_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def run_of(kind: str = "sft", **training: Any) -> SupervisedRun:
    run = RUNS[kind].model_validate(
        {"name": "a", "model": {"path": "m"}, "data": {"train": "a.jsonl"}, "training": training}
    )
    assert isinstance(run, SupervisedRun)
    return run


def load(source: Any) -> datasets.Dataset:
    return load_data(DataSource.model_validate(source), "data.train")


def columns_of(rows: list[dict[str, Any]], kind: str = "sft", **training: Any) -> tuple[str, ...]:
    return check_columns(load(write_rows(Path("a.jsonl"), rows)), run_of(kind, **training), "data.train")


def load_error(source: Any) -> str:
    with pytest.raises(ConfigError) as caught:
        load(source)
    return str(caught.value)


def column_error(rows: list[dict[str, Any]], kind: str = "sft") -> str:
    with pytest.raises(DataError) as caught:
        columns_of(rows, kind)
    return str(caught.value)


# formats


def test_every_file_format_loads_by_its_suffix() -> None:
    rows = datasets.Dataset.from_dict({"text": ["a", "b"]})
    write_rows(Path("a.jsonl"), list(rows))
    Path("a.json").write_text(json.dumps(list(rows)))
    Path("a.csv").write_text("text\na\nb\n")
    Path("a.txt").write_text("a\nb\n")
    rows.to_parquet("a.parquet")
    for name in ("a.jsonl", "a.json", "a.csv", "a.txt", "a.parquet"):
        assert load(name)["text"][:] == ["a", "b"], name


def test_saved_datasets_load_with_and_without_splits() -> None:
    rows = datasets.Dataset.from_dict({"text": ["a", "b"]})
    rows.save_to_disk("one")
    datasets.DatasetDict({"train": rows.select([0]), "test": rows.select([1])}).save_to_disk("splits")
    assert load("one")["text"][:] == ["a", "b"]
    assert load("splits")["text"][:] == ["a"]
    assert load({"path": "splits", "split": "test"})["text"][:] == ["b"]


def test_builder_options_and_slices_reach_the_builder() -> None:
    Path("a.csv").write_text("text;n\na;1\nb;2\n")
    assert load({"path": "csv", "data_files": "a.csv", "sep": ";", "split": "train[:1]"}).to_list() == [
        {"text": "a", "n": 1}
    ]


# what cannot be loaded


def test_a_missing_file_is_named_with_the_working_directory() -> None:
    assert load_error("no.jsonl") == (f"data.train: no such file; found: 'no.jsonl' (working directory {Path.cwd()})")


@pytest.mark.parametrize("bad", ['{"text": b"}', '["x"]', '"x"', '{"text": "half'])
def test_a_broken_json_line_is_named(bad: str) -> None:
    Path("a.jsonl").write_text(f'{{"text": "a"}}\n\n{bad}\n')
    assert load_error("a.jsonl").startswith("data.train: a.jsonl:3: not a JSON object: ")


def test_a_broken_json_file_is_named() -> None:
    Path("a.json").write_text('[{"text": "a"}, {"text"')
    assert load_error("a.json").startswith("data.train: a.json: not JSON: ")


def test_a_pattern_loads_the_files_it_matches_and_is_refused_when_there_are_none() -> None:
    write_rows(Path("a1.jsonl"), [{"text": "a"}])
    write_rows(Path("a2.jsonl"), [{"text": "b"}])
    assert load({"path": "json", "data_files": "a*.jsonl"})["text"][:] == ["a", "b"]
    assert load_error({"path": "json", "data_files": "q*.jsonl"}).startswith("data.train: no such file; found: 'q*.")


@pytest.mark.parametrize("source", [{"path": "rows"}, {"path": "json", "data_dir": "rows"}])
def test_files_are_relative_to_the_folder_that_is_named(source: dict[str, Any]) -> None:
    Path("rows").mkdir()
    write_rows(Path("rows/a[1].jsonl"), [{"text": "a"}])
    assert load(source | {"data_files": "a*.jsonl"})["text"][:] == ["a"]
    assert load(source | {"data_files": "a[1].jsonl"})["text"][:] == ["a"]
    write_rows(Path("b.jsonl"), [{"text": "b"}])
    assert load_error(source | {"data_files": "b.jsonl"}).startswith("data.train: no such file; found: 'rows/b.jsonl'")
    Path("rows/empty.jsonl").write_text("")
    assert load_error(source | {"data_files": "empty.jsonl"}).startswith("data.train: the dataset is empty; found: 0 b")


@pytest.mark.parametrize(("name", "text"), [("a.jsonl", ""), ("a.csv", ""), ("a.csv", "text\n")])
def test_an_empty_dataset_is_refused(name: str, text: str) -> None:
    Path(name).write_text(text)
    assert load_error(name).startswith("data.train: the dataset is empty; found: 0 ")


def test_a_missing_split_names_those_there_are() -> None:
    rows = datasets.Dataset.from_dict({"text": ["a"]})
    datasets.DatasetDict({"train": rows, "test": rows}).save_to_disk("splits")
    write_rows(Path("a.jsonl"), [{"text": "a"}])
    message = load_error({"path": "splits", "split": "tset"})
    assert message.startswith("data.train.split: found: 'tset'")
    assert message.endswith("train, test")
    message = load_error({"path": "json", "data_files": "a.jsonl", "split": "tset"})
    assert message.startswith("data.train.split: found: 'tset'")
    assert "train" in message.partition("tset")[2]


def test_a_hub_id_that_cannot_be_had_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    message = load_error("some-org/nothing")
    assert message.startswith("data.train: 'some-org/nothing' cannot be loaded (not a local file or folder")
    message = load_error({"path": "some-org/nothing", "data_files": "en/a.jsonl"})
    assert message.startswith("data.train: 'en/a.jsonl' cannot be loaded (not a local file or folder")


# transforms

TRANSFORMS = """\
from __future__ import annotations
import dataclasses
import datasets

@dataclasses.dataclass
class Options:
    column: str = "text"

def rename(rows):
    return rows.rename_column("body", Options().column)

def raises(rows):
    return rows.rename_column("nothing", "text")

def raises_here(rows):
    raise KeyError("body")

def wrong(rows):
    return [dict(row) for row in rows]

def drop_all(rows):
    return rows.select([])

number = 3
"""


def transformed(function: str) -> dict[str, Any]:
    Path("shape.py").write_text(TRANSFORMS)
    Path("broken.py").write_text("x = 1\n1 / 0\n")
    write_rows(Path("a.jsonl"), [{"body": "a"}])
    return {"path": "json", "data_files": "a.jsonl", "transform": function}


def test_a_transform_reshapes_the_rows() -> None:
    assert load(transformed("shape.py:rename")).to_list() == [{"text": "a"}]


@pytest.mark.parametrize(
    ("function", "message"),
    [
        ("shape.py:renme", "no function 'renme' in shape.py"),
        ("shape.py:number", "no function 'number' in shape.py"),
        ("shap.py:rename", "no such file; found: 'shap.py'"),
        ("nowhere.at_all:rename", "nowhere.at_all cannot be imported: ModuleNotFoundError: No module named 'nowhere'"),
        ("broken.py:f", "broken.py cannot be imported: ZeroDivisionError: division by zero (broken.py:2)"),
        ("shape.py:raises_here", "shape.py:raises_here raised KeyError: 'body' (shape.py:16)"),
        ("shape.py:raises", "shape.py:raises raised ValueError: Original column name nothing not in the dataset"),
        ("shape.py:wrong", "returned list; expected: a datasets.Dataset"),
    ],
)
def test_a_transform_that_does_not_work_is_named(function: str, message: str) -> None:
    assert load_error(transformed(function)).startswith(f"data.train.transform: {message}")


def test_a_transform_that_drops_every_row_leaves_an_empty_dataset() -> None:
    assert "the dataset is empty" in load_error(transformed("shape.py:drop_all"))


def test_a_module_that_raised_can_be_mended_and_loaded_again() -> None:
    source = transformed("broken.py:f")
    load_error(source)
    Path("broken.py").write_text("def f(rows):\n    return rows\n")
    assert len(load(source)) == 1


# columns


@pytest.mark.parametrize(
    ("kind", "row", "columns"),
    [
        ("sft", {"text": "a"}, ("text",)),
        ("sft", {"prompt": "a", "completion": "b"}, ("prompt", "completion")),
        ("sft", {"messages": [USER, BOT]}, ("messages",)),
        (
            "sft",
            {"conversations": [{"from": "human", "value": "a"}, {"from": "gpt", "value": "b"}]},
            ("conversations",),
        ),
        ("sft", {"input_ids": [1, 2]}, ("input_ids",)),
        ("reward", {"chosen": "a", "rejected": "b"}, ("chosen", "rejected")),
        ("dpo", {"prompt": [USER], "chosen": [BOT], "rejected": [BOT]}, ("prompt", "chosen", "rejected")),
    ],
)
def test_trls_formats_are_recognised(kind: str, row: dict[str, Any], columns: tuple[str, ...]) -> None:
    assert columns_of([row], kind) == columns


def test_the_text_column_may_have_another_name() -> None:
    assert columns_of([{"body": "a"}], dataset_text_field="body") == ("body",)


def test_wrong_columns_list_what_there_is_and_what_is_expected() -> None:
    message = column_error([{"body": "a", "n": 1}])
    assert "found: body, n; expected: messages | conversations | prompt+completion | text | input_ids" in message
    assert "found: text; expected: chosen+rejected" in column_error([{"text": "a"}], "dpo")


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([{"text": "a"}, {"text": "b"}, {"text": None}], "row 3: 'text' is missing or null (1 of 3 rows)"),
        ([{"text": "a"}, {"txt": "b"}], "row 2: 'text' is missing or null (1 of 2 rows); columns: text, txt"),
        ([{"input_ids": [1]}, {"input_ids": None}], "row 2: 'input_ids' is missing or null"),
        ([{"text": 3}], "row 1: 'text' is neither text nor a list of messages"),
        ([{"text": "a"}, {"text": 3}], "row 2: 'text' is neither text nor a list of messages"),
        ([{"input_ids": ["a"]}], "row 1: 'input_ids' is neither"),
        ([{"messages": [USER, BOT]}, {"messages": []}], "row 2: 'messages' has no messages"),
        ([{"messages": [{"who": "user"}]}], "row 1: 'messages' is neither"),
        ([{"prompt": [USER], "completion": "b"}], "prompt, completion must all be strings, or all be lists"),
    ],
)
def test_a_row_that_cannot_be_trained_on_is_named(rows: list[dict[str, Any]], message: str) -> None:
    assert column_error(rows).startswith(f"data.train: {message}")


def test_a_plain_prompt_with_conversational_answers_is_refused() -> None:
    message = column_error([{"prompt": "a", "chosen": [BOT], "rejected": [BOT]}], "reward")
    assert "prompt, chosen, rejected must all be strings" in message


def test_row_numbers_are_those_of_the_rows_trained_on() -> None:
    rows = datasets.Dataset.from_dict({"text": ["a", "b", None]}).select([2, 0])
    with pytest.raises(DataError, match="row 1: 'text' is missing"):
        check_columns(rows, run_of(), "data.train")


def test_the_first_conversation_has_todays_roles() -> None:
    rows = datasets.Dataset.from_list(
        [{"conversations": [{"from": "human", "value": "a"}, {"from": "gpt", "value": "b"}]}]
    )
    assert conversation_of(rows, ("conversations",)) == [
        {"role": "user", "content": "a"},
        {"role": "assistant", "content": "b"},
    ]
    pair = datasets.Dataset.from_list([{"prompt": [USER], "chosen": [BOT], "rejected": [USER]}])
    assert conversation_of(pair, ("prompt", "chosen", "rejected")) == [USER, BOT]
    assert conversation_of(datasets.Dataset.from_dict({"text": ["a"]}), ("text",)) is None


def test_a_tokenizer_sees_every_text_and_no_missing_content() -> None:
    rows = datasets.Dataset.from_list([{"messages": [USER, {"role": "assistant", "content": None}]}])
    assert list(texts_of(rows, ("messages",))) == ["hi", ""]
    assert list(texts_of(datasets.Dataset.from_dict({"text": ["a", "b"]}), ("text",))) == ["a", "b"]
