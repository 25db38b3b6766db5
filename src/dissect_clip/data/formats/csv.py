"""Tables of image paths and captions: csv and tsv files, with OpenCLIP's columns. The id of a pair is its row."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
import pyarrow
import pyarrow.compute
import pyarrow.csv

from dissect_clip.config.settings import Config
from dissect_clip.data.evaluation.stream import RetrievalData
from dissect_clip.data.formats.decode import RawSample, read_file
from dissect_clip.data.formats.table import table_retrieval, table_train
from dissect_clip.data.loaders import Tokenizer, Transform
from dissect_clip.data.skips import printable
from dissect_clip.data.train_data import TrainData
from dissect_clip.distributed.world import World
from dissect_clip.errors import SetupError

_TAIL = 4096
_SHOWN = 40
_QUOTED = 'its value: a value that begins with a quote is to be written in quotes, its own doubled, as """so"" it goes"'
_LONG_ROW = f"a row has more than 1 MiB, as if a quote is not closed and the rows after it are part of {_QUOTED}"


def _separator(config: Config) -> str:
    text = config.data.csv_separator.replace("\\t", "\t")
    if len(text) != 1:
        raise SetupError(f"--csv-separator {config.data.csv_separator!r} should be one character, as , or \\t")
    return text


def _read(path: str, separator: str, columns: list[str]) -> Any:
    binary = {column: pyarrow.large_binary() for column in columns}
    return pyarrow.csv.read_csv(
        path,
        # One thread: loader workers are forked later.
        read_options=pyarrow.csv.ReadOptions(use_threads=False),
        parse_options=pyarrow.csv.ParseOptions(delimiter=separator, newlines_in_values=True),
        # As bytes: words like NA stay captions, and a caption that is not UTF-8 is a matter of its row alone.
        convert_options=pyarrow.csv.ConvertOptions(include_columns=columns, column_types=binary),
    )


def _header(path: str, separator: str) -> list[str]:
    options = pyarrow.csv.ParseOptions(delimiter=separator, newlines_in_values=True)
    with pyarrow.csv.open_csv(path, parse_options=options) as reader:
        names: list[str] = reader.schema.names
    return names


def _check_quotes(what: str, path: str, last: bytes) -> None:
    """Refuse a file whose last value, which may hold line breaks, continues to the end of the file.

    Raises:
        SetupError: its quote is not closed, so that it swallowed the rows behind it.
    """
    if b"\n" not in last and b"\r" not in last:
        return
    with open(path, "rb") as file:
        file.seek(-min(os.path.getsize(path), _TAIL), os.SEEK_END)
        tail = file.read().rstrip(b"\r\n")
    if not tail.endswith(b'"') and tail.endswith(last.rstrip(b"\r\n")[-_TAIL // 2 :]):
        shown = printable(last.decode("utf-8", "replace"), _SHOWN)
        raise SetupError(f"{what}: the quote before {shown} is never closed: the rows behind it are part of {_QUOTED}")


class RowFiles(Mapping[str, bytes]):
    """What stands for the files of a sample: an image at a path, read when it is asked for, and a caption."""

    def __init__(self, path: bytes, caption: bytes) -> None:
        self._path, self._caption = path, caption

    def __getitem__(self, suffix: str) -> bytes:
        """Raises BadSampleError if the image cannot be read."""
        if suffix == "jpg":
            return read_file(self._path)
        if suffix == "txt":
            return self._caption
        raise KeyError(suffix)

    def __iter__(self) -> Iterator[str]:
        return iter(("jpg", "txt"))

    def __len__(self) -> int:
        return 2

    def __contains__(self, suffix: object) -> bool:
        return suffix in ("jpg", "txt")


class CsvTable:
    """The rows of a csv file. Paths of images are relative to the working directory, as in OpenCLIP."""

    def __init__(self, path: str, config: Config, flag: str) -> None:
        self.name = os.path.basename(path)
        separator, columns = _separator(config), [config.data.csv_img_key, config.data.csv_caption_key]
        if not os.path.isfile(path):
            raise SetupError(f"{flag}: there is no file {path}")
        if columns[0] == columns[1]:
            raise SetupError(f"--csv-img-key and --csv-caption-key are both {columns[0]!r}: give two columns")
        try:
            header = _header(path, separator)
            missing = [column for column in columns if column not in header]
            if missing:
                raise SetupError(
                    f"{flag}: {path} has no column {' and no column '.join(map(repr, missing))}; with --csv-separator "
                    f"{separator!r} its columns are {header}. Name them with --csv-img-key and --csv-caption-key, or "
                    "give another --csv-separator"
                )
            table = _read(path, separator, columns)
        except (pyarrow.ArrowInvalid, UnicodeDecodeError, OSError) as error:
            why = _LONG_ROW if "straddling" in str(error) else error
            raise SetupError(f"{flag}: cannot read {path} with --csv-separator {separator!r}: {why}") from error
        if len(table) == 0:
            raise SetupError(f"{flag}: {path} has no rows")
        self._paths, self._captions = (table[column].combine_chunks() for column in columns)
        for column in (self._paths, self._captions):
            _check_quotes(f"{flag}: {path}", path, column[-1].as_py())

    def __len__(self) -> int:
        return len(self._paths)

    def read(self, row: int) -> RawSample:
        """The image and the caption of a row; the image's file is read when it is asked for."""
        path: bytes = self._paths[row].as_py()
        return RawSample(row, self.name, os.fsdecode(path), RowFiles(path, self._captions[row].as_py()))

    def keys(self) -> Iterator[str]:
        """The images' paths, as they stand in the file."""
        return (os.fsdecode(path.as_py()) for path in self._paths)

    def fingerprint(self) -> str:
        """Hex digest over the rows: images' base names and captions."""
        names = pyarrow.compute.replace_substring_regex(self._paths, pattern="^.*/", replacement="")
        digest = hashlib.sha256()
        for column in (names, self._captions):
            digest.update(pyarrow.compute.binary_length(column).to_numpy().tobytes())
            digest.update(_text_bytes(column))
        return digest.hexdigest()


def _text_bytes(column: Any) -> Any:
    """The texts of a large_binary array end to end, without a copy."""
    _, offsets, data = column.buffers()
    ends = np.frombuffer(offsets, np.int64)[column.offset : column.offset + len(column) + 1]
    return memoryview(data)[ends[0] : ends[-1]] if len(data or b"") else b""


def build_train(config: Config, world: World, transform: Transform, tokenizer: Tokenizer) -> TrainData:
    """Training data in a csv file. Not collective; every rank reads the file.

    Raises:
        SetupError: the file cannot be read, lacks a column, or the flags do not fit it.
    """
    assert config.data.train_data is not None
    table = CsvTable(config.data.train_data, config, "--train-data")
    if config.data.train_num_samples not in (None, len(table)):
        raise SetupError(
            f"--train-num-samples {config.data.train_num_samples} is not the size of --train-data "
            f"{config.data.train_data}, "
            f"which has {len(table)} rows. Remove --train-num-samples"
        )
    return table_train(table, table.fingerprint(), config, world, transform, tokenizer)


def build_retrieval(config: Config, world: World, transform: Transform, tokenizer: Tokenizer) -> RetrievalData:
    """Validation data in a csv file; each row is an image with one caption. Not collective.

    Raises:
        SetupError: the file cannot be read, or lacks a column.
    """
    assert config.evaluation.val_data is not None
    table = CsvTable(config.evaluation.val_data, config, "--val-data")
    return table_retrieval(table, config, world, transform, tokenizer)
