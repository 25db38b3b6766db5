"""Lists of samples to train on: Parquet, csv or text, by number (``sample_id``) or by ``shard`` and ``key``.

Shapes: M samples in the data set, S shards.

A list is read as data: nothing in it is ever run or unpickled. Lists by number are read a piece at a time and take
M / 8 bytes; lists by name are held in memory while they are looked up, and the headers of the shards that they name are
read.
"""

from __future__ import annotations

import hashlib
import os
import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.csv
import pyarrow.parquet as pq
from numpy.typing import NDArray

from dissect_clip.data.sampling.progress import Bitmap, empty_bitmap, set_bits
from dissect_clip.errors import SetupError

ID, SHARD, KEY = "sample_id", "shard", "key"

_KINDS = ".parquet, .csv, .tsv (with a header) and .txt"
_PIECE = 1 << 20
"""Rows that are looked at at a time."""
_MAX_SHOWN = 80

Ints = NDArray[np.int64]


@dataclass
class _Tally:
    """How often something was wrong, and the first time."""

    count: int = 0
    example: str = ""

    def add(self, count: int, example: Callable[[], str]) -> None:
        if count and not self.count:
            self.example = example()
        self.count += count

    def sentence(self, what: str) -> list[str]:
        return [f"{self.count} {what}, as {self.example[:_MAX_SHOWN]}"] if self.count else []


@dataclass
class _Marked:
    """The samples that a list names, and what is wrong with it."""

    num_samples: int
    listed: int = 0
    outside: _Tally = field(default_factory=_Tally)
    twice: _Tally = field(default_factory=_Tally)

    def __post_init__(self) -> None:
        self.bits = empty_bitmap(self.num_samples)

    def add(self, ids: Ints) -> None:
        inside = (ids >= 0) & (ids < self.num_samples)
        outside = ids[~inside]
        self.outside.add(len(outside), lambda: str(outside[0]))
        rising = np.sort(ids[inside])
        before = (self.bits[rising >> 3] >> (rising & 7).astype(np.uint8)) & 1 > 0
        before[1:] |= rising[1:] == rising[:-1]
        again = rising[before]
        self.twice.add(len(again), lambda: str(again[0]))
        set_bits(self.bits, rising)

    def problems(self) -> list[str]:
        return [
            *self.outside.sentence(f"{ID}s are not of the data set, whose ids are 0 to {self.num_samples - 1}"),
            *self.twice.sentence("samples are there more than once"),
        ]


@dataclass(frozen=True)
class Names:
    """How a data set's samples are called in a record."""

    shards: Sequence[str]  # [S]
    sizes: Ints  # [S]
    keys: Callable[[int], Iterator[str]]
    """The keys in a shard, by its place, in the order of the ids; they may be more or fewer than its size."""

    @property
    def num_samples(self) -> int:
        """M."""
        return int(self.sizes.sum())


def as_recorded(key: str) -> str:
    """A key as the record writes it: what is not UTF-8 is U+FFFD."""
    return key if key.isascii() else key.encode("utf-8", "surrogateescape").decode("utf-8", "replace")


def list_digest(kept: Bitmap) -> str:
    """Hex digest of which samples are kept; the same for every file that lists them."""
    return hashlib.sha256(kept.tobytes()).hexdigest()


def read_list(path: str, names: Names, flag: str, alive: Callable[[], None] = lambda: None) -> Bitmap:
    """The samples that a list names, [ceil(M / 8)]. Not collective.

    ``alive`` is called after every shard whose keys were read.

    Raises:
        SetupError: naming ``flag``: the list cannot be read, is empty, lacks columns, or names samples that are not
            there or twice.
    """
    try:
        with _explained():
            columns = _columns(path)
            by_id = ID in columns
            wanted = [name for name in (ID, SHARD) if name in columns] if by_id else [SHARD, KEY]
            if not by_id and not {SHARD, KEY} <= set(columns):
                raise SetupError(
                    f"it needs a column {ID}, or {SHARD} and {KEY}; its columns are {', '.join(columns) or 'none'}"
                )
            batches = _batches(path, wanted)
            marked, problems = _by_id(batches, names) if by_id else _by_key(batches, names, alive)
        if marked.listed == 0:
            raise SetupError("it lists no sample")
        if problems:
            raise SetupError(f"of its {marked.listed} rows {'; '.join(problems)}")
    except SetupError as error:
        raise SetupError(f"{flag} {path}: {error}") from error
    return marked.bits


