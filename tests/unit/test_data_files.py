"""Rows are what the file holds: types, keys, encodings, and a file that changed."""

import gzip
import json
import os
from pathlib import Path
from typing import Any

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from raytrl.config.sections.data import DataSource
from raytrl.data import check_columns, choose_columns, load_data, texts_of
from raytrl.errors import DataError
from tests.unit.test_data import BOT, USER, _in_empty_folder, load, load_error, run_of  # noqa: F401  # a fixture


def written(name: str, *lines: str) -> str:
    Path(name).write_text("".join(line + "\n" for line in lines), encoding="utf-8")
    return name


def test_a_file_that_changed_is_read_anew_whatever_its_modification_time() -> None:
    written("a.jsonl", '{"text": "a"}')
    os.utime("a.jsonl", (1.7e9, 1.7e9))
    assert load("a.jsonl").to_list() == [{"text": "a"}]
    written("a.jsonl", '{"text": "b"}')
    os.utime("a.jsonl", (1.7e9, 1.7e9))
    assert load("a.jsonl").to_list() == [{"text": "b"}]
    assert load("a.jsonl")._fingerprint == load("a.jsonl")._fingerprint


def test_a_changed_file_of_a_folder_is_read_anew() -> None:
    Path("rows").mkdir()
    for text in ("a", "b"):
        written("rows/train.jsonl", f'{{"text": "{text}"}}')
        os.utime("rows/train.jsonl", (1.7e9, 1.7e9))
        assert load("rows")["text"][:] == [text]


@pytest.mark.parametrize(
    "value", ["2024-01-05", "2024-01-05 10:00:00", "007", "NA", "1.50", "True", "null", "1e5", "+1"]
)
def test_what_is_written_as_text_arrives_as_that_text(value: str) -> None:
    written("a.jsonl", json.dumps({"prompt": "a", "answer": value}))
    assert load("a.jsonl")["answer"][:] == [value]
    written("a.csv", "prompt,answer", f"a,{value}")
    assert load("a.csv")["answer"][:] == [value]
    written("a.tsv", "prompt\tanswer", f"a\t{value}")
    assert load("a.tsv")["answer"][:] == [value]


def test_numbers_in_csv_are_numbers_where_that_changes_no_digit() -> None:
    written("a.csv", "n,score,zip,gap", "1,0.5,007,1", "-20,2,12,", "0,3.0,3,3")
    assert load("a.csv").to_dict() == {
        "n": [1, -20, 0],
        "score": [0.5, 2.0, 3.0],
        "zip": ["007", "12", "3"],
        "gap": [1, None, 3],
    }


def test_quoted_text_in_csv_keeps_its_newlines_and_its_emptiness() -> None:
    Path("a.csv").write_bytes('\ufefftext,n\r\n"two\nlines, ""so""",1\r\n"",2\r\n'.encode())
    assert load("a.csv").to_list() == [{"text": 'two\nlines, "so"', "n": 1}, {"text": "", "n": 2}]


def call(**arguments: Any) -> dict[str, Any]:
    return {"role": "assistant", "tool_calls": [{"function": {"name": "f", "arguments": arguments}}]}


@pytest.mark.parametrize(
    "rows",
    [
        [[{**USER, "name": "ann"}, BOT], [USER, BOT]],
        [[USER, call(city="Oslo"), BOT], [USER, call(a=2, b=3.5), BOT], [USER, call(a=59.9139, c=None, d=10**20), BOT]],
        [[USER, call(time="2024-01-05")], [USER, call(time=1690876800)]],
        [[USER, {"role": "assistant", "content": None, "tool_calls": []}], [USER, BOT]],
    ],
)
def test_messages_have_the_keys_and_values_of_the_file(rows: list[Any]) -> None:
    written("a.jsonl", *(json.dumps({"messages": row, "id": i}) for i, row in enumerate(rows)))
    loaded = load("a.jsonl")
    assert loaded["messages"][:] == rows
    assert list(map(repr, loaded["messages"][:])) == list(map(repr, rows))  # 2 is not 2.0
    assert loaded["id"][:] == list(range(len(rows)))


