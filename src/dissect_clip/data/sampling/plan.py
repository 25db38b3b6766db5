"""Which samples of which shards, or rows of a table, a loader worker reads in an epoch. Pure functions of numbers.

Shapes: S shards, M samples in the dataset, N samples a batch, B batches a rank and epoch.

With known shard sizes an epoch is one long sequence of samples: shards in an order drawn from (seed, epoch), begun at a
drawn position and continued cyclically to B * N * ranks. Ranks, then their workers, take consecutive spans of it. So
every sample is read once an epoch, except the few that fill up the last batches, and any number of shards serves any
number of workers. The samples of a list, and what is left of an epoch that was stopped inside, are other, shorter
sequences, which are laid out in the same way.
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

from dissect_clip.data.sampling.bitmap import Bitmap, UnsetPositions, unset_positions
from dissect_clip.data.sampling.workers import WorkerInfo, worker_span
from dissect_clip.seeding import Stream, derive_seed

Ints = NDArray[np.int64]


class ShardSlice(NamedTuple):
    """Some samples of a shard."""

    shard: int
    ordinals: Sequence[int]  # rising; a range up to sys.maxsize is up to the shard's end
    is_repeat: bool = False  # whether they come a second time in the epoch, to fill it up
    has_repeat: bool = False  # whether they are the first of two times


class Coverage(Enum):
    """What of a dataset an epoch reads. Checkpoints hold the values."""

    ONCE = "every sample once"
    CYCLE = "whole shards of unknown sizes, round and round"
    DRAWS = "shards drawn with replacement"


class EpochPlan(Protocol):
    """What a worker reads in an epoch. ``attempt`` counts how often its samples did not suffice for its batches."""

    @property
    def coverage(self) -> Coverage:
        """What the workers read together."""
        ...

    def slices(self, worker: WorkerInfo, epoch: int, attempt: int) -> list[ShardSlice]: ...


def _generator(*parts: int) -> np.random.Generator:
    return np.random.Generator(np.random.PCG64(derive_seed(*parts)))


# ---- sequences of samples


def single_visits(num_samples: int, length: int, first: int, last: int) -> tuple[int, int]:
    """Which of the positions ``first`` to before ``last`` hold samples that come once in a cyclic sequence.

    The sequence has ``length`` positions and repeats after ``num_samples``. Single visits are from the first number
    returned to before the second. Before them are the first of two visits, behind them the second.
    """
    ends = (min(max(0, length - num_samples), num_samples), num_samples)
    begin, end = (min(max(first, place), last) for place in ends)
    return begin, end


def cut_shards(order: Ints, sizes: Ints, first: int, last: int) -> list[ShardSlice]:
    """The slices of shards that make up samples ``first`` to before ``last`` of the shards laid end to end.

    ``order`` [S] holds the shards in the order they are laid, ``sizes`` [S] their samples by shard number; after the
    last shard comes the first again.
    """
    ends = np.cumsum(sizes[order])
    slices = []
    while first < last:
        position = first % int(ends[-1])
        place = int(np.searchsorted(ends, position, side="right"))
        shard = int(order[place])
        begin = position - (int(ends[place]) - int(sizes[shard]))
        count = min(int(sizes[shard]) - begin, last - first)
        slices.append(ShardSlice(shard, range(begin, begin + count)))
        first += count
    return slices


def span_rows(
    num_rows: int,
    num_batches: int,
    batch_size: int,
    seed: int,
    epoch: int,
    worker: WorkerInfo,
    exclusions: Bitmap | None = None,
) -> tuple[Ints, range]:
    """Rows of a table that a worker reads in an epoch, and which positions hold rows that come once in it.

    Before these are the first of two visits, behind them the second. The rows are this worker's span of a permutation,
    continued cyclically; of the rows that are not in ``exclusions``, as visited before a stop or not on a list.
    """
    order: Ints = _generator(seed, Stream.SHARDS, epoch).permutation(num_rows)
    if exclusions is not None:
        order = order[np.unpackbits(exclusions, bitorder="little")[order] == 0]
    first, last = worker_span(num_batches, batch_size, worker)
    rows: Ints = order[np.arange(first, last) % len(order)]
    begin, end = single_visits(len(order), num_batches * batch_size * worker.world_size, first, last)
    return rows, range(begin - first, end - first)


# ---- plans


@dataclass(frozen=True)
class SpanPlan:
    """Shards of known sizes: every sample once an epoch."""

    sizes: Ints  # [S]
    num_batches: int
    batch_size: int
    seed: int
    coverage = Coverage.ONCE

    def slices(self, worker: WorkerInfo, epoch: int, attempt: int) -> list[ShardSlice]:
        """This worker's span of the epoch's sequence; the same in every attempt, except for the order."""
        generator = _generator(self.seed, Stream.SHARDS, epoch)
        order = generator.permutation(len(self.sizes))
        # Begun at a drawn sample, since with few shards the workers' spans would otherwise meet at the same places.
        start = int(generator.integers(self.sizes.sum()))
        first, last = worker_span(self.num_batches, self.batch_size, worker)
        length = self.num_batches * self.batch_size * worker.world_size
        begin, end = single_visits(int(self.sizes.sum()), length, first, last)
        slices = [one._replace(has_repeat=True) for one in cut_shards(order, self.sizes, start + first, start + begin)]
        slices += cut_shards(order, self.sizes, start + begin, start + end)
        slices += [one._replace(is_repeat=True) for one in cut_shards(order, self.sizes, start + end, start + last)]
        if attempt > 0:
            random.Random(derive_seed(self.seed, Stream.SHARDS, epoch, *worker, attempt)).shuffle(slices)
        return slices


@dataclass(frozen=True, eq=False)
class ShardSubset:
    """The samples of shards that are not excluded."""

    sizes: Ints  # [S], of whole shards
    exclusions: Bitmap
    counts: Ints  # [S], how many samples of each shard are not excluded

    @classmethod
    def of(cls, sizes: Ints, exclusions: Bitmap) -> ShardSubset:
        """Count them."""
        ends = np.cumsum(sizes)
        bounds = zip((ends - sizes).tolist(), ends.tolist(), strict=True)
        counts = np.array([len(unset_positions(exclusions, *bound)) for bound in bounds], np.int64)
        return cls(sizes, exclusions, counts)

    def ordinals(self, shards: Sequence[int], spans: Sequence[range]) -> list[UnsetPositions]:
        """For each shard, the samples at the positions of a span among those that are not excluded."""
        ends = np.cumsum(self.sizes)
        return [
            UnsetPositions(
                self.exclusions, int(ends[shard] - self.sizes[shard]), int(ends[shard]), span.start, span.stop
            )
            for shard, span in zip(shards, spans, strict=True)
        ]


@dataclass(frozen=True)
class SubsetPlan:
    """Shards of known sizes with exclusions: every other sample once an epoch.

    Shards of which all samples are excluded are not read.
    """

    subset: ShardSubset
    num_batches: int
    batch_size: int
    seed: int
    coverage = Coverage.ONCE

    @property
    def sizes(self) -> Ints:
        """[S], of whole shards."""
        return self.subset.sizes

    def slices(self, worker: WorkerInfo, epoch: int, attempt: int) -> list[ShardSlice]:
        """This worker's span of the sequence of samples that are not excluded; see :meth:`SpanPlan.slices`."""
        counted = SpanPlan(self.subset.counts, self.num_batches, self.batch_size, self.seed)
        slices = counted.slices(worker, epoch, attempt)
        spans = [range(one.ordinals[0], one.ordinals[-1] + 1) for one in slices]
        ordinals = self.subset.ordinals([one.shard for one in slices], spans)
        return [one._replace(ordinals=chosen) for one, chosen in zip(slices, ordinals, strict=True)]


