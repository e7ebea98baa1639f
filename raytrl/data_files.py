"""Files of rows, read as what they hold: builders of `datasets` that guess no dates, add no keys, and name the line."""

import codecs
import dataclasses
import gzip
import io
import lzma
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import datasets
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.csv
import pyarrow.json
import xxhash
from datasets.builder import Key
from datasets.packaged_modules.csv.csv import CsvConfig
from datasets.packaged_modules.json.json import JsonConfig
from datasets.packaged_modules.parquet.parquet import Parquet

from raytrl.data_json import Kinds, dumps, not_utf8, rows_of, table_of
from raytrl.errors import DataError

READERS_VERSION = "1"  # goes up when the same bytes become other rows: what was read before is then read anew
_CHUNK = 8 << 20
_UTF16 = {codecs.BOM_UTF16_LE: "utf-16", codecs.BOM_UTF16_BE: "utf-16"}


def digest_of(files: list[str]) -> str:
    """What all these files hold, as one short word: gigabytes a second, as fast as a disk reads."""
    digest = xxhash.xxh3_128(READERS_VERSION.encode())
    for file in files:
        digest.update(f"{Path(file).stat().st_size} ".encode())
        with open(file, "rb") as stream:
            while block := stream.read(_CHUNK):
                digest.update(block)
    return digest.hexdigest()


def _opened(file: str) -> Any:
    suffix = Path(file).suffix.lower()
    if suffix == ".gz":
        return gzip.open(file)
    if suffix == ".xz":
        return lzma.open(file)
    return pa.input_stream(file, compression="detect")


def chunks(file: str, encoding: str = "utf-8") -> Iterator[bytes]:
    """Its bytes as UTF-8 without a byte order mark, whole lines at a time.

    Raises:
        DataError: it is of another encoding (UTF-16 is told by its byte order mark), or its compression is broken.
    """
    decoder = None if codecs.lookup(encoding).name == "utf-8" else codecs.getincrementaldecoder(encoding)()
    rest, is_first = b"", True
    try:
        with _opened(file) as stream:
            while block := stream.read(_CHUNK):
                if is_first and decoder is None:
                    if block[:2] in _UTF16:
                        raise DataError(
                            f"{file}: found: UTF-16 text; expected: UTF-8; save it as UTF-8, or name its encoding: "
                            f"{{path: ..., data_files: {file}, encoding: utf-16}}"
                        )
                    block = block.removeprefix(codecs.BOM_UTF8)
                is_first = False
                if decoder is not None:
                    block = decoder.decode(block).removeprefix("\ufeff").encode()
                whole, newline, tail = block.rpartition(b"\n")
                if newline:
                    yield rest + whole + newline
                    rest = tail
                else:
                    rest += block
    except (EOFError, gzip.BadGzipFile, lzma.LZMAError, OSError, UnicodeError) as error:
        raise DataError(f"{file}: cannot be read: {error}") from error
    if rest.strip():
        yield rest


class JsonRows(datasets.ArrowBasedBuilder):  # type: ignore[misc]  # datasets is untyped
    """JSON lines, or an array in JSON.

    A plain file is parsed by Arrow. Where Arrow would change something (a date in a string, a key that only some messages
    have, numbers of two kinds in one place), Python parses it, and what is not of one type is kept as JSON.
    """

    BUILDER_CONFIG_CLASS = JsonConfig

    def _info(self) -> datasets.DatasetInfo:
        return datasets.DatasetInfo(features=None)

    def _split_generators(self, _: Any) -> list[datasets.SplitGenerator]:
        self._encoding = str(self.config.encoding or "utf-8")
        every = [file for files in self.config.data_files.values() for file in files]
        self._schema = _arrow_schema(chunk for file in every for chunk in self._chunks(file))
        self._kinds = None
        if self._schema is None:
            self._kinds = Kinds()
            for file in every:
                for _number, row in self._rows(file):
                    self._kinds.add(row)
            self.info.features = self._kinds.features()
        else:
            self.info.features = datasets.Features.from_arrow_schema(self._schema)
        if not self.info.features:
            raise DataError("the dataset is empty; found: 0 rows")
        return [
            datasets.SplitGenerator(name=split, gen_kwargs={"files": list(files)})
            for split, files in self.config.data_files.items()
        ]

    def _generate_tables(self, files: list[str]) -> Iterator[tuple[Key, pa.Table]]:
        for place, file in enumerate(files):
            if self._kinds is None:
                tables: Iterator[pa.Table] = (_parsed(chunk, self._schema) for chunk in self._chunks(file))
            else:
                tables = self._python_tables(file)
            for number, table in enumerate(tables):
                yield Key(place, number), table

    def _python_tables(self, file: str) -> Iterator[pa.Table]:
        rows: list[dict[str, Any]] = []
        for _, row in self._rows(file):
            rows.append(row)
            if len(rows) == 10_000:
                yield table_of(rows, self.info.features)
                rows = []
        if rows:
            yield table_of(rows, self.info.features)

    def _chunks(self, file: str) -> Iterator[bytes]:
        whole = chunks(file, self._encoding)
        first = next(whole, b"")
        if self.config.field is None and not first.lstrip().startswith(b"["):
            yield first
            yield from whole
        else:
            yield "".join(dumps(row) + "\n" for _, row in self._rows(file)).encode("utf-8", "surrogatepass")

    def _rows(self, file: str) -> Iterator[tuple[int, dict[str, Any]]]:
        return rows_of(file, chunks(file, self._encoding), self.config.field)


