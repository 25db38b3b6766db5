"""Training loaders of several simulated ranks and workers, for the tests of who reads what."""

import io
import signal
import threading
import warnings
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import chain, islice
from typing import Any

import numpy as np
import torch
from shards_util import jittered, tokenize

from dissect_clip.config.settings import Config
from dissect_clip.data import TrainData
from dissect_clip.data import train_stream as stream
from dissect_clip.data.batch import Batch
from dissect_clip.data.formats import csv, synthetic
from dissect_clip.data.formats.urls import expand
from dissect_clip.data.sampling.bitmap import Bitmap
from dissect_clip.data.sampling.shard_ids import ShardIndex
from dissect_clip.data.sampling.workers import WorkerInfo
from dissect_clip.data.train_shards import train_data
from dissect_clip.distributed.world import World


@dataclass(eq=False)
class Meeting:
    """Where threads that stand for ranks hand each other tensors."""

    size: int
    board: dict[int, torch.Tensor] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.barrier = threading.Barrier(self.size, timeout=30)

    def swap(self, rank: int, value: torch.Tensor) -> list[torch.Tensor]:
        self.barrier.wait()
        self.board[rank] = value
        self.barrier.wait()
        return [self.board[number] for number in range(self.size)]


@dataclass(frozen=True)
class ThreadWorld(World):
    """A rank that is a thread; has the collectives that loaders use."""

    meeting: Meeting = field(default_factory=lambda: Meeting(1))

    def all_gather_uneven(self, rows: torch.Tensor) -> torch.Tensor:
        return torch.cat(self.meeting.swap(self.rank, rows))

    def max(self, value: torch.Tensor) -> torch.Tensor:
        return torch.stack(self.meeting.swap(self.rank, value)).amax(0)


def worlds(size: int) -> list[World]:
    """All ranks of a run."""
    meeting = Meeting(size)
    return [ThreadWorld(rank=rank, size=size, meeting=meeting) for rank in range(size)]


def load(
    config: Config,
    world: World | None = None,
    sizes: Sequence[int] | None = None,
    keep: Bitmap | None = None,
) -> TrainData:
    """The loader of one rank; of shards, of the sizes recorded for them or empty where none are, or of a table.

    ``keep``: the samples of shards that are on a list.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # torch, where there are more workers than cores
        if sizes is None:
            table = csv if config.data.train_data else synthetic
            return table.build_train(config, world or World(), jittered, tokenize)
        sources = expand(config.data.train_data)
        index = ShardIndex(tuple(chain(*sources)), np.array(sizes), "test") if len(sizes) else None
        return train_data(config, world or World(), jittered, tokenize, sources, index, keep)


def _turns(data: TrainData) -> Iterator[Batch]:
    """The workers' batches in turn, as torch's loader hands them out, but all made in this process."""
    workers = data.stream.workers
    making = [iter(data.stream) for _ in range(workers)]
    for turn in range(data.remaining_batches + workers):
        place = WorkerInfo(data.world.rank, data.world.size, turn % workers, workers)
        original, stream.current_worker = stream.current_worker, lambda rank, size, place=place: place
        try:
            batch = next(making[turn % workers], None)
        finally:
            stream.current_worker = original
        assert (batch is None) == (turn >= data.remaining_batches)
        if batch is not None:
            yield batch


def passing(data: TrainData, epoch: int, real: bool = False) -> Iterator[Batch]:
    """The batches of a pass, each taken when it is given; ``real`` asks torch's loader for them."""
    data.set_epoch(epoch)
    for batch in data.loader if real else _turns(data):
        data.consume(batch)
        yield batch


def take(data: TrainData, epoch: int, count: int | None = None, real: bool = False) -> list[Batch]:
    """The first ``count`` batches of a pass, or all."""
    return list(islice(passing(data, epoch, real), count))


def states(ranks: Sequence[TrainData]) -> list[dict[str, Any]]:
    """What each rank gives for a checkpoint, as it comes out of one."""
    with ThreadPoolExecutor(len(ranks)) as pool:
        return [reload(state) for state in pool.map(TrainData.state_dict, ranks)]


def reload(state: dict[str, Any]) -> dict[str, Any]:
    """A state, written and read."""
    file = io.BytesIO()
    torch.save(state, file)
    file.seek(0)
    read: dict[str, Any] = torch.load(file, weights_only=True)
    return read


def same(left: Any, right: Any) -> bool:
    """Whether two tensors, states or batches are equal to the bit."""
    if isinstance(left, torch.Tensor):
        return torch.equal(left, right)
    if isinstance(left, dict):
        return left.keys() == right.keys() and all(same(left[name], right[name]) for name in left)
    if isinstance(left, (list, tuple)):
        return len(left) == len(right) and all(map(same, left, right))
    if isinstance(left, Batch):
        return all(same(getattr(left, name), getattr(right, name)) for name in left.__slots__)
    return bool(left == right)


def ids_of(batches: Sequence[Batch]) -> list[int]:
    return [sample_id for batch in batches for sample_id in batch.sample_id.tolist()]


@contextmanager
def within(seconds: float) -> Iterator[None]:
    """Fail where the block takes longer; 0 is for ever."""

    def stop(*_: object) -> None:
        raise TimeoutError(f"not done after {seconds} seconds")

    before = signal.signal(signal.SIGALRM, stop)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
