"""The shuffle buffer of samples that are read in order, resumable at any sample.

Shapes: P samples that went into the buffer.
"""

from __future__ import annotations

import random
from collections.abc import Iterator
from itertools import chain, islice
from typing import Protocol

import numpy as np
from numpy.typing import NDArray
from webdataset.filters import shuffle

from dissect_clip.data.formats.decode import RawSample
from dissect_clip.data.sampling.plan import ShardSlice

BUFFER_SIZE = 5000
_INITIAL = 1000
"""Samples in the buffer, and before the first is given. Both are OpenCLIP's."""


class SliceReader(Protocol):
    """Reads the samples of a slice, except the first ``done``; see :meth:`ShardFile.read`."""

    def __call__(self, part: ShardSlice, done: int = 0, reread: bool = False) -> Iterator[RawSample]: ...


class SequentialSamples:
    """The samples of slices one slice after the other, from some position on."""

    def __init__(
        self, slices: list[ShardSlice], read: SliceReader, finished: int, given: int, uneven: dict[int, int]
    ) -> None:
        self.slices, self._read = slices, read
        self.finished = finished  # slices read to their end
        self.given = given  # samples of the slice after these
        self.uneven = uneven  # samples that a slice gave, by its number, if not as many as it names

    def __iter__(self) -> Iterator[RawSample]:
        for part in self.slices[self.finished :]:
            for sample in self._read(part, done=self.given):
                self.given += 1
                yield sample
            if self.given != len(part.ordinals):
                self.uneven[self.finished] = self.given
            self.finished, self.given = self.finished + 1, 0

    def counts(self) -> list[int]:
        """Samples that each slice has given, of those that were begun."""
        ended = [
            self.uneven.get(number, len(part.ordinals)) for number, part in enumerate(self.slices[: self.finished])
        ]
        return [*ended, self.given]


class ShuffledSamples:
    """The samples of slices through a shuffle buffer; see :class:`dissect_clip.data.source.Samples`.

    To resume at a position, the buffer is run with numbers in place of the samples that went into it before. It then
    holds the numbers of a few thousand; only these samples are read again, and only when they come out are they
    decoded.
    """

    def __init__(self, slices: list[ShardSlice], read: SliceReader, seed: int, position: tuple[int, ...]) -> None:
        self._num_out, finished, given, *uneven = position or (0, 0, 0)
        pairs = dict(zip(uneven[::2], uneven[1::2], strict=True))
        self._sequence = SequentialSamples(slices, read, finished, given, pairs)
        self._read, self._seed = read, seed

    def __iter__(self) -> Iterator[RawSample]:
        counts = np.array(self._sequence.counts())
        in_buffer = np.ones(counts.sum(), bool)
        buffer = shuffle(BUFFER_SIZE, initial=_INITIAL, rng=random.Random(self._seed))
        mixed: Iterator[int | RawSample] = buffer(chain(range(len(in_buffer)), self._sequence))
        in_buffer[np.fromiter(islice(mixed, self._num_out), np.int64)] = False
        reread = self._read_again(np.flatnonzero(in_buffer), counts)
        for item in mixed:
            self._num_out += 1
            sample = reread.pop(item, None) if isinstance(item, int) else item
            if sample is not None:
                yield sample

    def _read_again(self, numbers: NDArray[np.int64], counts: NDArray[np.int64]) -> dict[int, RawSample]:
        """Samples by their numbers in what the slices have given; those that are gone are counted as lost."""
        samples: dict[int, RawSample] = {}
        ends = np.cumsum(counts)
        cuts = np.searchsorted(numbers, ends)
        for place, own in enumerate(np.split(numbers, cuts[:-1])):
            if len(own):
                begin = int(ends[place] - counts[place])
                part = self._sequence.slices[place]
                ordinals = part.ordinals[:]
                part = part._replace(ordinals=[ordinals[number - begin] for number in own.tolist()])
                # As many as can still be read: the first ones.
                read = self._read(part, reread=True)
                samples |= {number: sample for sample, number in zip(read, own.tolist(), strict=False)}
        return samples

    @property
    def position(self) -> tuple[int, ...]:
        """Samples out of the buffer, slices read to their end, samples of the next; then slices and their samples."""
        sequence = self._sequence
        return (self._num_out, sequence.finished, sequence.given, *chain.from_iterable(sequence.uneven.items()))
