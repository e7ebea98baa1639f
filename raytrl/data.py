"""Datasets: load what a run file names, and refuse rows a trainer would stumble over, with their numbers."""

import glob
import json
import os
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import datasets
import pyarrow as pa
import pyarrow.compute as pc

from raytrl.config.runs.base import Columns, RowKind, Run
from raytrl.config.sections.data import DataSource
from raytrl.data_files import reader_of
from raytrl.data_json import values_of, without_filled_keys
from raytrl.data_places import folder_of, matches, place_of
from raytrl.errors import DataError
from raytrl.functions import describe_raised, load_function

datasets.config.HF_UPDATE_DOWNLOAD_COUNTS = False  # or it asks the hub for local files too, seconds without a network
datasets.disable_progress_bars()
datasets.logging.set_verbosity(datasets.logging.CRITICAL)  # what it logs as errors it raises too


def load_data(source: DataSource, where: str) -> datasets.Dataset:
    """Loads one split; the same rows in every process, and those that the files hold now.

    Args:
        source: the section of the run file.
        where: its key, for error messages.

    Raises:
        DataError: file, folder, hub id or split is missing, or a file cannot be parsed (with the line).
    """
    files = source.named_files
    places = [place_of(file, source.path, source.data_dir) for file in files]
    for place in places:
        if place is not None and not matches(place):
            raise DataError(f"{where}: no such file; found: {place!r} (working directory {Path.cwd()})")
    if not files and Path(source.path).is_file():
        raise DataError(
            f"{where}: a file whose suffix does not say what is in it; found: {source.path!r}; expected: .jsonl, .json, "
            f".csv, .tsv, .parquet or .txt, or {{path: json, data_files: {source.path}}}"
        )
    if files and all(place and Path(place).is_file() and Path(place).stat().st_size == 0 for place in places):
        raise DataError(f"{where}: the dataset is empty; found: 0 bytes in {_name(source)}")
    try:
        dataset = _load(source)
    except DataError as error:
        raise DataError(f"{where}: {_shortened(str(error), files)}") from error
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
    return without_filled_keys(dataset)


def _load(source: DataSource) -> datasets.Dataset:
    folder = Path(source.path)
    if (folder / "state.json").is_file() or (folder / "dataset_dict.json").is_file():
        saved = datasets.load_from_disk(source.path)
        if isinstance(saved, datasets.Dataset):
            return saved
        if source.split not in saved:
            raise ValueError(f"no such split in {source.path}; expected: one of {', '.join(saved)}")
        return saved[source.split]
    _check_cache()
    for place in (source.path, source.data_dir or ""):
        if glob.has_magic(place) and Path(place).is_dir():
            raise DataError(
                f"found: a folder with one of [ ] * ? in its name, in which datasets looks for a pattern: {place!r}; expected: "
                f"another name, or its files one by one as data_files"
            )
    options = {k: v for k, v in source.model_dump().items() if k not in ("transform", "split") and v is not None}
    if source.named_files:  # a file is a file, whatever its name would mean as a pattern
        places = [(file, place_of(file, source.path, source.data_dir)) for file in source.named_files]
        options["data_files"] = [
            glob.escape(file) if place and Path(place).is_file() else file for file, place in places
        ]
    builder = datasets.load_dataset_builder(options.pop("path"), **options)
    named = builder.config.data_files or {}
    files = [file for group in named.values() for file in group]
    if files and all(Path(file).is_file() for file in files):
        # datasets knows a file by its name and time of modification, which cp -p, rsync -t and tar keep.
        builder = reader_of(builder, files)
    builder.download_and_prepare()
    return builder.as_dataset(split=source.split)


def _check_cache() -> None:
    """Rows are kept there, as Arrow has them, and mapped into memory."""
    place = str(datasets.config.HF_DATASETS_CACHE)
    try:
        os.makedirs(place, exist_ok=True)
        with tempfile.TemporaryFile(dir=place):
            pass
    except OSError as error:
        name = next(
            (name for name in ("HF_DATASETS_CACHE", "HF_HOME", "XDG_CACHE_HOME") if os.environ.get(name)), "HOME"
        )
        raise DataError(
            f"the cache of datasets cannot be written to; found: {place} (from {name}): {error.strerror or error}; expected: "
            f"HF_DATASETS_CACHE or HF_HOME, a folder in which this user may write"
        ) from None


def _shortened(message: str, files: list[str]) -> str:
    """With the files' names as they were written: the builders know absolute ones."""
    for file in files:
        message = message.replace(str(Path(file).absolute()), file).replace(str(Path(file).resolve()), file)
    return message


def _name(source: DataSource) -> str:
    return str(source.data_files or source.path)


