"""Who reads what: the samples of an epoch, split over ranks and loader workers. Pure functions of numbers.

Shapes: S shards, M samples in the data set, N samples a batch, B batches a rank and epoch.

An epoch with known shard sizes is one long row of samples: shards in an order drawn from (seed, epoch), begun at a
drawn place and continued cyclically to B * N * ranks. Ranks, then their workers, take spans of it that follow each
other. So every sample is read once an epoch, but for the few that fill up the last batches, and any number of shards
serves any number of workers. The samples of a list, and what is left of an epoch that was stopped in the middle, are
other, shorter rows, which are laid out in the same way.
"""

from __future__ import annotations

import random
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from enum import Enum
from typing import NamedTuple, Protocol

import numpy as np
from numpy.typing import NDArray
from torch.utils.data import get_worker_info

from dissect_clip.data.sampling.progress import Bitmap, UnsetPositions, unset_positions
from dissect_clip.seeding import Stream, derive_seed

Ints = NDArray[np.int64]


class WorkerInfo(NamedTuple):
    """A loader worker among all of the run."""

    rank: int
    world_size: int
    worker: int
    workers: int  # per rank, at least 1

    @property
    def number(self) -> int:
        """Number of this worker among all, rank by rank."""
        return self.rank * self.workers + self.worker

    @property
    def total(self) -> int:
        """Workers of all ranks."""
        return self.world_size * self.workers


def current_worker(rank: int, world_size: int) -> WorkerInfo:
    """The place of the worker that calls; the training process itself counts as the only worker."""
    info = get_worker_info()
    if info is None:
        return WorkerInfo(rank, world_size, 0, 1)
    return WorkerInfo(rank, world_size, info.id, info.num_workers)


class ShardSlice(NamedTuple):
    """Some samples of a shard."""

    shard: int
    ordinals: Sequence[int]  # rising; a range up to sys.maxsize is up to the shard's end
    again: bool = False  # whether they come a second time in the epoch, to fill it up
    twice: bool = False  # whether they are the first of two times