@dataclass(frozen=True)
class RemainderPlan:
    """The samples of an epoch that were not visited before it was stopped, each once.

    If they do not suffice for a worker's batches, because few are left and some of these are bad, it fills up with
    samples of the whole epoch.
    """

    whole: SpanPlan | SubsetPlan
    visits: Bitmap  # with those that the whole epoch excludes
    num_batches: int  # of a rank, for the rest
    coverage = Coverage.ONCE

    def slices(self, worker: WorkerInfo, epoch: int, attempt: int) -> list[ShardSlice]:
        """This worker's span of the samples that are left; in later attempts its span of the whole epoch."""
        whole = self.whole
        if attempt > 0:
            return whole.slices(worker, epoch, attempt)
        left = ShardSubset.of(whole.sizes, self.visits)
        return SubsetPlan(left, self.num_batches, whole.batch_size, whole.seed).slices(worker, epoch, 0)


@dataclass(frozen=True)
class CyclePlan:
    """Shards of unknown sizes: each worker has its own whole shards, and begins again after the last of them."""

    num_shards: int  # at least as many as there are workers
    seed: int
    coverage = Coverage.CYCLE

    def slices(self, worker: WorkerInfo, epoch: int, attempt: int) -> list[ShardSlice]:
        """Every ``worker.total_workers``-th shard of an order that differs by epoch."""
        order = _generator(self.seed, Stream.SHARDS, epoch).permutation(self.num_shards)
        own = [ShardSlice(int(shard), range(sys.maxsize)) for shard in order[worker.global_id :: worker.total_workers]]
        if attempt > 0:
            random.Random(derive_seed(self.seed, Stream.SHARDS, epoch, *worker, attempt)).shuffle(own)
        return own


