"""Datasets: load what a run file names, and refuse rows a trainer would stumble over, with their numbers."""

import glob
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import datasets
import pyarrow as pa
import pyarrow.compute as pc

from raytrl.config.runs.base import Run
from raytrl.config.sections.data import DataSource
from raytrl.errors import DataError
from raytrl.functions import describe_raised, load_function

datasets.config.HF_UPDATE_DOWNLOAD_COUNTS = False  # or it asks the hub for local files too, seconds without a network
datasets.disable_progress_bars()
datasets.logging.set_verbosity(datasets.logging.CRITICAL)  # what it logs as errors it raises too


def load_data(source: DataSource, where: str) -> datasets.Dataset:
    """Loads one split.

    Args:
        source: the section of the run file.
        where: its key, for error messages.

    Raises:
        DataError: file, folder, hub id or split is missing, or a file cannot be parsed (with the line).
    """
    files = [source.data_files] if isinstance(source.data_files, str) else list(source.data_files or [])
    for file in files:
        if "://" not in file and not Path(file).is_file() and not glob.glob(file, recursive=True):
            raise DataError(f"{where}: no such file; found: {file!r} (working directory {Path.cwd()})")
    if files and all(Path(file).is_file() and Path(file).stat().st_size == 0 for file in files):
        raise DataError(f"{where}: the dataset is empty; found: 0 bytes in {_name(source)}")
    try:
        dataset = _load(source)
    except Exception as error:  # the builders raise a dozen kinds; all mean that this source cannot be had
        raise DataError(_cause(error, source, files, where)) from error
    if source.transform is not None:
        transform = load_function(source.transform, f"{where}.transform")
        try:
            dataset = transform(dataset)
        except Exception as error:  # the user's function may raise anything
            raise DataError(f"{where}.transform: {source.transform} raised {describe_raised(error)}") from error
        if not isinstance(dataset, datasets.Dataset):
            raise DataError(f"{where}.transform: returned {type(dataset).__name__}; expected: a datasets.Dataset")
    if len(dataset) == 0:
        raise DataError(f"{where}: the dataset is empty; found: 0 rows in {_name(source)}")
    return dataset


def _load(source: DataSource) -> datasets.Dataset:
    folder = Path(source.path)
    if (folder / "state.json").is_file() or (folder / "dataset_dict.json").is_file():
        saved = datasets.load_from_disk(source.path)
        if isinstance(saved, datasets.Dataset):
            return saved
        if source.split not in saved:
            raise ValueError(f"no such split in {source.path}; expected: one of {', '.join(saved)}")
        return saved[source.split]
    options = {k: v for k, v in source.model_dump().items() if k != "transform" and v is not None}
    return datasets.load_dataset(options.pop("path"), **options)


def _name(source: DataSource) -> str:
    return str(source.data_files or source.path)


def _cause(error: Exception, source: DataSource, files: list[str], where: str) -> str:
    if source.path == "json":
        for file in files:
            if (bad := _bad_json_line(file)) is not None:
                return f"{where}: {file}:{bad[0]}: not a JSON object: {bad[1]}"
    if "corresponds to no data" in str(error):
        return f"{where}: the dataset is empty; found: 0 rows in {_name(source)}"
    if isinstance(error, ValueError) and "split" in str(error).lower():
        return f"{where}.split: found: {source.split!r}; {error}"
    offline = "" if files or Path(source.path).exists() else " (not a local file or folder, and not had from the hub)"
    innermost: BaseException = error
    while innermost.__cause__ is not None:
        innermost = innermost.__cause__
    reason = next(iter(str(innermost).splitlines()), "") or type(innermost).__name__
    return f"{where}: {_name(source)!r} cannot be loaded{offline}: {reason}"


def _bad_json_line(file: str) -> tuple[int, str] | None:
    if not file.endswith(".jsonl") or not Path(file).is_file():
        return None
    with open(file, encoding="utf-8", errors="replace") as lines:
        for number, line in enumerate(lines, 1):
            try:
                if line.strip() and not isinstance(json.loads(line), dict):
                    return number, f"found {line.strip()[:60]!r}"
            except json.JSONDecodeError as error:
                return number, error.msg
    return None


