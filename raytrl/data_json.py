"""Rows of JSON in Python: where Arrow's reader would change values, and where a line is to be named."""

import functools
import json
from collections.abc import Iterator
from typing import Any

import datasets
import datasets.features.features
import pyarrow as pa
import pyarrow.compute as pc

from raytrl.errors import DataError

dumps = functools.partial(json.dumps, ensure_ascii=False)
# datasets keeps JSON as text, and reads it with pandas' parser: one number of fifty comes out as its neighbour (59.9139 as
# 59.91390000000001), and one of 20 digits is an error.
datasets.features.features.ujson_loads = json.loads
datasets.features.features.ujson_dumps = dumps


class Kinds:
    """What kinds of values each column holds."""

    def __init__(self) -> None:
        self._of: dict[str, set[str]] = {}

    def add(self, row: dict[str, Any]) -> None:
        for name, value in row.items():
            kinds = self._of.setdefault(name, set())
            if value is not None:
                kinds.add(_kind(value))

    def features(self) -> datasets.Features:
        return datasets.Features({name: _feature(kinds) for name, kinds in self._of.items()})


def _kind(value: Any) -> str:
    if isinstance(value, list):
        inner = {_kind(item) for item in value}
        return f"list of {inner.pop()}" if len(inner) == 1 else "list of any" if inner else "list"
    if isinstance(value, int) and not isinstance(value, bool) and not -(2**63) <= value < 2**63:
        return "any"
    return type(value).__name__


_FEATURES = {"str": "string", "bool": "bool", "int": "int64", "float": "float64"}


def _feature(kinds: set[str]) -> Any:
    if not kinds:
        return datasets.Value("null")
    if kinds == {"int", "float"}:
        return datasets.Value("float64")
    if len(kinds) == 1 and (kind := next(iter(kinds))) in _FEATURES:
        return datasets.Value(_FEATURES[kind])
    if all(kind.startswith("list") for kind in kinds):
        inner = {kind.removeprefix("list of ") for kind in kinds} - {"list"} or {"str"}
        if inner == {"dict"}:
            return datasets.List(datasets.Json())
        if len(inner) == 1 and (kind := next(iter(inner))) in _FEATURES:
            return datasets.List(datasets.Value(_FEATURES[kind]))
    return datasets.Json()


def table_of(rows: list[dict[str, Any]], features: datasets.Features) -> pa.Table:
    """Rows as a table; what is of no one type as JSON text."""
    columns = {name: [row.get(name) for row in rows] for name in features}
    return pa.table({name: column_of(columns[name], feature) for name, feature in features.items()})


def column_of(values: list[Any], feature: Any) -> pa.Array:
    """A column of a table."""
    if feature == datasets.List(datasets.Json()):
        offsets, texts = [0], list[str]()
        for value in values:
            texts += [dumps(with_text(item)) for item in value or ()]
            offsets.append(len(texts))
        items = pa.ExtensionArray.from_storage(pa.json_(), pa.array(texts, pa.string()))
        gone = pa.array([value is None for value in values])
        return pa.ListArray.from_arrays(pa.array(offsets, pa.int32()), items, mask=gone)
    if feature == datasets.Json():
        texts = [None if value is None else dumps(value) for value in values]  # type: ignore[misc]
        return pa.ExtensionArray.from_storage(pa.json_(), pa.array(texts, pa.string()))
    return pa.array(
        values, feature.pa_type if isinstance(feature, datasets.Value) else pa.list_(feature.feature.pa_type)
    )