def _cause(error: Exception, source: DataSource, files: list[str], where: str) -> str:
    if "corresponds to no data" in str(error):
        return f"{where}: the dataset is empty; found: 0 rows in {_name(source)}"
    if isinstance(error, ValueError) and "split" in str(error).lower():
        return f"{where}.split: found: {source.split!r}; {error}"
    is_here = folder_of(source.path, source.data_dir) is not None or Path(source.path).exists()
    offline = "" if is_here else " (not a local file or folder, and not had from the hub)"
    innermost: BaseException = error
    while innermost.__cause__ is not None:
        innermost = innermost.__cause__
    reason = next(iter(str(innermost).splitlines()), "") or type(innermost).__name__
    if isinstance(innermost, DataError):
        return f"{where}: {_shortened(str(innermost), files)}"
    return f"{where}: {_name(source)!r} cannot be loaded{offline}: {reason}"


@dataclass(frozen=True)
class Taken:
    """Which columns of a dataset a run uses."""

    layout: Columns
    beside: Columns  # go along: tools, margins, masks
    unused: Columns  # never reach the trainer; a reward function may read them
    for_rewards: bool

    @property
    def columns(self) -> Columns:
        return self.layout + self.beside

    def in_words(self) -> str:
        """`prompt, completion; not used: text, id`."""
        others = "for reward functions" if self.for_rewards else "not used"
        return ", ".join(self.columns) + (f"; {others}: {', '.join(self.unused)}" if self.unused else "")


def choose_columns(dataset: datasets.Dataset, run: Run, where: str) -> Taken:
    """Which columns are trained on: those of the first of `run.layouts()` that are all there, and nothing else.

    Raises:
        DataError: no usable columns (naming those there are).
    """
    names = dataset.column_names
    layouts = run.layouts()
    found = next((columns for columns in layouts if set(columns) <= set(names)), None)
    if found is None:
        expected = " | ".join("+".join(columns) for columns in layouts)
        raise DataError(
            f"{where}: no columns that `raytrl {run.kind}` can train on; found: {', '.join(names)}; "
            f"expected: {expected}; rename them with a transform"
        )
    layout = (*(column for column in run.also_taken if column in names and column not in found), *found)
    kind: RowKind = (
        "input_ids" if found == ("input_ids",) else "chat" if not layout or _is_chat(dataset, layout[-1]) else "text"
    )
    beside = tuple(column for column in run.taken_beside(kind) if column in names)
    unused = tuple(column for column in names if column not in (*layout, *beside))
    return Taken(layout, beside, unused, run.gives_columns_to_rewards)


def check_columns(dataset: datasets.Dataset, run: Run, where: str) -> Columns:
    """The layout of `choose_columns`; each has been found without missing values and of the right type.

    Raises:
        DataError: no usable columns (naming those there are), or a row with a missing or mistyped value.
    """
    taken = choose_columns(dataset, run, where)
    if dataset._indices is not None:  # a transform may have filtered or shuffled: look at the rows as trained on
        dataset = dataset.select_columns(list(taken.columns)).flatten_indices()
    for column in taken.layout:
        _check_column(dataset, column, where)
    if len({_is_chat(dataset, column) for column in taken.layout}) > 1:
        raise DataError(f"{where}: {', '.join(taken.layout)} must all be strings, or all be lists of messages")
    for column in taken.beside:
        _check_beside(dataset, column, where)
    return taken.layout


def _check_column(dataset: datasets.Dataset, column: str, where: str) -> None:
    values = dataset.data.column(column)
    _check_present(dataset, column, where)
    kind = values.type
    if column == "input_ids" and is_list(kind) and pa.types.is_integer(kind.value_type):
        empty = pc.equal(pc.list_value_length(values), 0)
        if pc.any(empty).as_py():
            raise DataError(f"{where}: row {pc.index(empty, True).as_py() + 1}: {column!r} has no tokens")
        return
    if pa.types.is_dictionary(kind):
        kind = kind.value_type
    if pa.types.is_string(kind) or pa.types.is_large_string(kind):
        if column in ("messages", "conversations"):
            raise DataError(
                f"{where}: row 1: {column!r} is text, not a list of messages; found: {str(dataset[0][column])[:80]!r}; "
                f"expected: lists of messages; where the text is JSON, read it with json.loads in a transform"
            )
        _check_not_json(dataset, column, where)
        return
    if is_list(kind):
        empty = pc.equal(pc.list_value_length(values), 0)
        if pc.any(empty).as_py():
            raise DataError(f"{where}: row {pc.index(empty, True).as_py() + 1}: {column!r} has no messages")
        if _is_plain_messages(values):
            return
    # What is of no one Arrow type, such as a column of text with a number in it, is looked at row by row.
    texts = 0
    for row, value in enumerate(values_of(values), 1):
        texts += isinstance(value, str)
        if problem := "" if isinstance(value, str) else wrong_messages(value):
            raise DataError(f"{where}: row {row}: {column!r} {problem}")
        if 0 < texts < row:
            raise DataError(f"{where}: row {row}: {column!r} is text in some rows and a list of messages in others")


