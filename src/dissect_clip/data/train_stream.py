"""The training stream, which runs in the loader workers: raw samples in, whole batches out.

Shapes: N pairs of this rank, W bytes of the longest key, P numbers of a worker's progress, B bytes of packed rows.

Every loader worker makes a fixed number of batches an epoch. Samples that cannot be used are counted and skipped; a
worker that runs short because of them reads its own samples again, so that all ranks get the same number of batches.

Each batch carries its worker's progress. So the training process knows at any time where the workers would have to
resume to make the batches that it has not consumed yet, however many they have made ahead.
"""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Generator, Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor
from torch.utils.data import IterableDataset

from dissect_clip.config.settings import Config
from dissect_clip.data.batch import Batch
from dissect_clip.data.formats.decode import RawSample, decode_captions
from dissect_clip.data.formats.pixels import ImageReader, Pixels, stack_pixels
from dissect_clip.data.loaders import Tokenizer, Transform
from dissect_clip.data.sampling.bitmap import Bitmap, empty_bitmap
from dissect_clip.data.sampling.plan import Coverage
from dissect_clip.data.sampling.progress import WorkerProgress, initial_progress
from dissect_clip.data.sampling.workers import WorkerInfo, current_worker, worker_batches
from dissect_clip.data.skips import BadSampleError, Skip, SkipCounter, SkipRow, pack_rows, silent_counter
from dissect_clip.data.source import Preselector, Samples, Source
from dissect_clip.distributed.world import World
from dissect_clip.errors import TrainingError
from dissect_clip.seeding import Stream, derive_seed, seeded


@dataclass(frozen=True)
class EpochPass:
    """What this rank's workers read of an epoch: all of it, or what remains after a stop."""

    source: Source
    num_batches: int  # of this rank, with those consumed before a stop if the layout is still the same
    start: tuple[WorkerProgress, ...]  # where its workers begin, by worker
    first_batch: int = 0  # number of every worker's first batch, which seeds its augmentation
    visits: Bitmap | None = None  # samples visited so far; None if they are not distinguished
    earlier_visits: Bitmap | None = None  # those that ``source`` leaves out; None if it is the whole epoch
    recounts_skips: bool = False  # whether bad samples that were met before the stop are met, and counted, again

    @property
    def num_consumed(self) -> int:
        """Batches that were consumed before."""
        return sum(progress.batches for progress in self.start)


