"""What the training loaders of all formats share: raw samples in, whole batches out.

Shapes: N pairs of this rank, L tokens, W bytes of the longest key.

Every loader worker owes a fixed number of batches an epoch. Samples that cannot be used are counted and left out; a
worker that runs short for it reads its own samples again, so that all ranks get the same number of batches.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import DataLoader, IterableDataset

from dissect_clip.batch import Batch
from dissect_clip.config import Config
from dissect_clip.data.decode import RawSample, decode_captions, decode_image
from dissect_clip.data.skips import BadSampleError, SkipBoard, SkipCounter, counted_before
from dissect_clip.data.split import Place, place_here, worker_batches
from dissect_clip.dist import World
from dissect_clip.errors import TrainingError
from dissect_clip.seeding import Stream, derive_seed, seeded

Transform = Callable[[Any], Tensor]
"""PIL image -> [3, H, W] float."""
Tokenizer = Callable[[list[str]], Tensor]
"""N texts -> [N, L] int64."""


class Source(Protocol):
    """Where a worker's raw samples come from. Picklable."""

    @property
    def repeats(self) -> bool:
        """Whether a later attempt gives the same samples again."""
        ...

    def samples(self, place: Place, epoch: int, attempt: int, skips: SkipCounter) -> Iterator[RawSample]:
        """This worker's samples of an epoch, in an order that every attempt draws anew."""
        ...

    def describe(self, place: Place, epoch: int) -> str:
        """The files that the samples come from, for a message."""
        ...


class Pair(NamedTuple):
    """A decoded image-caption pair."""

    image: Tensor  # [3, H, W]
    caption: str
    sample_id: int
    key: str


def pack_keys(keys: Sequence[str]) -> Tensor:
    """N names -> [N, W] uint8, in UTF-8, padded with 0."""
    encoded = [key.encode("utf-8", "surrogateescape") for key in keys]
    width = max(map(len, encoded))
    padded = b"".join(key.ljust(width, b"\0") for key in encoded)
    return torch.frombuffer(bytearray(padded), dtype=torch.uint8).reshape(len(keys), width)


class TrainStream(IterableDataset[Batch]):
    """Batches of one epoch; iterated by every loader worker, each making its own share of them."""

    def __init__(
        self,
        source: Source,
        config: Config,
        world: World,
        num_batches: int,
        transform: Transform,
        tokenizer: Tokenizer,
    ) -> None:
        self.source = source
        self.num_batches = num_batches
        self.skips = SkipBoard(config.workers)
        self.epoch = torch.zeros((), dtype=torch.int64)
        self.epoch.share_memory_()  # type: ignore[no-untyped-call]
        self._rank, self._world_size = world.rank, world.size
        self._batch_size, self._seed = config.batch_size, config.seed
        self._json_field, self._with_keys = config.json_caption_key, config.record
        self._transform, self._tokenizer = transform, tokenizer

    def __iter__(self) -> Iterator[Batch]:
        place = place_here(self._rank, self._world_size)
        epoch = int(self.epoch)
        pairs = self._pairs(place, epoch)
        for number in range(worker_batches(self.num_batches, place.worker, place.workers)):
            # Nothing is yielded inside, so the training process's generators are as before when it goes on.
            with seeded(derive_seed(self._seed, Stream.AUGMENT, epoch, place.rank, place.worker, number)):
                batch = self._collate(list(itertools.islice(pairs, self._batch_size)))
            yield batch

    def _pairs(self, place: Place, epoch: int) -> Iterator[Pair]:
        """Decoded pairs without end.

        Raises:
            TrainingError: a whole pass gave none.
        """
        skips = self.skips.counter(place.worker)
        for attempt in itertools.count():
            if attempt == 1 and self.source.repeats:
                skips = counted_before()
            usable = 0
            for sample in self.source.samples(place, epoch, attempt, skips):
                try:
                    pair = self._decode(sample)
                except BadSampleError as bad:
                    skips.add(bad.kind, sample.shard, sample.key, str(bad))
                else:
                    usable += 1
                    yield pair
            if usable == 0:
                skipped = {kind: count for kind, count in self.skips.totals().items() if count}
                raise TrainingError(
                    f"no usable image-caption pair in the training data of rank {place.rank}, loader worker "
                    f"{place.worker} ({self.source.describe(place, epoch)}); skipped on this rank: "
                    f"{skipped}. The log says what is wrong with the first of each kind"
                )

    def _decode(self, sample: RawSample) -> Pair:
        caption = decode_captions(sample.files, self._json_field)[0]
        image = self._transform(decode_image(sample.files))
        return Pair(image, caption, sample.sample_id, sample.key)

    def _collate(self, pairs: list[Pair]) -> Batch:
        return Batch(
            image=torch.stack([pair.image for pair in pairs]),
            text=self._tokenizer([pair.caption for pair in pairs]),
            sample_id=torch.tensor([pair.sample_id for pair in pairs], dtype=torch.int64),
            key=pack_keys([pair.key for pair in pairs]) if self._with_keys else None,
        )


def make_loader(stream: IterableDataset[Any], workers: int, world: World) -> DataLoader[Any]:
    """A loader of a stream's whole batches, in ``workers`` processes that stay alive between epochs."""
    return DataLoader(
        stream,
        batch_size=None,
        num_workers=workers,
        persistent_workers=workers > 0,
        pin_memory=world.device.type == "cuda",
        # Without one of its own the loader draws a seed from the training process's generator in every epoch.
        generator=torch.Generator(),
    )


@dataclass
class TrainData:
    """The training data as this rank sees it."""

    loader: DataLoader[Batch]
    """One epoch is exactly ``num_batches`` batches of exactly ``--batch-size`` pairs, the same on all ranks."""
    stream: TrainStream
    num_samples: int
    """Size of the data set: 0 <= sample_id < num_samples."""
    fingerprint: str
    """Hex digest of what the ids stand for: base names and sizes of the shards, or the rows of a table."""
    shard_names: tuple[str, ...]
    find_shard: Callable[[NDArray[np.int64]], NDArray[np.int32]]

    @property
    def num_batches(self) -> int:
        """Batches of this rank in an epoch."""
        return self.stream.num_batches

    def set_epoch(self, epoch: int) -> None:
        """Say which epoch the next pass over the loader is, from 0; begins the counts of skipped samples anew."""
        self.stream.epoch.fill_(epoch)
        self.stream.skips.clear()

    def skipped(self) -> dict[str, int]:
        """Samples of this rank left out since :meth:`set_epoch`, by reason. Not collective."""
        return self.stream.skips.totals()

    def locate(self, sample_id: NDArray[np.int64]) -> NDArray[np.int32]:
        """[N] ids -> [N] places of their shards in ``shard_names``."""
        return self.find_shard(sample_id)
