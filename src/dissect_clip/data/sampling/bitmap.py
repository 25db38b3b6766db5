"""Sets of samples as bitmaps, one bit a sample: which were visited, which a list names.

Shapes: M samples in the dataset.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, overload

import numpy as np
from numpy.typing import NDArray

Bitmap = NDArray[np.uint8]
"""[ceil(M / 8)]: the bit of sample i is bit i % 8 of byte i // 8."""

_CHUNK = 1 << 20
"""Bytes of a bitmap that are unpacked at a time."""

_ONES = np.unpackbits(np.arange(256, dtype=np.uint8)[:, None], axis=1).sum(axis=1, dtype=np.uint8)


def empty_bitmap(num_samples: int) -> Bitmap:
    """[ceil(M / 8)], with no bit set."""
    return np.zeros(-(-num_samples // 8), np.uint8)


def set_bits(bitmap: Bitmap, sample_id: NDArray[np.int64]) -> None:
    """Set the bits of the samples [N], which may name one several times."""
    np.bitwise_or.at(bitmap, sample_id >> 3, np.left_shift(1, sample_id & 7).astype(np.uint8))


def inverted(bitmap: Bitmap, num_samples: int) -> Bitmap:
    """[ceil(M / 8)], with the bits set that are not set in ``bitmap``."""
    others: Bitmap = ~bitmap
    if num_samples % 8:
        others[-1] &= (1 << num_samples % 8) - 1
    return others


def count_set(bitmap: Bitmap) -> int:
    """Number of bits that are set."""
    return int(_ONES[bitmap].sum(dtype=np.int64))


def unset_positions(bitmap: Bitmap, first: int, last: int) -> NDArray[np.int64]:
    """The samples from ``first`` to before ``last`` whose bit is not set, counted from ``first``; rising."""
    begin = first // 8
    flags = np.unpackbits(bitmap[begin : -(-last // 8)], bitorder="little")[first - 8 * begin : last - 8 * begin]
    return np.flatnonzero(flags == 0)


def nth_unset(bitmap: Bitmap, numbers: NDArray[np.int64]) -> NDArray[np.int64]:
    """The samples with the ``numbers`` [n], rising, in a count from 0 of those whose bit is not set; rising."""
    parts: list[NDArray[np.int64]] = []
    before = 0
    for first in range(0, len(bitmap), _CHUNK):
        last = min(first + _CHUNK, len(bitmap))
        after = before + 8 * (last - first) - count_set(bitmap[first:last])
        inside = numbers[np.searchsorted(numbers, before) : np.searchsorted(numbers, after)]
        if len(inside):
            parts.append(8 * first + unset_positions(bitmap, 8 * first, 8 * last)[inside - before])
        before = after
    return np.concatenate(parts) if parts else np.empty(0, np.int64)


class UnsetPositions(Sequence[int]):
    """Items ``begin`` to before ``end`` of :func:`unset_positions` of the samples ``first`` to before ``last``.

    They are computed when they are read, so that a plan of millions of samples is small.
    """

    def __init__(self, bitmap: Bitmap, first: int, last: int, begin: int, end: int) -> None:
        self._bitmap, self._first, self._last, self._begin, self._end = bitmap, first, last, begin, end

    def __len__(self) -> int:
        return self._end - self._begin

    @overload
    def __getitem__(self, index: int) -> int: ...
    @overload
    def __getitem__(self, index: slice) -> Sequence[int]: ...
    def __getitem__(self, index: int | slice) -> Any:
        return unset_positions(self._bitmap, self._first, self._last)[self._begin : self._end][index].tolist()

    def __iter__(self) -> Iterator[int]:
        return iter(self[:])
