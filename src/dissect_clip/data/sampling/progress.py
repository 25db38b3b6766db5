"""Where loader workers stand in an epoch, and which samples the epoch has visited, so that it can go on after a stop.

Shapes: M samples in the data set, N samples a batch, P numbers of a worker's progress, V workers.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, overload

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

Bitmap = NDArray[np.uint8]
"""A flag for each sample, eight to a byte; that of sample i is bit i % 8 of byte i // 8."""

_PIECE = 1 << 20
"""Bytes of flags that are unpacked at a time."""

_ONES = np.unpackbits(np.arange(256, dtype=np.uint8)[:, None], axis=1).sum(axis=1, dtype=np.uint8)


@dataclass(frozen=True, slots=True)
class WorkerProgress:
    """Where a loader worker stands after a batch: all that it needs to go on with its next."""

    worker: int  # in its rank
    attempt: int = 0  # how often its samples did not suffice for its batches
    usable: int = 0  # samples of this attempt that went into batches
    batches: int = 0  # made in this pass
    counts: tuple[int, ...] = ()  # what it left out in this epoch, by the number of its kind
    position: tuple[int, ...] = ()  # of its source in this attempt; empty is the beginning

    def pack(self) -> Tensor:
        """[P] int64."""
        head = (self.worker, self.attempt, self.usable, self.batches, len(self.counts))
        return torch.tensor((*head, *self.counts, *self.position))

    @staticmethod
    def unpack(numbers: Sequence[int]) -> WorkerProgress:
        """Of the numbers of :meth:`pack`."""
        worker, attempt, usable, batches, kinds, *rest = numbers
        return WorkerProgress(worker, attempt, usable, batches, tuple(rest[:kinds]), tuple(rest[kinds:]))


def pack_all(rows: Sequence[WorkerProgress]) -> Tensor:
    """V workers -> [sum of P + V] int64, the length of each before its numbers."""
    packed = [row.pack() for row in rows]
    return torch.cat([part for row in packed for part in (torch.tensor([len(row)]), row)])


def unpack_all(numbers: Tensor) -> list[WorkerProgress]:
    """[sum of P + V] int64 of one :func:`pack_all`, or several joined, -> V workers."""
    left, rows = numbers.tolist(), []
    begin = 0
    while begin < len(left):
        end = begin + 1 + left[begin]
        rows.append(WorkerProgress.unpack(left[begin + 1 : end]))
        begin = end
    return rows


def empty_bitmap(num_samples: int) -> Bitmap:
    """[ceil(M / 8)], of samples none of which is marked."""
    return np.zeros(-(-num_samples // 8), np.uint8)


def set_bits(bits: Bitmap, sample_id: NDArray[np.int64]) -> None:
    """Set the bits of the samples [N], which may name one several times."""
    np.bitwise_or.at(bits, sample_id >> 3, np.left_shift(1, sample_id & 7).astype(np.uint8))


def inverted(bits: Bitmap, num_samples: int) -> Bitmap:
    """[ceil(M / 8)], of the samples that are not marked."""
    others: Bitmap = ~bits
    if num_samples % 8:
        others[-1] &= (1 << num_samples % 8) - 1
    return others


def count_set(bits: Bitmap) -> int:
    """How many samples are marked."""
    return int(_ONES[bits].sum(dtype=np.int64))


def unset_positions(bits: Bitmap, first: int, last: int) -> NDArray[np.int64]:
    """Those of the samples ``first`` to before ``last`` that are not marked, counted from ``first``; rising."""
    begin = first // 8
    flags = np.unpackbits(bits[begin : -(-last // 8)], bitorder="little")[first - 8 * begin : last - 8 * begin]
    return np.flatnonzero(flags == 0)


def nth_unset(bits: Bitmap, numbers: NDArray[np.int64]) -> NDArray[np.int64]:
    """The samples that have the ``numbers`` [n], rising, when those that are not marked are counted from 0; rising."""
    found: list[NDArray[np.int64]] = []
    before = 0
    for first in range(0, len(bits), _PIECE):
        last = min(first + _PIECE, len(bits))
        after = before + 8 * (last - first) - count_set(bits[first:last])
        inside = numbers[np.searchsorted(numbers, before) : np.searchsorted(numbers, after)]
        if len(inside):
            found.append(8 * first + unset_positions(bits, 8 * first, 8 * last)[inside - before])
        before = after
    return np.concatenate(found) if found else np.empty(0, np.int64)


class UnsetPositions(Sequence[int]):
    """Those of the samples ``first`` to before ``last`` that are not marked, counted from ``first``; rising.

    Of these the ones at the places ``begin`` to before ``end``. They are looked up when they are asked for, so that a
    plan of millions of samples is small.
    """

    def __init__(self, bits: Bitmap, first: int, last: int, begin: int, end: int) -> None:
        self._bits, self._first, self._last, self._begin, self._end = bits, first, last, begin, end

    def __len__(self) -> int:
        return self._end - self._begin

    @overload
    def __getitem__(self, place: int) -> int: ...
    @overload
    def __getitem__(self, place: slice) -> Sequence[int]: ...
    def __getitem__(self, place: int | slice) -> Any:
        return unset_positions(self._bits, self._first, self._last)[self._begin : self._end][place].tolist()

    def __iter__(self) -> Iterator[int]:
        return iter(self[:])