_NO_OBJECT = re.compile(rb"^[ \t\r]*[^{ \t\r\n]", re.MULTILINE)


def _arrow_schema(every: Iterator[bytes]) -> pa.Schema | None:
    """The schema of all chunks where Arrow reads them without changing anything, or None."""
    schemas = []
    for chunk in every:
        if _NO_OBJECT.search(chunk):  # Arrow takes null for a row, and null alone crashes it
            return None
        if chunk.strip():
            try:
                table = _parsed(chunk, None)
                table.validate(full=True)  # or text that is no UTF-8 is found when it is trained on
            except pa.ArrowInvalid:
                return None
            if not all(_is_exact(column) for column in table.columns):
                return None
            schemas.append(table.schema)
    try:
        found = pa.unify_schemas([pa.schema([_as_text(field) for field in schema]) for schema in schemas])
    except (pa.ArrowInvalid, pa.ArrowTypeError):  # another type in a later chunk
        return None
    return found


def _parsed(chunk: bytes, schema: pa.Schema | None) -> pa.Table:
    if not chunk.strip():
        return (schema or pa.schema([])).empty_table()
    options = pyarrow.json.ParseOptions(explicit_schema=schema) if schema is not None else None
    block = max(1 << 20, len(chunk) // 4)
    table = pyarrow.json.read_json(
        io.BytesIO(chunk), read_options=pyarrow.json.ReadOptions(block_size=block), parse_options=options
    )
    return table if schema is None else table.select(schema.names)


def _as_text(field: pa.Field) -> pa.Field:
    return pa.field(field.name, pa.string()) if pa.types.is_timestamp(field.type) else field


def _is_exact(column: pa.ChunkedArray) -> bool:
    """Whether Arrow's reading of JSON is the very values: no null for a key that is not there, no number changed."""
    kind = column.type
    if pa.types.is_floating(kind):  # whole numbers among them, too large for it
        return not pc.any(pc.greater_equal(pc.abs(column), 2.0**53)).as_py()
    if not pa.types.is_nested(kind):
        return True
    if not pa.types.is_list(kind):
        return False
    inner = kind.value_type
    if pa.types.is_struct(inner):
        items = pc.list_flatten(column)
        fields = [pc.struct_field(items, [i]) for i in range(inner.num_fields)]
        return items.null_count == 0 and all(f.type == pa.string() and f.null_count == 0 for f in fields)
    return bool(pa.types.is_string(inner) or pa.types.is_integer(inner))


_WHOLE_NUMBERS = r"^(0|-?[1-9][0-9]{0,17})$"
_FRACTIONS = r"^(0|-?[1-9][0-9]{0,14}|-?(0|[1-9][0-9]{0,14})\.[0-9]{0,14}[1-9])$"
_ONE_DECIMAL = r"^-?(0|[1-9][0-9]{0,14})\.0$"


class CsvRows(datasets.ArrowBasedBuilder):  # type: ignore[misc]
    """CSV, TSV: columns are text as it stands, or numbers where that changes no digit."""

    BUILDER_CONFIG_CLASS = CsvConfig

    def _info(self) -> datasets.DatasetInfo:
        return datasets.DatasetInfo(features=None)

    @property
    def _encoding(self) -> str:
        return str(self.config.encoding or "utf-8")

    def _split_generators(self, _: Any) -> list[datasets.SplitGenerator]:
        kinds: dict[str, pa.DataType | None] = {}
        for files in self.config.data_files.values():
            for file in files:
                for table in self._tables(file):
                    for name in table.column_names:
                        kinds[name] = _narrowed(kinds.get(name), table.column(name))
        if not kinds:
            raise DataError("the dataset is empty; found: 0 rows")
        self._schema = pa.schema([(name, kind or pa.string()) for name, kind in kinds.items()])
        self.info.features = datasets.Features.from_arrow_schema(self._schema)
        return [
            datasets.SplitGenerator(name=split, gen_kwargs={"files": list(files)})
            for split, files in self.config.data_files.items()
        ]

    def _generate_tables(self, files: list[str]) -> Iterator[tuple[Key, pa.Table]]:
        for place, file in enumerate(files):
            for number, table in enumerate(self._tables(file)):
                missing = [name for name in self._schema.names if name not in table.column_names]
                for name in missing:
                    table = table.append_column(name, pa.nulls(len(table), pa.string()))
                yield Key(place, number), table.select(self._schema.names).cast(self._schema)

    def _tables(self, file: str) -> Iterator[pa.Table]:
        """All columns as text. Raises DataError: no CSV, or two columns of one name."""
        lines = _Lines(chunks(file, self._encoding))
        parse = pyarrow.csv.ParseOptions(
            delimiter=self.config.sep, quote_char=self.config.quotechar, newlines_in_values=True
        )
        read = pyarrow.csv.ReadOptions(block_size=_CHUNK, use_threads=False)
        try:
            names = self._names(file, parse)
            text = pyarrow.csv.ConvertOptions(
                column_types=dict.fromkeys(names, pa.string()),
                null_values=[""],
                strings_can_be_null=True,
                quoted_strings_can_be_null=False,
            )
            with pyarrow.csv.open_csv(lines, read, parse, text) as reader:
                for batch in reader:
                    yield pa.Table.from_batches([batch])
        except pa.ArrowInvalid as error:
            raise DataError(self._why(file, error)) from error

    def _names(self, file: str, parse: pyarrow.csv.ParseOptions) -> list[str]:
        read = pyarrow.csv.ReadOptions(block_size=_CHUNK, use_threads=False)
        with pyarrow.csv.open_csv(_Lines(chunks(file, self._encoding)), read, parse) as reader:
            names = list(reader.schema.names)
        if twice := next((name for name in names if names.count(name) > 1), None):
            raise DataError(f"{file}: two columns have one name; found: {twice!r} twice; expected: different names")
        return names

    def _why(self, file: str, error: Exception) -> str:
        if str(error) == "Empty CSV file":
            return f"the dataset is empty; found: 0 rows in {file}"
        for number, line in enumerate(_lines(chunks(file, self._encoding)), 1):
            try:
                line.decode()
            except UnicodeDecodeError as wrong:
                return f"{file}:{number}: {not_utf8(line, wrong)}"
        return f"{file}: not a table of comma-separated values: {error}"


class _Lines(io.RawIOBase):
    """An iterator of bytes as the file that Arrow's reader wants."""

    def __init__(self, blocks: Iterator[bytes]) -> None:
        super().__init__()
        self._blocks, self._rest = blocks, b""

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        if not self._rest:
            self._rest = next(self._blocks, b"")
        count = min(len(buffer), len(self._rest))
        buffer[:count], self._rest = self._rest[:count], self._rest[count:]
        return count


def _lines(blocks: Iterator[bytes]) -> Iterator[bytes]:
    for block in blocks:
        yield from block.removesuffix(b"\n").split(b"\n")


def _narrowed(before: pa.DataType | None, column: pa.ChunkedArray) -> pa.DataType | None:
    """int64, float64 or string, whatever holds these values and those before them; None: there are none yet."""
    if column.null_count == len(column) or before == pa.string():
        return before
    if before != pa.float64() and _all_match(column, _WHOLE_NUMBERS):
        return pa.int64()
    is_number = _all_match(column, f"{_FRACTIONS}|{_ONE_DECIMAL}")
    return pa.float64() if is_number else pa.string()


def _all_match(column: pa.ChunkedArray, pattern: str) -> bool:
    return bool(pc.all(pc.match_substring_regex(column, pattern)).as_py())


class ParquetRows(Parquet):  # type: ignore[misc]
    """Parquet, with string views as the strings that they are."""

    def _split_generators(self, manager: Any) -> Any:
        splits = super()._split_generators(manager)
        plain = {
            name: datasets.Value("string") if feature == datasets.Value("string_view") else feature
            for name, feature in self.info.features.items()
        }
        self.info.features = datasets.Features(plain)
        return splits


def reader_of(builder: Any, files: list[str]) -> Any:
    """The builder for these local files: ours where we have one, and in any case one that knows files by what they hold.

    Args:
        builder: that `datasets` made for them.
    """
    package = type(builder).__module__.rpartition(".")[2]
    config = {f.name: getattr(builder.config, f.name) for f in dataclasses.fields(builder.config)}
    defaults = type(builder.config)()
    odd = {name for name, value in config.items() if value != getattr(defaults, name)} - _OF_EVERY_BUILDER
    kind: Any = type(builder)
    is_plain = not any(re.search(r"\.(zip|tar|tgz|7z|rar)(\.\w+)?$", file.lower()) for file in files)
    if package in _READERS and is_plain and odd <= _READERS[package][1]:
        kind = _READERS[package][0]
    own = {name: value for name, value in config.items() if name not in ("name", "version", "description", "data_dir")}
    return kind(dataset_name=package, config_name=builder.config.name, hash=digest_of(files), **own)


_OF_EVERY_BUILDER = {"name", "version", "description", "data_files", "data_dir"}
# By the builder of `datasets`, with the options of it that ours takes; with others it is left to read the files itself.
_READERS: dict[str, tuple[Any, set[str]]] = {
    "json": (JsonRows, {"encoding", "field", "chunksize", "block_size", "use_threads"}),
    "csv": (CsvRows, {"sep", "delimiter", "quotechar", "encoding"}),
    "parquet": (ParquetRows, {"batch_size", "columns"}),
}
