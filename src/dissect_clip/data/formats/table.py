"""Sources of tables, whose rows can be read in any order: csv files and synthetic data."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from dissect_clip.config.settings import Config
from dissect_clip.data.evaluation.stream import RetrievalData, retrieval_data
from dissect_clip.data.formats.decode import RawSample
from dissect_clip.data.loaders import Tokenizer, Transform, make_loader
from dissect_clip.data.sampling.bitmap import Bitmap, count_set, inverted
from dissect_clip.data.sampling.plan import Coverage, span_rows
from dissect_clip.data.sampling.subset import SampleNames, list_digest, read_list
from dissect_clip.data.sampling.workers import WorkerInfo, count_batches
from dissect_clip.data.skips import SkipCounter
from dissect_clip.data.train_data import TrainData
from dissect_clip.data.train_stream import TrainStream
from dissect_clip.distributed.world import World
from dissect_clip.errors import SetupError
from dissect_clip.seeding import Stream, derive_seed


class SampleTable(Protocol):
    """Rows that can be read in any order. Picklable."""

    name: str

    def __len__(self) -> int: ...

    def read(self, row: int) -> RawSample:
        """One row."""
        ...

    def keys(self) -> Iterator[str]:
        """The key of each row."""
        ...


class TableSamples:
    """Rows of a table, in a given order, from some place on; see :class:`dissect_clip.data.source.Samples`.

    Those at the places ``once`` come once in the epoch; before them are the first of two times, behind them the second.
    """

    def __init__(self, table: SampleTable, rows: NDArray[np.int64], once: range, done: int) -> None:
        self._table, self._rows, self._once, self._done = table, rows, once, done

    def __iter__(self) -> Iterator[RawSample]:
        """All of them."""
        for row in self._rows[self._done :].tolist():
            has_repeat, is_repeat = self._done < self._once.start, self._done >= self._once.stop
            self._done += 1
            yield self._table.read(row)._replace(has_repeat=has_repeat, is_repeat=is_repeat)

    @property
    def position(self) -> tuple[int, ...]:
        """How many rows are done."""
        return (self._done,)


@dataclass(frozen=True)
class TableSource:
    """Every row of a table that is not left out once an epoch, in an order drawn from (seed, epoch)."""

    table: SampleTable
    num_batches: int
    batch_size: int
    seed: int
    exclusions: Bitmap | None = None  # rows that no attempt gives
    visits: Bitmap | None = None  # rows that the first attempt leaves out, with those
    rest_batches: int = 0  # of a rank, for those that it does not
    coverage = Coverage.ONCE
    shuffle_buffer = 0

    def samples(
        self, worker: WorkerInfo, epoch: int, attempt: int, skips: SkipCounter, position: tuple[int, ...]
    ) -> TableSamples:
        """See :class:`dissect_clip.data.source.Source`."""
        (done,) = position or (0,)
        if attempt == 0 and self.visits is not None:
            rows, once = self._span(self.rest_batches, epoch, worker, self.visits)
            return TableSamples(self.table, rows, once, done)
        rows, once = self._span(self.num_batches, epoch, worker, self.exclusions)
        if attempt > 0:
            seed = derive_seed(self.seed, Stream.SHUFFLE, epoch, worker.rank, worker.id, attempt)
            np.random.Generator(np.random.PCG64(seed)).shuffle(rows)
        return TableSamples(self.table, rows, once, done)

    def _span(
        self, num_batches: int, epoch: int, worker: WorkerInfo, exclusions: Bitmap | None
    ) -> tuple[NDArray[np.int64], range]:
        return span_rows(len(self.table), num_batches, self.batch_size, self.seed, epoch, worker, exclusions)

    def rest(self, visits: Bitmap, num_batches: int) -> TableSource:
        """See :class:`dissect_clip.data.source.Source`."""
        return dataclasses.replace(self, visits=visits, rest_batches=num_batches)

    def describe(self, worker: WorkerInfo, epoch: int) -> str:
        """The table's name."""
        return self.table.name


@dataclass(frozen=True)
class EvaluationTable:
    """Rows that all workers read once, together."""

    table: SampleTable

    def samples(self, worker: WorkerInfo, skips: SkipCounter) -> Iterator[RawSample]:
        """See :class:`dissect_clip.data.evaluation.stream.EvaluationSource`."""
        for row in range(worker.global_id, len(self.table), worker.total_workers):
            yield self.table.read(row)


def _for_tables(config: Config) -> Config:
    """The settings with those that are about files inside shards at rest: a row is a pair, its caption one text."""
    return config.replace(json_caption_key=None, val_captions="whole")


def table_train(
    table: SampleTable, fingerprint: str, config: Config, world: World, transform: Transform, tokenizer: Tokenizer
) -> TrainData:
    """The loader of a table's rows; not collective.

    Raises:
        SetupError: with --dataset-resampled, or where the list of --train-keep does not fit.
    """
    if config.data.dataset_resampled:
        raise SetupError("--dataset-resampled draws shards, which only --dataset-type webdataset has: remove it")
    exclusions, subset_size, sizes = None, len(table), np.array([len(table)])
    if config.data.train_keep is not None:
        keep = read_list(
            config.data.train_keep, SampleNames((table.name,), sizes, lambda _: table.keys()), "--train-keep"
        )
        exclusions, subset_size = inverted(keep, len(table)), count_set(keep)
        fingerprint = f"{fingerprint}+{list_digest(keep)}"
    num_batches = count_batches(subset_size, config.training.batch_size, world.size, config.training.accum_freq)
    source = TableSource(table, num_batches, config.training.batch_size, config.training.seed, exclusions)
    stream = TrainStream(source, _for_tables(config), world, num_batches, len(table), transform, tokenizer, exclusions)
    return TrainData(
        world=world,
        loader=make_loader(stream, config.data.workers, world),
        stream=stream,
        num_samples=len(table),
        fingerprint=fingerprint,
        shard_names=(table.name,),
        shard_sizes=sizes,
        find_shard=all_in_first,
        subset_size=subset_size,
        exclusions=exclusions,
    )


def table_retrieval(
    table: SampleTable, config: Config, world: World, transform: Transform, tokenizer: Tokenizer
) -> RetrievalData:
    """A table's rows as validation data; not collective."""
    return retrieval_data(EvaluationTable(table), _for_tables(config), world, transform, tokenizer)


def all_in_first(sample_id: NDArray[np.int64]) -> NDArray[np.int32]:
    """[N] ids -> [N] zeros: all rows are of the one file."""
    return np.zeros(len(sample_id), np.int32)