def _check_present(dataset: datasets.Dataset, column: str, where: str) -> None:
    values = dataset.data.column(column)
    if values.null_count:
        row = pc.index(pc.is_null(values), True).as_py() + 1
        raise DataError(
            f"{where}: row {row}: {column!r} is missing or null ({values.null_count} of {len(dataset)} rows); "
            f"columns: {', '.join(dataset.column_names)}"
        )


def _check_not_json(dataset: datasets.Dataset, column: str, where: str) -> None:
    """Conversations as JSON text would be trained on as text."""
    text = str(dataset[0][column])
    if text.startswith("[{") and text.endswith("}]"):
        try:
            value = json.loads(text)
        except ValueError:
            return
        if not wrong_messages(value):
            raise DataError(
                f"{where}: row 1: {column!r} is a list of messages written as JSON text; found: {text[:80]!r}; "
                f"expected: lists of messages: read them with json.loads in a transform"
            )


def _is_plain_messages(values: pa.ChunkedArray) -> bool:
    """Whether each message is found to have a role and text without looking at them one by one."""
    if not pa.types.is_struct(values.type.value_type):
        return False
    items = pc.list_flatten(values)
    names = items.type.names
    fields = ("role", "content") if "role" in names else ("from", "value")
    if not set(fields) <= set(names) or items.null_count:
        return False
    columns = [pc.struct_field(items, name) for name in fields]
    return all(pa.types.is_string(c.type) or pa.types.is_large_string(c.type) for c in columns) and not any(
        c.null_count for c in columns
    )


def wrong_messages(value: Any) -> str:
    """What is wrong with a list of messages, or ""."""
    neither = f"is neither text nor a list of messages with role and content; found: {type(value).__name__}: {str(value)[:80]!r}"
    if not isinstance(value, list) or not all(isinstance(message, dict) for message in value):
        return neither
    if not value:
        return "has no messages"
    for number, message in enumerate(value, 1):
        role, text = ("from", "value") if "from" in message else ("role", "content")
        if not isinstance(message.get(role), str):
            return neither
        content = message.get(text)
        if isinstance(content, str):
            continue
        if isinstance(content, list):
            kinds = {part.get("type") if isinstance(part, dict) else type(part).__name__ for part in content}
            return f"has a message whose content is not all text, message {number}; found: parts {kinds}; expected: a string"
        if content is None and any(message.get(key) for key in _INSTEAD_OF_CONTENT):
            continue
        if set(message) == {role}:
            return neither
        return (
            f"has a message without text, message {number}; found: {str(message)[:80]!r}; expected: a string as {text}"
        )
    return ""


_INSTEAD_OF_CONTENT = ("tool_calls", "thinking", "reasoning_content", "function_call")


def _check_beside(dataset: datasets.Dataset, column: str, where: str) -> None:
    """Masks and labels as long as their row, margins that are numbers, template arguments that are there."""
    values = dataset.data.column(column)
    if column == "tools":
        return  # a row may have none
    _check_present(dataset, column, where)
    if column == "margin" and not (pa.types.is_integer(values.type) or pa.types.is_floating(values.type)):
        raise DataError(
            f"{where}: {column!r} is no number; found: {values.type}; expected: numbers, or another name for it"
        )
    if column in ("labels", "completion_mask", "assistant_masks"):
        same = is_list(values.type) and pc.equal(
            pc.list_value_length(values), pc.list_value_length(dataset.data.column("input_ids"))
        )
        if same is False or not pc.all(same).as_py():
            row = 1 if same is False else pc.index(same, False).as_py() + 1
            raise DataError(
                f"{where}: row {row}: {column!r} is not as long as 'input_ids'; expected: a number for each token"
            )


def is_list(kind: pa.DataType) -> bool:
    return bool(pa.types.is_list(kind) or pa.types.is_large_list(kind))


def _is_chat(dataset: datasets.Dataset, column: str) -> bool:
    return not isinstance(dataset.features[column], datasets.Value)


def conversation_of(dataset: datasets.Dataset, columns: tuple[str, ...]) -> list[dict[str, Any]] | None:
    """The first row's messages as one conversation, or None where the rows are plain text."""
    if columns == ("input_ids",) or not _is_chat(dataset, columns[-1]):
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