@contextmanager
def _explained() -> Iterator[None]:
    try:
        yield
    except (pa.ArrowException, OSError, UnicodeDecodeError) as error:
        raise SetupError(f"it cannot be read: {error}") from error


# ---- files


def _suffix(path: str) -> str:
    suffix = os.path.splitext(path)[1].lower()
    if suffix not in (".parquet", ".csv", ".tsv", ".txt"):
        raise SetupError(f"its name does not say what it is: lists may be {_KINDS}")
    if not os.path.isfile(path):
        raise SetupError("there is no such file")
    if os.path.getsize(path) == 0:
        raise SetupError("it is empty")
    return suffix


def _columns(path: str) -> list[str]:
    """Names of a list's columns; a text file has those of its first line."""
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


def _csv_options(suffix: str) -> Any:
    return pyarrow.csv.ParseOptions(delimiter="\t" if suffix == ".tsv" else ",", newlines_in_values=True)


def _batches(path: str, columns: list[str]) -> Iterator[pa.RecordBatch]:
    """The rows in pieces, with these columns: numbers as int64, names as strings, none of them null."""
    suffix = _suffix(path)
    read = {".parquet": _parquet, ".txt": _text}.get(suffix, _csv)
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


def _is_text(kind: pa.DataType) -> bool:
    kind = kind.value_type if pa.types.is_dictionary(kind) else kind
    return bool(pa.types.is_string(kind) or pa.types.is_large_string(kind))


def _parquet(path: str, columns: list[str]) -> Iterator[pa.RecordBatch]:
    # One thread here and below: loader workers are forked later.
    with pq.ParquetFile(path, pre_buffer=False) as file:
        yield from file.iter_batches(batch_size=_PIECE, columns=columns, use_threads=False)


def _csv(path: str, columns: list[str]) -> Iterator[pa.RecordBatch]:
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


def _text(path: str, columns: list[str]) -> Iterator[pa.RecordBatch]:
    pattern = r"^[0-9]{1,18}$" if columns == [ID] else r"^\S+\s+\S"
    form = f"a {ID}" if columns == [ID] else f"a {SHARD} and a {KEY}"
    for lines in _lines(path):
        lines = lines.filter(pc.not_equal(lines, ""))
        fits = pc.match_substring_regex(lines, pattern)
        if not pc.all(fits, min_count=0).as_py():
            odd = lines.filter(pc.invert(fits))[0].as_py()
            raise SetupError(f"its first line is {form}, and this line is not: {odd[:_MAX_SHOWN]!r}")
        if columns == [ID]:
            yield pa.RecordBatch.from_arrays([lines.cast(pa.int64())], names=columns)
        else:
            parts = pc.extract_regex(lines, r"^(?P<shard>\S+)\s+(?P<key>.*)$")
            yield pa.RecordBatch.from_arrays([parts.field(SHARD), parts.field(KEY)], names=columns)


# ---- looking up


def _by_id(batches: Iterator[pa.RecordBatch], names: Names) -> tuple[_Marked, list[str]]:
    """Lists by number. A shard that stands beside a number has to be where the sample is."""
    marked, elsewhere = _Marked(names.num_samples), _Tally()
    ends = np.cumsum(names.sizes)
    for batch in batches:
        ids = batch.column(0).to_numpy()
        marked.listed += len(ids)
        marked.add(ids)
        if batch.num_columns > 1:
            told = batch.column(1).dictionary_encode()
            inside = np.flatnonzero((ids >= 0) & (ids < marked.num_samples))
            places = np.searchsorted(ends, ids[inside], "right")
            wrong = _differ(told.indices.to_numpy()[inside], told.dictionary.to_pylist(), places, names.shards)
            rows = inside[wrong]

            def example(rows: Any = rows, ids: Any = ids, told: Any = told) -> str:
                place = int(np.searchsorted(ends, ids[rows[0]], "right"))
                return f"{ids[rows[0]]}, which is not of {told[int(rows[0])].as_py()!r} but of {names.shards[place]!r}"

            elsewhere.add(len(rows), example)
    what = "samples have other numbers in this data set (other shards, sizes or order)"
    return marked, [*marked.problems(), *elsewhere.sentence(what)]