def test_messages_with_other_keys_pass_the_column_check() -> None:
    written("a.jsonl", *(json.dumps({"messages": row}) for row in ([{**USER, "name": "ann"}, BOT], [USER, call(a=1)])))
    assert check_columns(load("a.jsonl"), run_of(), "data.train") == ("messages",)


def test_a_key_that_parquet_filled_in_is_not_there() -> None:
    rows = [[{**USER, "name": "ann"}, BOT], [USER, BOT]]
    pq.write_table(pa.table({"messages": pa.array(rows), "id": [1, 2]}), "a.parquet")
    loaded = load("a.parquet")
    assert loaded["messages"][:] == rows
    assert loaded["id"][:] == [1, 2]
    assert check_columns(loaded, run_of(), "data.train") == ("messages",)
    datasets.Dataset.from_dict({"messages": rows}).save_to_disk("saved")
    assert load("saved")["messages"][:] == rows


def test_content_in_parts_of_text_is_one_text() -> None:
    parts = {"role": "user", "content": [{"type": "text", "text": "h"}, {"type": "text", "text": "i"}]}
    written("a.jsonl", json.dumps({"messages": [parts, BOT]}))
    assert load("a.jsonl")["messages"][:] == [[USER, BOT]]
    pq.write_table(pa.table({"messages": pa.array([[parts, parts]])}), "a.parquet")
    assert load("a.parquet")["messages"][:] == [[USER, USER]]


def test_a_later_chunk_may_have_other_columns_and_types(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("raytrl.data_files._CHUNK", 64)
    written("a.jsonl", *(json.dumps({"text": f"row {i}"}) for i in range(50)), '{"text": "last", "id": 7}')
    loaded = load("a.jsonl")
    assert len(loaded) == 51
    assert loaded[50] == {"text": "last", "id": 7}
    written("b.jsonl", *(json.dumps({"text": "a", "n": i}) for i in range(50)), '{"text": "last", "n": "x"}')
    assert load("b.jsonl")["n"][:] == [*range(50), "x"]


@pytest.mark.parametrize("name", ["a.jsonl.gz", "a.ndjson", "a.JSON.GZ", "a.jsonl.bz2", "a.jsonl.xz"])
def test_suffixes_of_rows_in_json(name: str) -> None:
    import bz2
    import lzma

    content = b'{"text": "a"}\n\n{"text": "b"}'
    packed = {"gz": gzip.compress, "bz2": bz2.compress, "xz": lzma.compress}.get(name.lower().rpartition(".")[2])
    Path(name).write_bytes(packed(content) if packed else content)
    assert load(name)["text"][:] == ["a", "b"]


def test_other_packed_files_load() -> None:
    Path("a.csv.gz").write_bytes(gzip.compress(b"text\na\n"))
    Path("a.txt.gz").write_bytes(gzip.compress(b"a\n"))
    assert load("a.csv.gz")["text"][:] == load("a.txt.gz")["text"][:] == ["a"]


def test_a_hub_id_with_a_point_is_no_file() -> None:
    assert DataSource.model_validate("org/data-v1.0").model_dump(exclude_none=True) == {
        "path": "org/data-v1.0",
        "split": "train",
    }


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.jsonl", '{"text": "a"}\n'.encode("utf-16"), "a.jsonl: found: UTF-16 text; expected: UTF-8"),
        ("a.jsonl", b'{"text": "a"}\n{"text": "caf\xe9"}\n', "a.jsonl:2: not UTF-8 text; found: byte 0xe9 after"),
        ("a.csv", b"text\na\ncaf\xe9\n", "a.csv:3: not UTF-8 text; found: byte 0xe9 after 'caf'"),
        (
            "a.jsonl",
            b'{"text": "a"}\n{"text": "\\ud83d"}\n',
            "a.jsonl:2: not a JSON object: found: half a surrogate pair",
        ),
        ("a.json", b'[{"text": "a"}, {"text": "\\ud83d"}]', "a.json: row 2: found: half a surrogate pair"),
        ("a.jsonl", b'{"text": "a"},\n{"text": "b"},\n', "a.jsonl:1: not a JSON object: found: a comma behind it"),
        ("a.json", b'{\n"data": [{"text": "a"}]\n}', "a.json: one JSON object, not rows; found: keys data; expected:"),
        ("a.jsonl", b"null\n", "a.jsonl:1: not a JSON object: found 'null'"),
        ("a.jsonl", b'{"text": "a"}\nnull\n', "a.jsonl:2: not a JSON object: found 'null'"),
        ("a.jsonl", b'{"text": "a", "\\ud83d": 1}\n', "a.jsonl:1: not a JSON object: found: half a surrogate pair"),
        ("a.rows", b"x", "a file whose suffix does not say what is in it; found: 'a.rows'"),
        ("a.csv", b"text,text\na,b\n", "a.csv: two columns have one name; found: 'text' twice"),
        ("a.csv", b"text,n\na,1,2\n", "a.csv: not a table of comma-separated values: CSV parse error: "),
        ("a.jsonl.gz", b"not packed", "a.jsonl.gz: cannot be read: "),
    ],
)
def test_what_cannot_be_read_is_named_with_its_line(name: str, content: bytes, message: str) -> None:
    Path(name).write_bytes(content)
    assert load_error(name).startswith(f"data.train: {message}")


