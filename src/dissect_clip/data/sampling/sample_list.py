"""Files that list samples: Parquet, csv, tsv (with a header) or text, with ``sample_id``, or ``shard`` and ``key``.

A list is read as data: nothing in it is ever run or unpickled. It is read in batches of rows.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.csv
import pyarrow.parquet as pq

from dissect_clip.errors import SetupError

ID, SHARD, KEY = "sample_id", "shard", "key"

MAX_SHOWN = 80
"""Characters of a list's content in a message."""

_FORMATS = ".parquet, .csv, .tsv (with a header) and .txt"
_ROWS = 1 << 20
"""Rows that are read at a time."""


def read_columns(path: str) -> list[str]:
    """Names of a list's columns; a text file has those of its first line.

    Raises:
        SetupError: the file is missing or empty, or its name does not tell its format.
        pa.ArrowException, OSError: it cannot be read.
    """
    suffix = _suffix(path)
    names: list[str]
    if suffix == ".parquet":
        names = pq.read_schema(path).names
        return names
    if suffix == ".txt":
        first = next((line for batch in _lines(path) for line in batch.to_pylist() if line), None)
        return [SHARD, KEY] if first is not None and re.search(r"\s", first) else [ID]
    with pyarrow.csv.open_csv(path, parse_options=_csv_options(suffix)) as reader:
        names = reader.schema.names
        return names


def read_batches(path: str, columns: list[str]) -> Iterator[pa.RecordBatch]:
    """The rows in batches, with these columns: numbers as int64, names as strings, none of them null.

    Raises:
        SetupError: a column holds something else.
        pa.ArrowException, OSError, UnicodeDecodeError: it cannot be read.
    """
    suffix = _suffix(path)
    read = {".parquet": _parquet_batches, ".txt": _text_batches}.get(suffix, _csv_batches)
    for batch in read(path, columns):
        cast = []
        for name in columns:
            column = batch.column(batch.schema.get_field_index(name))
            if name == ID and not pa.types.is_integer(column.type):
                raise SetupError(f"its column {ID} holds {column.type}, not whole numbers")
            if name != ID and not _is_text(column.type):
                raise SetupError(f"its column {name} holds {column.type}, not text")
            if column.null_count:
                raise SetupError(f"its column {name} has {column.null_count} or more rows without a value")
            cast.append(column.cast(pa.int64() if name == ID else pa.large_string()))
        yield pa.RecordBatch.from_arrays(cast, names=columns)


def _suffix(path: str) -> str:
    suffix = os.path.splitext(path)[1].lower()
    if suffix not in (".parquet", ".csv", ".tsv", ".txt"):
        raise SetupError(f"its name does not tell its format: lists may be {_FORMATS}")
    if not os.path.isfile(path):
        raise SetupError("there is no such file")
    if os.path.getsize(path) == 0:
        raise SetupError("it is empty")
    return suffix


def _csv_options(suffix: str) -> Any:
    return pyarrow.csv.ParseOptions(delimiter="\t" if suffix == ".tsv" else ",", newlines_in_values=True)


def _is_text(kind: pa.DataType) -> bool:
    kind = kind.value_type if pa.types.is_dictionary(kind) else kind
    return bool(pa.types.is_string(kind) or pa.types.is_large_string(kind))


def _parquet_batches(path: str, columns: list[str]) -> Iterator[pa.RecordBatch]:
    # One thread here and below: loader workers are forked later.
    with pq.ParquetFile(path, pre_buffer=False) as file:
        yield from file.iter_batches(batch_size=_ROWS, columns=columns, use_threads=False)


def _csv_batches(path: str, columns: list[str]) -> Iterator[pa.RecordBatch]:
    kinds = {name: pa.int64() if name == ID else pa.string() for name in columns}
    with pyarrow.csv.open_csv(
        path,
        read_options=pyarrow.csv.ReadOptions(use_threads=False),
        parse_options=_csv_options(_suffix(path)),
        convert_options=pyarrow.csv.ConvertOptions(include_columns=columns, column_types=kinds),
    ) as reader:
        yield from reader


def _lines(path: str) -> Iterator[pa.Array]:
    """The lines of a text file, without spaces around them."""
    with pyarrow.csv.open_csv(
        path,
        read_options=pyarrow.csv.ReadOptions(use_threads=False, column_names=["line"]),
        # No line holds the delimiter, so that a line is a value.
        parse_options=pyarrow.csv.ParseOptions(delimiter="\x1f", quote_char=False, ignore_empty_lines=True),
        convert_options=pyarrow.csv.ConvertOptions(column_types={"line": pa.string()}),
    ) as reader:
        for batch in reader:
            yield pc.utf8_trim_whitespace(batch.column(0))


def _text_batches(path: str, columns: list[str]) -> Iterator[pa.RecordBatch]:
    pattern = r"^[0-9]{1,18}$" if columns == [ID] else r"^\S+\s+\S"
    form = f"a {ID}" if columns == [ID] else f"a {SHARD} and a {KEY}"
    for lines in _lines(path):
        lines = lines.filter(pc.not_equal(lines, ""))
        is_of_form = pc.match_substring_regex(lines, pattern)
        if not pc.all(is_of_form, min_count=0).as_py():
            odd = lines.filter(pc.invert(is_of_form))[0].as_py()
            raise SetupError(f"its first line is {form}, and this line is not: {odd[:MAX_SHOWN]!r}")
        if columns == [ID]:
            yield pa.RecordBatch.from_arrays([lines.cast(pa.int64())], names=columns)
        else:
            parts = pc.extract_regex(lines, r"^(?P<shard>\S+)\s+(?P<key>.*)$")
            yield pa.RecordBatch.from_arrays([parts.field(SHARD), parts.field(KEY)], names=columns)
