"""The subset of a dataset that a list names, by number (``sample_id``) or by ``shard`` and ``key``.

Shapes: M samples in the dataset, S shards, N rows of a batch.

Lists by number are read in batches and take M / 8 bytes; lists by name are held in memory while they are looked up, and
the headers of the shards that they name are read.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from dissect_clip.data.sampling.bitmap import Bitmap, empty_bitmap, set_bits
from dissect_clip.data.sampling.sample_list import ID, KEY, MAX_SHOWN, SHARD, read_batches, read_columns
from dissect_clip.errors import SetupError

Ints = NDArray[np.int64]


@dataclass(frozen=True)
class SampleNames:
    """The names of a dataset's samples in a record."""

    shards: Sequence[str]  # [S]
    sizes: Ints  # [S]
    keys: Callable[[int], Iterator[str]]
    """The keys in a shard, by its number, in the order of the ids; they may be more or fewer than its size."""

    @property
    def num_samples(self) -> int:
        """M."""
        return int(self.sizes.sum())


def as_recorded(key: str) -> str:
    """A key as the record writes it: what is not UTF-8 is U+FFFD."""
    return key if key.isascii() else key.encode("utf-8", "surrogateescape").decode("utf-8", "replace")


def list_digest(subset: Bitmap) -> str:
    """Hex digest of which samples are in a subset; the same for every file that lists them."""
    return hashlib.sha256(subset.tobytes()).hexdigest()


def read_list(path: str, names: SampleNames, flag: str, report_progress: Callable[[], None] = lambda: None) -> Bitmap:
    """The samples that a list names, [ceil(M / 8)]. Not collective.

    ``report_progress`` is called after every shard whose keys were read.

    Raises:
        SetupError: naming ``flag``: the list cannot be read, is empty, lacks columns, or names samples that do not
            exist or appear twice.
    """
    try:
        with _readable():
            columns = read_columns(path)
            by_id = ID in columns
            wanted = [name for name in (ID, SHARD) if name in columns] if by_id else [SHARD, KEY]
            if not by_id and not {SHARD, KEY} <= set(columns):
                raise SetupError(
                    f"it needs a column {ID}, or {SHARD} and {KEY}; its columns are {', '.join(columns) or 'none'}"
                )
            batches = read_batches(path, wanted)
            listed, problems = _by_id(batches, names) if by_id else _by_key(batches, names, report_progress)
        if listed.num_rows == 0:
            raise SetupError("it lists no sample")
        if problems:
            raise SetupError(f"of its {listed.num_rows} rows {'; '.join(problems)}")
    except SetupError as error:
        raise SetupError(f"{flag} {path}: {error}") from error
    return listed.bitmap


@contextmanager
def _readable() -> Iterator[None]:
    """Turn an error of reading the file into a SetupError."""
    try:
        yield
    except (pa.ArrowException, OSError, UnicodeDecodeError) as error:
        raise SetupError(f"it cannot be read: {error}") from error


# ---- problems of a list


@dataclass
class _ProblemCount:
    """How often something was wrong, and the first example."""

    count: int = 0
    example: str = ""

    def add(self, count: int, example: Callable[[], str]) -> None:
        if count and not self.count:
            self.example = example()
        self.count += count

    def sentences(self, what: str) -> list[str]:
        return [f"{self.count} {what}, as {self.example[:MAX_SHOWN]}"] if self.count else []


@dataclass
class _ListedSamples:
    """The samples that a list names, and its problems."""

    num_samples: int
    num_rows: int = 0
    outside: _ProblemCount = field(default_factory=_ProblemCount)
    repeats: _ProblemCount = field(default_factory=_ProblemCount)

    def __post_init__(self) -> None:
        self.bitmap = empty_bitmap(self.num_samples)

    def add(self, ids: Ints) -> None:
        is_inside = (ids >= 0) & (ids < self.num_samples)
        outside = ids[~is_inside]
        self.outside.add(len(outside), lambda: str(outside[0]))
        rising = np.sort(ids[is_inside])
        is_repeat = (self.bitmap[rising >> 3] >> (rising & 7).astype(np.uint8)) & 1 > 0
        is_repeat[1:] |= rising[1:] == rising[:-1]
        repeats = rising[is_repeat]
        self.repeats.add(len(repeats), lambda: str(repeats[0]))
        set_bits(self.bitmap, rising)

    def problems(self) -> list[str]:
        return [
            *self.outside.sentences(f"{ID}s are not of the dataset, whose ids are 0 to {self.num_samples - 1}"),
            *self.repeats.sentences("samples are listed more than once"),
        ]


# ---- lists by number