def test_a_named_encoding_and_field_are_read() -> None:
    Path("a.jsonl").write_bytes('{"text": "café"}\n{"text": "b"}\n'.encode("utf-16"))
    assert load({"path": "json", "data_files": "a.jsonl", "encoding": "utf-16"})["text"][:] == ["café", "b"]
    Path("a.csv").write_bytes(b"text\ncaf\xe9\n")
    assert load({"path": "csv", "data_files": "a.csv", "encoding": "latin-1"})["text"][:] == ["café"]
    Path("a.json").write_text('{"v": 1, "data": [{"text": "a", "day": "2024-01-05"}]}')
    loaded = load({"path": "json", "data_files": "a.json", "field": "data"})
    assert loaded.to_list() == [{"text": "a", "day": "2024-01-05"}]


def test_strings_of_every_arrow_type_are_text() -> None:
    texts = pa.array(["a", "b"])
    for kind in (pa.large_string(), pa.string_view(), pa.dictionary(pa.int32(), pa.string())):
        column = texts.dictionary_encode() if pa.types.is_dictionary(kind) else texts.cast(kind)
        pq.write_table(pa.table({"text": column}), "a.parquet")
        loaded = load("a.parquet")
        assert check_columns(loaded, run_of(), "data.train") == ("text",)
        assert list(texts_of(loaded, ("text",))) == ["a", "b"]


# which columns


@pytest.mark.parametrize(
    ("kind", "row", "columns", "unused"),
    [
        ("sft", {"text": "ab", "prompt": "a", "completion": "b"}, ("prompt", "completion"), ("text",)),
        ("sft", {"prompt": "a", "prompt_id": "1", "messages": [USER, BOT]}, ("messages",), ("prompt", "prompt_id")),
        ("sft", {"input_ids": [1], "text": "a"}, ("text",), ("input_ids",)),
        (
            "sft",
            {"text": "a", "tools": [], "labels": [1], "images": [], "prompt": "p"},
            ("text",),
            ("tools", "labels", "images", "prompt"),
        ),
        (
            "sft",
            {"messages": [USER, BOT], "tools": [{"a": 1}], "chat_template_kwargs": {"x": 1}},
            ("messages", "tools", "chat_template_kwargs"),
            (),
        ),
        ("sft", {"input_ids": [1], "labels": [1], "attention_mask": [1]}, ("input_ids", "labels"), ("attention_mask",)),
        ("reward", {"chosen": "a", "rejected": "b", "margin": 0.5, "id": 1}, ("chosen", "rejected", "margin"), ("id",)),
        (
            "dpo",
            {"prompt": "p", "chosen": "a", "rejected": "b", "margin": 1},
            ("prompt", "chosen", "rejected"),
            ("margin",),
        ),
    ],
)
def test_which_columns_are_trained_on(
    kind: str, row: dict[str, Any], columns: tuple[str, ...], unused: tuple[str, ...]
) -> None:
    taken = choose_columns(datasets.Dataset.from_list([row]), run_of(kind), "data.train")
    assert (taken.columns, taken.unused) == (columns, unused)
    assert taken.in_words() == ", ".join(columns) + (f"; not used: {', '.join(unused)}" if unused else "")