def values_of(column: pa.ChunkedArray) -> Iterator[Any]:
    """The values of a column; quicker than `datasets` decodes JSON."""
    for chunk in column.chunks:
        for start in range(0, len(chunk), 10_000):
            part = chunk.slice(start, 10_000)
            kind = part.type
            if kind == pa.json_():
                yield from (None if text is None else json.loads(text) for text in part.storage.to_pylist())
            elif pa.types.is_list(kind) and kind.value_type == pa.json_():
                items = json.loads(f"[{','.join(part.flatten().storage.to_pylist())}]")  # at once: half the time
                lengths, place = pc.list_value_length(part).to_pylist(), 0
                for length in lengths:
                    yield None if length is None else items[place : place + length]
                    place += length or 0
            else:
                yield from part.to_pylist()


def with_text(message: Any) -> Any:
    """A message with its content as one string, where it came in parts that are all text."""
    parts = message.get("content") if isinstance(message, dict) and "role" in message else None
    if isinstance(parts, list) and parts and all(_is_text(part) for part in parts):
        return message | {"content": "".join(part["text"] for part in parts)}
    return message


def _is_text(part: Any) -> bool:
    return isinstance(part, dict) and part.get("type") == "text" and isinstance(part.get("text"), str)


def rows_of(file: str, blocks: Iterator[bytes], field: str | None) -> Iterator[tuple[int, dict[str, Any]]]:
    """Each row with its line, or its place in an array.

    Raises:
        DataError: not rows of JSON, with the line.
    """
    first = next(blocks, b"")
    if field is not None or first.lstrip().startswith(b"["):
        yield from _array(file, b"".join([first, *blocks]), field)
        return
    number = 0
    block: bytes | None = first
    while block is not None:
        for line in block.removesuffix(b"\n").split(b"\n"):
            number += 1
            if line.strip():
                try:
                    yield number, _object(line.decode())
                except UnicodeDecodeError as error:
                    raise DataError(f"{file}:{number}: {not_utf8(line, error)}") from error
                except ValueError as error:
                    why = _no_lines(file, first, blocks) if number == 1 else None
                    raise DataError(why or f"{file}:{number}: not a JSON object: {error}") from error
        block = next(blocks, None)


def _object(line: str) -> dict[str, Any]:
    """Raises ValueError: it is not one."""
    try:
        row = json.loads(line)
    except json.JSONDecodeError as error:
        if error.msg == "Extra data" and line[error.pos :].strip() == ",":
            raise ValueError("found: a comma behind it; expected: lines of JSON without, or an array in [ ]") from None
        raise ValueError(error.msg) from None
    except RecursionError:
        raise ValueError("found: lists in lists without end") from None
    if not isinstance(row, dict):
        raise ValueError(f"found {line.strip()[:60]!r}")
    if "\\ud" in line or "\\uD" in line:
        _check_surrogates(row)
    return row


def _check_surrogates(row: Any) -> None:
    try:
        dumps(row).encode()
    except UnicodeEncodeError as error:
        half = f"\\u{ord(str(error.object)[error.start]):04x}"
        raise ValueError(f"found: half a surrogate pair, {half}, which is no character") from None


def not_utf8(line: bytes, error: UnicodeDecodeError) -> str:
    """What is wrong with a line that is no UTF-8."""
    return (
        f"not UTF-8 text; found: byte 0x{line[error.start]:02x} after {line[: error.start].decode()[-30:]!r}; "
        f"expected: a file in UTF-8, or its encoding named: {{path: ..., data_files: ..., encoding: latin-1}}"
    )


def _array(file: str, content: bytes, field: str | None) -> Iterator[tuple[int, dict[str, Any]]]:
    try:
        rows = json.loads(content.decode())
    except ValueError as error:
        raise DataError(f"{file}: not JSON: {error}") from error
    if field is not None:
        if not isinstance(rows, dict) or field not in rows:
            raise DataError(f"{file}: no such field; found: {field!r}; expected: a key of the object in the file")
        rows = rows[field]
    if not isinstance(rows, list):
        raise DataError(f"{file}: not a list of rows; found: {type(rows).__name__}; expected: a list of objects")
    for number, row in enumerate(rows, 1):
        row = {"text": row} if isinstance(row, str) else row
        if not isinstance(row, dict):
            raise DataError(f"{file}: row {number}: not a JSON object; found: {dumps(row)[:60]!r}")
        try:
            _check_surrogates(row)
        except ValueError as error:
            raise DataError(f"{file}: row {number}: {error}") from error
        yield number, row