def _differ(codes: NDArray[Any], told: list[str], places: NDArray[Any], shards: Sequence[str]) -> NDArray[np.bool_]:
    """[N] bool, where the name ``told[code]`` is not that of the shard at the place."""
    numbers = {name: number for number, name in enumerate(dict.fromkeys(shards))}
    expected = np.array([numbers.get(name, -1) for name in told], np.int64)[codes]
    # Shards that are given twice share their name.
    found = np.array([numbers[name] for name in shards], np.int64)[places]
    wrong: NDArray[np.bool_] = expected != found
    return wrong


def _by_key(batches: Iterator[pa.RecordBatch], names: Names, alive: Callable[[], None]) -> tuple[_Marked, list[str]]:
    """Lists by name: shard by shard, its keys are read and the list's are looked up among them."""
    marked = _Marked(names.num_samples)
    table = pa.Table.from_batches(list(batches), pa.schema([(SHARD, pa.large_string()), (KEY, pa.large_string())]))
    marked.listed = len(table)
    shards = table[SHARD].combine_chunks().dictionary_encode()
    keys = table[KEY].combine_chunks()
    codes = shards.indices.to_numpy()
    order = np.argsort(codes, kind="stable")
    cuts = np.searchsorted(codes[order], np.arange(len(shards.dictionary) + 1))
    places: dict[str, list[int]] = {}
    for place, name in enumerate(names.shards):
        places.setdefault(name, []).append(place)
    offsets = np.cumsum(names.sizes) - names.sizes
    tallies = {what: _Tally() for what in _WHAT}
    for code, name in enumerate(shards.dictionary.to_pylist()):
        wanted = keys.take(pa.array(order[cuts[code] : cuts[code + 1]])).to_pylist()
        found = places.get(name, [])
        if len(found) != 1:
            what = "no shard" if not found else "shard twice"
            tallies[what].add(len(wanted), lambda name=name, key=wanted[0]: f"{name} {key}")  # type: ignore[misc]
            continue
        ids = _look_up(name, wanted, names.keys(found[0]), int(names.sizes[found[0]]), tallies)
        marked.add(ids + offsets[found[0]])
        alive()
    return marked, [*marked.problems(), *(line for what in _WHAT for line in tallies[what].sentence(_WHAT[what]))]


_WHAT = {
    "no shard": "are of shards that the data set does not have",
    "shard twice": "are of shards whose name the data set has more than once",
    "no key": "are not in their shard",
    "key twice": f"stand for several samples of their shard (list these by {ID})",
}


def _look_up(name: str, wanted: list[str], keys: Iterator[str], size: int, tallies: dict[str, _Tally]) -> Ints:
    """The ordinals of a list's keys in a shard of ``size`` samples; what is not found, or not for sure, is counted."""
    ordinals: dict[str, int] = dict.fromkeys(wanted, -1)
    several = set()
    for ordinal, key in zip(range(size), keys, strict=False):
        known = as_recorded(key)
        if known in ordinals:
            if ordinals[known] >= 0:
                several.add(known)
            ordinals[known] = ordinal
    missing = [key for key in wanted if ordinals[key] < 0]
    unsure = [key for key in wanted if key in several]
    tallies["no key"].add(len(missing), lambda: f"{name} {missing[0]}")
    tallies["key twice"].add(len(unsure), lambda: f"{name} {unsure[0]}")
    return np.array([ordinals[key] for key in wanted if ordinals[key] >= 0 and key not in several], np.int64)
