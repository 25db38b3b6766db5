"""Samples that are skipped: counted by kind, and listed with shard and key.

Shapes: B bytes.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Sequence
from enum import IntEnum
from typing import NamedTuple

import torch
from torch import Tensor

_MAX_REASON = 500

_log = logging.getLogger(__name__)


class Skip(IntEnum):
    """Why samples were skipped."""

    NO_IMAGE = 0
    NO_CAPTION = 1
    NO_LABEL = 2
    BAD_IMAGE = 3
    BAD_CAPTION = 4
    BAD_LABEL = 5
    DAMAGED_SHARD = 6
    UNREADABLE_SHARD = 7
    BEYOND_RECORDED_SIZE = 8
    BELOW_RECORDED_SIZE = 9
    EMPTY_CAPTION = 10
    TOO_LARGE_IMAGE = 11
    TOO_LARGE_FILE = 12

    @property
    def label(self) -> str:
        """The kind's name in logs and files."""
        return self.name.lower()


def printable(text: str, length: int = 300) -> str:
    """Text of unknown origin for a log line: its beginning, with escapes for what moves cursors or breaks lines."""
    shown = "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text[:length])
    return shown if len(text) <= length else f"{shown}..."


class BadSampleError(Exception):
    """A sample that cannot be used."""

    def __init__(self, kind: Skip, reason: str) -> None:
        super().__init__(reason)
        self.kind = kind


class SkipRow(NamedTuple):
    """Samples skipped at one place."""

    kind: int  # a Skip
    shard: str
    key: str | None  # None if it is not a single sample
    reason: str
    samples: int


def pack_rows(rows: Sequence[SkipRow]) -> Tensor:
    """Rows -> [B] uint8, a JSON list a line, so that they can travel as a tensor."""
    lines = "".join(json.dumps(row) + "\n" for row in rows)
    return torch.frombuffer(bytearray(lines.encode("ascii")), dtype=torch.uint8)


def unpack_rows(packed: Tensor) -> list[SkipRow]:
    """[B] uint8 of :func:`pack_rows`, one packing or several joined, -> rows."""
    return [SkipRow(*json.loads(line)) for line in packed.numpy().tobytes().splitlines()]


class SkipCounter:
    """Counts what a worker skips, and logs the first of each kind.

    ``counts`` [kinds] int64 may be shared with other processes. ``warned`` holds the kinds already logged. ``rows``
    collects the skipped samples, if it is given.
    """

    def __init__(self, counts: Tensor, warned: set[Skip], rows: list[SkipRow] | None = None) -> None:
        self._counts, self._warned, self._rows = counts, warned, rows

    def add(self, kind: Skip, shard: str, key: str | None, reason: str, count: int = 1) -> None:
        """Count ``count`` samples of ``kind`` in a shard; ``key`` names the sample if it is a single one."""
        self._counts[kind] += count
        if self._rows is not None:
            self._rows.append(SkipRow(int(kind), shard, key, reason[:_MAX_REASON], count))
        if kind not in self._warned:
            self._warned.add(kind)
            where = shard if key is None else f"sample {key} of {shard}"
            _log.warning(
                "skipping %s: %s (%s); more of this kind are only counted",
                printable(where), printable(reason), kind.label,
            )  # fmt: skip


class SharedSkipCounts:
    """Counts of skipped samples, a row for each loader worker, in memory that they share with the training process."""

    def __init__(self, workers: int) -> None:
        self._counts = torch.zeros(max(1, workers), len(Skip), dtype=torch.int64)
        self._counts.share_memory_()  # type: ignore[no-untyped-call]
        self._warned: set[Skip] = set()  # of the process that this object is in

    def counter(self, worker: int) -> SkipCounter:
        """The counter of one worker, to be used in its process."""
        return SkipCounter(self._counts[worker], self._warned)

    def clear(self, worker: int | None = None) -> None:
        """Set the counts of one worker, or of all, to 0."""
        self._counts[slice(None) if worker is None else worker] = 0

    def totals(self) -> dict[str, int]:
        """Skipped samples of this rank by reason; every reason is there, so that ranks can add their counts up."""
        totals = self._counts.sum(0).tolist()
        return {kind.label: totals[kind] for kind in Skip}


def silent_counter() -> SkipCounter:
    """A counter for samples that were already counted and warned about: its counts go nowhere."""
    return SkipCounter(torch.zeros(len(Skip), dtype=torch.int64), set(Skip))