def test_a_text_column_that_is_named_is_meant() -> None:
    rows = datasets.Dataset.from_list([{"prompt": "a", "completion": "b", "body": "ab"}])
    assert choose_columns(rows, run_of(dataset_text_field="body"), "data.train").columns == ("body",)


@pytest.mark.parametrize(
    ("kind", "rows", "message"),
    [
        ("sft", [{"messages": json.dumps([USER, BOT])}], "row 1: 'messages' is text, not a list of messages"),
        ("sft", [{"text": json.dumps([USER, BOT])}], "row 1: 'text' is a list of messages written as JSON text"),
        (
            "sft",
            [{"messages": [USER, BOT]}, {"messages": [USER, {**BOT, "content": None}]}],
            "row 2: 'messages' has a message without text, message 2",
        ),
        ("sft", [{"input_ids": [1, 2], "labels": [1]}], "row 1: 'labels' is not as long as 'input_ids'"),
        (
            "sft",
            [{"text": "a"}, {"text": [USER]}],
            "row 2: 'text' is text in some rows and a list of messages in others",
        ),
        ("reward", [{"chosen": "a", "rejected": "b", "margin": "x"}], "'margin' is no number"),
        ("reward", [{"chosen": "a", "rejected": "b", "margin": None}], "row 1: 'margin' is missing or null"),
        (
            "sft",
            [{"messages": [{"role": "user", "content": [{"type": "image"}]}, BOT]}],
            "row 1: 'messages' has a message whose content is not all text",
        ),
    ],
)
def test_a_row_that_would_be_trained_on_wrongly_is_named(kind: str, rows: list[dict[str, Any]], message: str) -> None:
    written("a.jsonl", *map(json.dumps, rows))
    with pytest.raises(DataError) as caught:
        check_columns(load_data(DataSource.model_validate("a.jsonl"), "data.train"), run_of(kind), "data.train")
    assert str(caught.value).startswith(f"data.train: {message}")


def test_a_file_is_a_file_whatever_its_name_would_mean_as_a_pattern() -> None:
    Path("run [2]/what*").mkdir(parents=True)
    for name in ("run [2]/a b.jsonl", "run [2]/what*/q?.csv"):
        written(name, "text", "a") if name.endswith("csv") else written(name, '{"text": "a"}')
        assert load(name)["text"][:] == ["a"]
    assert load({"path": "json", "data_files": ["run [2]/a b.jsonl"]})["text"][:] == ["a"]
    written("b-1.jsonl", '{"text": "b"}')
    written("b-2.jsonl", '{"text": "c"}')
    assert load({"path": "json", "data_files": "b-*.jsonl"})["text"][:] == ["b", "c"]
    assert "one of [ ] * ? in its name" in load_error("run [2]")


def test_a_cache_that_cannot_be_written_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    written("a.jsonl", '{"text": "a"}')
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", "/proc/hf/datasets")
    monkeypatch.setenv("HF_HOME", "/proc/hf")
    assert "the cache of datasets cannot be written to; found: /proc/hf/datasets (from HF_HOME)" in load_error(
        "a.jsonl"
    )