def _no_lines(file: str, first: bytes, blocks: Iterator[bytes]) -> str | None:
    """What to do about a file that is one object over many lines; None: it is not."""
    if b"\n" not in first.strip():
        return None
    try:
        whole = json.loads(b"".join([first, *blocks]))
    except ValueError:
        return None
    if not isinstance(whole, dict):
        return None
    lists = [key for key, value in whole.items() if isinstance(value, list)]
    hint = f", such as field: {lists[0]}" if lists else ""
    return (
        f"{file}: one JSON object, not rows; found: keys {', '.join(whole)}; expected: an object a line, a list of objects, "
        f"or the key that holds the rows as `field`{hint}"
    )


def without_filled_keys(dataset: datasets.Dataset) -> datasets.Dataset:
    """Objects to which Arrow gave the keys of all others, as null, without those keys; and messages' parts as one text.

    Templates ask whether a key is there. A null that was written looks the same in Arrow, and goes too.
    """
    changed = [name for name in dataset.column_names if _is_changed_by_arrow(dataset.data.column(name))]
    if not changed:
        return dataset
    if dataset._indices is not None:
        dataset = dataset.flatten_indices()
    table, features = dataset.data.table, dict(dataset.features)
    for name in changed:
        column = table.column(name)
        is_list = pa.types.is_list(column.type) or pa.types.is_large_list(column.type)
        features[name] = datasets.List(datasets.Json()) if is_list else datasets.Json()
        parts = [column_of(_without_nulls(chunk.to_pylist(), keep=True), features[name]) for chunk in column.chunks]
        table = table.set_column(table.schema.get_field_index(name), name, pa.chunked_array(parts))
    schema = datasets.Features(features).arrow_schema
    return datasets.Dataset(
        datasets.table.InMemoryTable(table.replace_schema_metadata(schema.metadata)),
        fingerprint=f"{dataset._fingerprint}-keys",
    )


def _is_changed_by_arrow(column: pa.ChunkedArray) -> bool:
    kind = column.type
    if pa.types.is_list(kind) or pa.types.is_large_list(kind):
        kind = kind.value_type
    if not pa.types.is_struct(kind) or not _is_json(kind):
        return False
    is_in_parts = (
        "role" in kind.names and "content" in kind.names and not pa.types.is_string(kind.field("content").type)
    )
    return is_in_parts or any(_has_null_fields(chunk) for chunk in column.chunks)


def _is_json(kind: pa.DataType) -> bool:
    if pa.types.is_struct(kind):
        return all(_is_json(field.type) for field in kind)
    if pa.types.is_list(kind) or pa.types.is_large_list(kind):
        return _is_json(kind.value_type)
    is_scalar = (
        pa.types.is_string,
        pa.types.is_large_string,
        pa.types.is_boolean,
        pa.types.is_integer,
        pa.types.is_floating,
    )
    return pa.types.is_null(kind) or any(check(kind) for check in is_scalar)


def _has_null_fields(values: pa.Array) -> bool:
    if pa.types.is_list(values.type) or pa.types.is_large_list(values.type):
        return _has_null_fields(values.flatten())
    if not pa.types.is_struct(values.type):
        return False
    fields = values.drop_null().flatten()
    return any(field.null_count or _has_null_fields(field) for field in fields)


def _without_nulls(value: Any, keep: bool = False) -> Any:
    """`keep`: nulls of this list itself."""
    if isinstance(value, dict):
        return {key: _without_nulls(inner) for key, inner in value.items() if inner is not None}
    if isinstance(value, list):
        return [_without_nulls(item) for item in value if keep or item is not None]
    return value