class Pair(NamedTuple):
    """A decoded image-caption pair."""

    image: Pixels
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
        num_samples: int,
        transform: Transform,
        tokenizer: Tokenizer,
        exclusions: Bitmap | None = None,
    ) -> None:
        """``exclusions``: samples that ``source`` never gives, if any; they count as visited."""
        self.config = config
        self.rank, self.world_size = world.rank, world.size
        visits = None
        if source.coverage is Coverage.ONCE:
            visits = empty_bitmap(num_samples) if exclusions is None else exclusions
        self.whole = EpochPass(source, num_batches, initial_progress(self.workers), visits=visits)
        self.partial_epoch: tuple[int, EpochPass] | None = None
        """An epoch that was stopped, and what remains of it."""
        self.epoch = torch.zeros((), dtype=torch.int64)
        self.epoch.share_memory_()  # type: ignore[no-untyped-call]
        self.read_image, self.tokenizer = ImageReader(transform, config.data.fast_decode), tokenizer
        self.preselector: Preselector | None = None  # set before the first pass
        self.warned: set[Skip] = set()  # in the process that this object is in

    @property
    def workers(self) -> int:
        """Workers of a rank; without loader processes the training process is the only one."""
        return max(1, self.config.data.workers)

    @property
    def layout(self) -> dict[str, int | str | None]:
        """What the batches of an epoch depend on, by name; an epoch resumes exactly if it is equal."""
        config, coverage = self.config, self.whole.source.coverage
        return {
            "world size": self.world_size,
            "--workers": self.workers,
            "--batch-size": config.training.batch_size,
            "--accum-freq": config.training.accum_freq,
            "--seed": config.training.seed,
            "an epoch": coverage.value,
            "--train-num-samples": None if coverage is Coverage.ONCE else config.data.train_num_samples,
            "shuffle buffer": self.whole.source.shuffle_buffer,
            "--train-data-upsampling-factors": config.data.train_data_upsampling_factors,
        }

    def epoch_pass(self, epoch: int) -> EpochPass:
        """What there is to read of an epoch."""
        return (
            self.partial_epoch[1] if self.partial_epoch is not None and self.partial_epoch[0] == epoch else self.whole
        )

    def __iter__(self) -> Iterator[Batch]:
        epoch, seed = int(self.epoch), self.config.training.seed
        current = self.epoch_pass(epoch)
        worker = current_worker(self.rank, self.world_size)
        # torch's loader takes its next batch from process 0, but it may be another worker's turn.
        worker = worker._replace(id=(worker.id + current.num_consumed) % worker.num_workers)
        done = current.start[worker.id].batches
        numbers = range(done, worker_batches(current.num_batches, worker.id, worker.num_workers))
        if not numbers:  # then the worker may have nothing to read either
            return
        reader = _PairReader(self, current, worker, epoch)
        with contextlib.closing(reader):
            for number in numbers:
                here = (epoch, worker.rank, worker.id, current.first_batch + number)
                # Nothing is yielded inside, so that the training process gets its generators back as they were.
                with seeded(derive_seed(seed, Stream.AUGMENT, *here)):
                    pairs = reader.take(self.config.training.batch_size, derive_seed(seed, Stream.SELECT, *here))
                    batch = self._collate(pairs, reader, number + 1)
                yield batch

    def _collate(self, pairs: list[Pair], reader: _PairReader, batches: int) -> Batch:
        return Batch(
            image=stack_pixels([pair.image for pair in pairs]),
            text=self.tokenizer([pair.caption for pair in pairs]),
            sample_id=torch.tensor([pair.sample_id for pair in pairs], dtype=torch.int64),
            key=pack_keys([pair.key for pair in pairs]) if self.config.selection.record else None,
            progress=reader.progress(batches).pack(),
            skips=reader.drain_skips(),
            normalization=self.read_image.normalization,
            num_read=None if self.preselector is None else self.config.training.batch_size,
            undecoded_ids=reader.undecoded_ids,
        )


class _Candidate(NamedTuple):
    """A sample that was read and not yet decoded."""

    sample: RawSample
    skips: SkipCounter  # where it is counted if it cannot be used
    once: bool  # whether this is its only visit in the epoch, as far as is known beforehand