def check_columns(dataset: datasets.Dataset, run: Run, where: str) -> tuple[str, ...]:
    """The columns this kind of run trains on; each has been found without missing values and of the right type.

    Raises:
        DataError: no usable columns (naming those there are), or a row with a missing or mistyped value.
    """
    layouts = run.layouts()
    layout = next((columns for columns in layouts if set(columns) <= set(dataset.column_names)), None)
    if layout is None:
        expected = " | ".join("+".join(columns) for columns in layouts)
        raise DataError(
            f"{where}: no columns that `raytrl {run.kind}` can train on; found: {', '.join(dataset.column_names)}; "
            f"expected: {expected}; rename them with a transform"
        )
    layout = (*(column for column in run.also_taken if column in dataset.column_names), *layout)
    for column in layout:
        _check_column(dataset, column, where)
    if len({_is_conversation(dataset, column) for column in layout}) > 1:
        raise DataError(f"{where}: {', '.join(layout)} must all be strings, or all be lists of messages")
    return layout


def _check_column(dataset: datasets.Dataset, column: str, where: str) -> None:
    values = dataset.data.column(column)
    if dataset._indices is not None:  # a transform may have filtered or shuffled: look at the rows as trained on
        values = dataset.flatten_indices().data.column(column)
    if values.null_count:
        row = pc.index(pc.is_null(values), True).as_py() + 1
        raise DataError(
            f"{where}: row {row}: {column!r} is missing or null ({values.null_count} of {len(dataset)} rows); "
            f"columns: {', '.join(dataset.column_names)}"
        )
    kind = values.type
    if column == "input_ids" and pa.types.is_list(kind) and pa.types.is_integer(kind.value_type):
        return
    if pa.types.is_string(kind) or pa.types.is_large_string(kind):
        return
    if pa.types.is_list(kind) or pa.types.is_large_list(kind):
        empty = pc.equal(pc.list_value_length(values), 0)
        if pc.any(empty).as_py():
            raise DataError(f"{where}: row {pc.index(empty, True).as_py() + 1}: {column!r} has no messages")
        if pa.types.is_struct(kind.value_type):
            fields = {field.name for field in kind.value_type}
            if {"role", "content"} <= fields or {"from", "value"} <= fields:
                return
    # A column of text with a number in it is of no Arrow type: name the number's row.
    row = next((i for i, value in enumerate(dataset[column]) if not isinstance(value, str)), 0)
    value = dataset[row][column]
    raise DataError(
        f"{where}: row {row + 1}: {column!r} is neither text nor a list of messages with role and content; "
        f"found: {type(value).__name__}: {str(value)[:80]!r}"
    )


def _is_conversation(dataset: datasets.Dataset, column: str) -> bool:
    return not isinstance(dataset.features[column], datasets.Value)


def conversation_of(dataset: datasets.Dataset, columns: tuple[str, ...]) -> list[dict[str, Any]] | None:
    """The first row's messages as one conversation, or None where the rows are plain text."""
    if columns == ("input_ids",) or not _is_conversation(dataset, columns[-1]):
        return None
    row = dataset[0]
    messages: list[dict[str, Any]] = []
    for column in columns:
        if column != "rejected":
            messages += row[column]
    names = {"human": "user", "gpt": "assistant", "system": "system"}
    return [{"role": names.get(m["from"], m["from"]), "content": m["value"]} if "from" in m else m for m in messages]


def texts_of(dataset: datasets.Dataset, columns: tuple[str, ...]) -> Iterator[str]:
    """Every string a tokenizer should be trained on."""
    for batch in dataset.select_columns(list(columns)).iter(batch_size=1000):
        for column in columns:
            for value in batch[column]:
                if isinstance(value, str):
                    yield value
                else:
                    yield from (str(m.get("content") or m.get("value") or "") for m in value)