def _by_id(batches: Iterator[pa.RecordBatch], names: SampleNames) -> tuple[_ListedSamples, list[str]]:
    """Lists by number. A shard that stands beside a number has to be the sample's."""
    listed, elsewhere = _ListedSamples(names.num_samples), _ProblemCount()
    ends = np.cumsum(names.sizes)
    for batch in batches:
        ids = batch.column(0).to_numpy()
        listed.num_rows += len(ids)
        listed.add(ids)
        if batch.num_columns > 1:
            given = batch.column(1).dictionary_encode()
            inside = np.flatnonzero((ids >= 0) & (ids < listed.num_samples))
            shards = np.searchsorted(ends, ids[inside], "right")
            wrong = _differ(given.indices.to_numpy()[inside], given.dictionary.to_pylist(), shards, names.shards)
            rows = inside[wrong]

            def example(rows: Any = rows, ids: Any = ids, given: Any = given) -> str:
                shard = int(np.searchsorted(ends, ids[rows[0]], "right"))
                return f"{ids[rows[0]]}, which is not of {given[int(rows[0])].as_py()!r} but of {names.shards[shard]!r}"

            elsewhere.add(len(rows), example)
    what = "samples have other numbers in this dataset (other shards, sizes or order)"
    return listed, [*listed.problems(), *elsewhere.sentences(what)]


def _differ(codes: NDArray[Any], given: list[str], places: NDArray[Any], shards: Sequence[str]) -> NDArray[np.bool_]:
    """[N] bool, whether the name ``given[code]`` differs from that of the shard at the place."""
    numbers = {name: number for number, name in enumerate(dict.fromkeys(shards))}
    expected = np.array([numbers.get(name, -1) for name in given], np.int64)[codes]
    # Shards that are given twice share their name.
    actual = np.array([numbers[name] for name in shards], np.int64)[places]
    wrong: NDArray[np.bool_] = expected != actual
    return wrong


# ---- lists by name

_LOOKUP_PROBLEMS = {
    "no shard": "are of shards that the dataset does not have",
    "shard twice": "are of shards whose name the dataset has more than once",
    "no key": "are not in their shard",
    "key twice": f"stand for several samples of their shard (list these by {ID})",
}


def _by_key(
    batches: Iterator[pa.RecordBatch], names: SampleNames, report_progress: Callable[[], None]
) -> tuple[_ListedSamples, list[str]]:
    """Lists by name: shard by shard, its keys are read and the list's are looked up among them."""
    listed = _ListedSamples(names.num_samples)
    table = pa.Table.from_batches(list(batches), pa.schema([(SHARD, pa.large_string()), (KEY, pa.large_string())]))
    listed.num_rows = len(table)
    shards = table[SHARD].combine_chunks().dictionary_encode()
    keys = table[KEY].combine_chunks()
    codes = shards.indices.to_numpy()
    order = np.argsort(codes, kind="stable")
    cuts = np.searchsorted(codes[order], np.arange(len(shards.dictionary) + 1))
    numbers: dict[str, list[int]] = {}
    for number, name in enumerate(names.shards):
        numbers.setdefault(name, []).append(number)
    offsets = np.cumsum(names.sizes) - names.sizes
    problems = {kind: _ProblemCount() for kind in _LOOKUP_PROBLEMS}
    for code, name in enumerate(shards.dictionary.to_pylist()):
        wanted = keys.take(pa.array(order[cuts[code] : cuts[code + 1]])).to_pylist()
        same_name = numbers.get(name, [])
        if len(same_name) != 1:
            kind = "no shard" if not same_name else "shard twice"
            problems[kind].add(len(wanted), lambda name=name, key=wanted[0]: f"{name} {key}")  # type: ignore[misc]
            continue
        (shard,) = same_name
        listed.add(_look_up(name, wanted, names.keys(shard), int(names.sizes[shard]), problems) + offsets[shard])
        report_progress()
    sentences = [line for kind, what in _LOOKUP_PROBLEMS.items() for line in problems[kind].sentences(what)]
    return listed, [*listed.problems(), *sentences]


def _look_up(name: str, wanted: list[str], keys: Iterator[str], size: int, problems: dict[str, _ProblemCount]) -> Ints:
    """The ordinals of a list's keys in a shard of ``size`` samples; missing and ambiguous keys are counted."""
    ordinals: dict[str, int] = dict.fromkeys(wanted, -1)
    ambiguous = set()
    for ordinal, key in zip(range(size), keys, strict=False):
        recorded = as_recorded(key)
        if recorded in ordinals:
            if ordinals[recorded] >= 0:
                ambiguous.add(recorded)
            ordinals[recorded] = ordinal
    missing = [key for key in wanted if ordinals[key] < 0]
    unsure = [key for key in wanted if key in ambiguous]
    problems["no key"].add(len(missing), lambda: f"{name} {missing[0]}")
    problems["key twice"].add(len(unsure), lambda: f"{name} {unsure[0]}")
    return np.array([ordinals[key] for key in wanted if ordinals[key] >= 0 and key not in ambiguous], np.int64)