class _PairReader:
    """An endless sequence of a worker's pairs, and its position in it."""

    def __init__(self, stream: TrainStream, current: EpochPass, worker: WorkerInfo, epoch: int) -> None:
        self._stream, self._pass, self._worker, self._epoch = stream, current, worker, epoch
        start = current.start[worker.id]
        self._attempt, self._usable = start.attempt, start.usable
        self._counts = torch.zeros(len(Skip), dtype=torch.int64)
        self._counts[: len(start.counts)] = torch.tensor(start.counts, dtype=torch.int64)
        self._skip_rows: list[SkipRow] = []
        self._samples = self._open(start.position)
        self._candidates = self._read()
        self._undecided = 0  # samples that were read, and neither decoded nor rejected
        self.undecoded_ids: Tensor | None = None
        """[P] int64, the ids of the samples that the preselector rejected for the last pairs."""

    def take(self, size: int, seed: int) -> list[Pair]:
        """The next ``size`` pairs; with a preselector, those it wants of the next ``size`` samples, in its order.

        A sample that cannot be used is replaced by the next best. ``seed`` is the preselector's.

        Raises:
            TrainingError: a whole attempt gave no usable sample.
        """
        preselector = self._stream.preselector
        if preselector is None:
            return self._decode_up_to(size, self._candidates)
        read = list(itertools.islice(self._candidates, size))
        ids = torch.tensor([candidate.sample.sample_id for candidate in read])
        once = torch.tensor([candidate.once for candidate in read])
        wanted = preselector(ids, once, self._epoch, seed)
        places = iter(wanted.order.tolist())
        pairs = self._decode_up_to(wanted.count, (read[place] for place in places))
        self.undecoded_ids = ids[list(places)]
        self._undecided = 0
        return pairs + self._decode_up_to(wanted.count - len(pairs), self._candidates)

    def close(self) -> None:
        """Release the open shard and the shuffle buffer: the generator refers to this object."""
        self._candidates.close()

    def _decode_up_to(self, count: int, candidates: Iterator[_Candidate]) -> list[Pair]:
        """Pairs of the first ``count`` candidates that can be used; fewer if they run out."""
        pairs: list[Pair] = []
        while len(pairs) < count and (candidate := next(candidates, None)) is not None:
            self._undecided -= 1
            try:
                pairs.append(self._decode(candidate.sample))
            except BadSampleError as bad:
                _count_skip(candidate, bad)
            else:
                self._usable += 1
        return pairs

    def progress(self, batches: int) -> WorkerProgress:
        """The worker's progress after ``batches`` batches."""
        counts = tuple(self._counts.tolist())
        return WorkerProgress(self._worker.id, self._attempt, self._usable, batches, counts, self._samples.position)

    def drain_skips(self) -> Tensor | None:
        """[B] packed rows of the samples skipped since the last call; None for none."""
        packed = pack_rows(self._skip_rows) if self._skip_rows else None
        self._skip_rows.clear()
        return packed

    def _open(self, position: tuple[int, ...]) -> Samples:
        source = self._pass.source
        is_reread = self._attempt > 0 and source.coverage is not Coverage.DRAWS
        self._skips = silent_counter() if is_reread else SkipCounter(self._counts, self._stream.warned, self._skip_rows)
        return source.samples(self._worker, self._epoch, self._attempt, self._skips, position)

    def _read(self) -> Generator[_Candidate, None, None]:
        """Samples that are not known to be bad.

        Raises:
            TrainingError: a whole attempt gave no usable sample.
        """
        while True:
            for sample in self._samples:
                once = self._attempt == 0 and not (sample.is_repeat or sample.has_repeat)
                candidate = _Candidate(sample, self._skips, once)
                if sample.problem is not None:
                    _count_skip(candidate, sample.problem)
                else:
                    self._undecided += 1
                    yield candidate
            # The rest of an epoch may hold only bad samples for a worker; then the whole epoch's fill its batches.
            none = self._usable == 0 and self._undecided == 0
            if none and (self._attempt > 0 or self._pass.earlier_visits is None):
                raise TrainingError(self._explain())
            self._attempt, self._usable = self._attempt + 1, 0
            self._samples = self._open(())

    def _decode(self, sample: RawSample) -> Pair:
        caption = decode_captions(sample.files, self._stream.config.data.json_caption_key)[0]
        return Pair(self._stream.read_image(sample.files), caption, sample.sample_id, sample.key)

    def _explain(self) -> str:
        skipped = {kind.label: count for kind, count in zip(Skip, self._counts.tolist(), strict=True) if count}
        return (
            f"no usable image-caption pair in the training data of rank {self._worker.rank}, loader worker "
            f"{self._worker.id} ({self._pass.source.describe(self._worker, self._epoch)}); skipped by this worker: "
            f"{skipped}. The log names the problem of the first of each kind"
        )


def _count_skip(candidate: _Candidate, bad: BadSampleError) -> None:
    skips = silent_counter() if candidate.sample.is_repeat else candidate.skips
    skips.add(bad.kind, candidate.sample.shard, candidate.sample.key, str(bad))