def count_batches(num_samples: int, batch_size: int, world_size: int, accum_freq: int = 1) -> int:
    """Batches of a rank in an epoch: the samples, rounded up to whole optimizer steps of all ranks."""
    steps = -(-num_samples // (batch_size * world_size * accum_freq))
    return steps * accum_freq


def worker_batches(num_batches: int, worker: int, workers: int) -> int:
    """How many of a rank's batches a worker makes; torch's DataLoader takes them from the workers in turn."""
    return max(0, -(-(num_batches - worker) // workers))


def worker_span(num_batches: int, batch_size: int, place: WorkerInfo) -> tuple[int, int]:
    """First sample of a worker, and the first after its last, in the epoch's row."""
    before = sum(worker_batches(num_batches, worker, place.workers) for worker in range(place.worker))
    first = place.rank * num_batches + before
    count = worker_batches(num_batches, place.worker, place.workers)
    return first * batch_size, (first + count) * batch_size


def once_in_row(num_samples: int, length: int, first: int, last: int) -> tuple[int, int]:
    """Of the places ``first`` to before ``last`` of a row of ``length`` that repeats itself after ``num_samples``.

    Those from the first number given to before the second hold samples that come once in the row. Before them are the
    first of two times, behind them samples that come again.
    """
    ends = (min(max(0, length - num_samples), num_samples), num_samples)
    begin, end = (min(max(first, place), last) for place in ends)
    return begin, end


def cut_shards(order: Ints, sizes: Ints, first: int, last: int) -> list[ShardSlice]:
    """The parts of shards that make up samples ``first`` to before ``last`` of the shards laid end to end.

    ``order`` [S] holds the shards in the order they are laid, ``sizes`` [S] their samples by shard number; after the
    last shard comes the first again.
    """
    ends = np.cumsum(sizes[order])
    parts = []
    while first < last:
        position = first % int(ends[-1])
        place = int(np.searchsorted(ends, position, side="right"))
        shard = int(order[place])
        begin = position - (int(ends[place]) - int(sizes[shard]))
        count = min(int(sizes[shard]) - begin, last - first)
        parts.append(ShardSlice(shard, range(begin, begin + count)))
        first += count
    return parts


def _generator(*parts: int) -> np.random.Generator:
    return np.random.Generator(np.random.PCG64(derive_seed(*parts)))


class Coverage(Enum):
    """What of a data set an epoch reads."""

    ONCE = "every sample once"
    CYCLE = "whole shards of unknown sizes, round and round"
    DRAWS = "shards drawn with replacement"


class EpochPlan(Protocol):
    """What a worker reads in an epoch. ``attempt`` counts how often its samples did not suffice for its batches."""

    @property
    def coverage(self) -> Coverage:
        """What the workers read together."""
        ...

    def parts(self, place: WorkerInfo, epoch: int, attempt: int) -> list[ShardSlice]: ...


@dataclass(frozen=True)
class SpanPlan:
    """Shards of known sizes: every sample once an epoch."""

    sizes: Ints  # [S]
    num_batches: int
    batch_size: int
    seed: int
    coverage = Coverage.ONCE

    def parts(self, place: WorkerInfo, epoch: int, attempt: int) -> list[ShardSlice]:
        """This worker's span of the epoch's row; the same in every attempt, but for the order."""
        generator = _generator(self.seed, Stream.SHARDS, epoch)
        order = generator.permutation(len(self.sizes))
        # Begun at a drawn sample, since with few shards the workers' spans would otherwise meet at the same places.
        start = int(generator.integers(self.sizes.sum()))
        first, last = worker_span(self.num_batches, self.batch_size, place)
        length = self.num_batches * self.batch_size * place.world_size
        begin, end = once_in_row(int(self.sizes.sum()), length, first, last)
        parts = [part._replace(twice=True) for part in cut_shards(order, self.sizes, start + first, start + begin)]
        parts += cut_shards(order, self.sizes, start + begin, start + end)
        parts += [part._replace(again=True) for part in cut_shards(order, self.sizes, start + end, start + last)]
        if attempt > 0:
            random.Random(derive_seed(self.seed, Stream.SHARDS, epoch, *place, attempt)).shuffle(parts)
        return parts


@dataclass(frozen=True, eq=False)
class ShardSubset:
    """The samples of shards that are not left out."""

    sizes: Ints  # [S], of whole shards
    left_out: Bitmap
    counts: Ints  # [S], how many of each shard are not left out

    @classmethod
    def of(cls, sizes: Ints, left_out: Bitmap) -> ShardSubset:
        """Count them."""
        ends = np.cumsum(sizes)
        bounds = zip((ends - sizes).tolist(), ends.tolist(), strict=True)
        return cls(sizes, left_out, np.array([len(unset_positions(left_out, *bound)) for bound in bounds], np.int64))

    def ordinals(self, shards: Sequence[int], spans: Sequence[range]) -> list[UnsetPositions]:
        """For each shard those of its samples that are at the places of a span among the ones not left out."""
        ends = np.cumsum(self.sizes)
        return [
            UnsetPositions(self.left_out, int(ends[shard] - self.sizes[shard]), int(ends[shard]), span.start, span.stop)
            for shard, span in zip(shards, spans, strict=True)
        ]


@dataclass(frozen=True)
class SubsetPlan:
    """Shards of known sizes of which some samples are left out: every other one once an epoch.

    Shards of which all are left out are not read.
    """

    kept: ShardSubset
    num_batches: int
    batch_size: int
    seed: int
    coverage = Coverage.ONCE

    @property
    def sizes(self) -> Ints:
        """[S], of whole shards."""
        return self.kept.sizes

    def parts(self, place: WorkerInfo, epoch: int, attempt: int) -> list[ShardSlice]:
        """This worker's span of a row of the samples that are not left out; see :meth:`SpanPlan.parts`."""
        parts = SpanPlan(self.kept.counts, self.num_batches, self.batch_size, self.seed).parts(place, epoch, attempt)
        spans = [range(part.ordinals[0], part.ordinals[-1] + 1) for part in parts]
        ordinals = self.kept.ordinals([part.shard for part in parts], spans)
        return [part._replace(ordinals=chosen) for part, chosen in zip(parts, ordinals, strict=True)]


@dataclass(frozen=True)
class RemainderPlan:
    """The samples of an epoch that were not visited before it was stopped, each once.

    Where they do not suffice for a worker's batches, as few may be left of which some are bad, it fills up with samples
    of the whole epoch.
    """

    whole: SpanPlan | SubsetPlan
    visited: Bitmap  # with those that the whole epoch leaves out
    num_batches: int  # of a rank, for the rest
    coverage = Coverage.ONCE

    def parts(self, place: WorkerInfo, epoch: int, attempt: int) -> list[ShardSlice]:
        """This worker's span of the row that is left; in later attempts its span of the epoch's whole row."""
        whole = self.whole
        if attempt > 0:
            return whole.parts(place, epoch, attempt)
        left = ShardSubset.of(whole.sizes, self.visited)
        return SubsetPlan(left, self.num_batches, whole.batch_size, whole.seed).parts(place, epoch, 0)


@dataclass(frozen=True)
class CyclePlan:
    """Shards of unknown sizes: each worker has whole shards of its own, and begins again after the last of them."""

    num_shards: int  # at least as many as there are workers
    seed: int
    coverage = Coverage.CYCLE

    def parts(self, place: WorkerInfo, epoch: int, attempt: int) -> list[ShardSlice]:
        """Every ``place.total``-th shard of an order that differs by epoch."""
        order = _generator(self.seed, Stream.SHARDS, epoch).permutation(self.num_shards)
        own = [ShardSlice(int(shard), range(sys.maxsize)) for shard in order[place.number :: place.total]]
        if attempt > 0:
            random.Random(derive_seed(self.seed, Stream.SHARDS, epoch, *place, attempt)).shuffle(own)
        return own


def draw_shards(weights: list[float], count: int, seed: int) -> list[int]:
    """``count`` shards drawn with replacement; a shard of twice the weight comes twice as often."""
    return random.Random(seed).choices(range(len(weights)), weights=weights, k=count)


@dataclass(frozen=True)
class ResamplingPlan:
    """Shards drawn with replacement, by weight."""

    weights: list[float]  # [S]; a shard that is known to have no sample, or none that is kept, is never drawn
    sizes: Ints | None  # [S], or None where they are unknown
    seed: int
    kept: ShardSubset | None = None  # where some samples are left out
    coverage = Coverage.DRAWS

    def parts(self, place: WorkerInfo, epoch: int, attempt: int) -> list[ShardSlice]:
        """As many draws as there are shards, other ones in every attempt."""
        seed = derive_seed(self.seed, Stream.RESAMPLE, epoch, *place, attempt)
        counts = self.sizes if self.kept is None else self.kept.counts
        if counts is None:
            return [
                ShardSlice(shard, range(sys.maxsize)) for shard in draw_shards(self.weights, len(self.weights), seed)
            ]
        weights = [weight * (count > 0) for weight, count in zip(self.weights, counts.tolist(), strict=True)]
        shards = draw_shards(weights, len(weights), seed)
        spans = [range(int(counts[shard])) for shard in shards]
        return list(map(ShardSlice, shards, spans if self.kept is None else self.kept.ordinals(shards, spans)))


def span_rows(
    num_rows: int,
    num_batches: int,
    batch_size: int,
    seed: int,
    epoch: int,
    place: WorkerInfo,
    left_out: Bitmap | None = None,
) -> tuple[Ints, range]:
    """Rows of a table that a worker reads in an epoch, and the places of those that come once in it.

    Before these are the first of two times, behind them rows that come again. They are this worker's span of a
    permutation, continued cyclically. Where some rows are left out, because they were visited before a stop or are not
    on a list, the permutation is that of the others.
    """
    order: Ints = _generator(seed, Stream.SHARDS, epoch).permutation(num_rows)
    if left_out is not None:
        order = order[np.unpackbits(left_out, bitorder="little")[order] == 0]
    first, last = worker_span(num_batches, batch_size, place)
    rows: Ints = order[np.arange(first, last) % len(order)]
    begin, end = once_in_row(len(order), num_batches * batch_size * place.world_size, first, last)
    return rows, range(begin - first, end - first)


class Share(NamedTuple):
    """The samples of a shard whose ordinals are in ``ordinals``."""

    shard: int
    ordinals: range


def share_shards(num_shards: int, place: WorkerInfo) -> list[Share]:
    """What a worker reads of a set that is read once, whole, by all workers together; sizes need not be known.

    Shards go round as long as each worker gets one more. Those left over are each shared by several workers, who take
    turns by sample.
    """
    whole = num_shards - num_shards % place.total
    shares = [Share(shard, range(sys.maxsize)) for shard in range(place.number, whole, place.total)]
    left = num_shards - whole
    if left:
        turn, shard = divmod(place.number, left)
        readers = -(-(place.total - shard) // left)
        shares.append(Share(whole + shard, range(turn, sys.maxsize, readers)))
    return shares