def draw_shards(weights: list[float], count: int, seed: int) -> list[int]:
    """``count`` shards drawn with replacement; a shard of twice the weight comes twice as often."""
    return random.Random(seed).choices(range(len(weights)), weights=weights, k=count)


@dataclass(frozen=True)
class ResamplingPlan:
    """Shards drawn with replacement, by weight."""

    weights: list[float]  # [S]; a shard that is known to have no sample, or only excluded ones, is never drawn
    sizes: Ints | None  # [S], or None if they are unknown
    seed: int
    subset: ShardSubset | None = None  # if some samples are excluded
    coverage = Coverage.DRAWS

    def slices(self, worker: WorkerInfo, epoch: int, attempt: int) -> list[ShardSlice]:
        """As many draws as there are shards, other ones in every attempt."""
        seed = derive_seed(self.seed, Stream.RESAMPLE, epoch, *worker, attempt)
        counts = self.sizes if self.subset is None else self.subset.counts
        if counts is None:
            shards = draw_shards(self.weights, len(self.weights), seed)
            return [ShardSlice(shard, range(sys.maxsize)) for shard in shards]
        weights = [weight * (count > 0) for weight, count in zip(self.weights, counts.tolist(), strict=True)]
        shards = draw_shards(weights, len(weights), seed)
        spans = [range(int(counts[shard])) for shard in shards]
        return list(map(ShardSlice, shards, spans if self.subset is None else self.subset.ordinals(shards, spans)))


def share_shards(num_shards: int, worker: WorkerInfo) -> list[ShardSlice]:
    """What a worker reads of a set that is read once, whole, by all workers together; sizes need not be known.

    Each worker gets the same number of whole shards. Each of the remaining shards is shared by several workers, which
    take turns by sample.
    """
    whole = num_shards - num_shards % worker.total_workers
    slices = [ShardSlice(shard, range(sys.maxsize)) for shard in range(worker.global_id, whole, worker.total_workers)]
    left = num_shards - whole
    if left:
        turn, shard = divmod(worker.global_id, left)
        readers = -(-(worker.total_workers - shard) // left)
        slices.append(ShardSlice(whole + shard, range(turn, sys.maxsize, readers)))
    return slices
