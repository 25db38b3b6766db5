"""What the training loaders of all formats share: raw samples in, whole batches out, and on after a stop.

Shapes: N pairs of this rank, L tokens, W bytes of the longest key, M samples in the data set, V loader workers of all
ranks, B bytes of packed rows.

Every loader worker owes a fixed number of batches an epoch. Samples that cannot be used are counted and left out; a
worker that runs short for it reads its own samples again, so that all ranks get the same number of batches.

Each batch tells where its worker stands after it. So the training process knows at any time from where the workers
would have to go on to make the batches that it has not taken yet, however many they have made ahead.
"""

from __future__ import annotations

import atexit
import contextlib
import dataclasses
import itertools
import weakref
from collections.abc import Callable, Generator, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import DataLoader, IterableDataset

from dissect_clip.config.settings import Config
from dissect_clip.data.batch import Batch
from dissect_clip.data.formats.decode import RawSample, decode_captions
from dissect_clip.data.formats.pixels import ImageReader, Pixels, stack_pixels
from dissect_clip.data.sampling.plan import Coverage, WorkerInfo, count_batches, current_worker, worker_batches
from dissect_clip.data.sampling.progress import (
    Bitmap,
    WorkerProgress,
    count_set,
    empty_bitmap,
    nth_unset,
    pack_all,
    set_bits,
    unpack_all,
)
from dissect_clip.data.skips import BadSampleError, Skip, SkipCounter, SkipRow, pack_rows, silent_counter
from dissect_clip.distributed.signals import leave_to_the_parent
from dissect_clip.distributed.world import World
from dissect_clip.errors import TrainingError
from dissect_clip.models.openclip_compat import shut_down_workers
from dissect_clip.seeding import Stream, derive_seed, seeded

_UNION_BYTES = 1 << 20
"""Bytes of the flags of visited samples that the ranks bring together at a time, as 8 MiB of numbers."""

Transform = Callable[[Any], Tensor]
"""PIL image -> [3, H, W] float."""
Tokenizer = Callable[[list[str]], Tensor]
"""N texts -> [N, L] int64."""


class Preselection(Protocol):
    """What to decode of N samples."""

    @property
    def order(self) -> Tensor:
        """[N] int64, places, the ones wanted most first."""
        ...

    @property
    def count(self) -> int:
        """How many are wanted."""
        ...


class Preselector(Protocol):
    """Says which of the samples that were read are to be decoded. Picklable."""

    def __call__(self, ids: Tensor, once: Tensor, epoch: int, seed: int) -> Preselection:
        """``ids`` [N] int64; ``once`` [N] bool: whether the sample was not and will not be there again in the epoch."""
        ...


class Samples(Protocol):
    """A worker's raw samples of one attempt, to be iterated once."""

    def __iter__(self) -> Iterator[RawSample]: ...

    @property
    def position(self) -> tuple[int, ...]:
        """What :meth:`Source.samples` needs to go on behind the sample that was given last."""
        ...


class Source(Protocol):
    """Where a worker's raw samples come from. Picklable."""

    @property
    def coverage(self) -> Coverage:
        """What of the data set an epoch reads."""
        ...

    @property
    def shuffle_buffer(self) -> int:
        """In how many samples a worker shuffles; 0 where rows are read in a shuffled order."""
        ...

    def samples(
        self, place: WorkerInfo, epoch: int, attempt: int, skips: SkipCounter, position: tuple[int, ...]
    ) -> Samples:
        """This worker's samples of an epoch, in an order that every attempt draws anew; those from ``position`` on.

        What lies before is neither decoded nor counted.
        """
        ...

    def rest(self, visited: Bitmap, num_batches: int) -> Source:
        """The samples that are not visited, each once, as ``num_batches`` batches of each rank.

        Later attempts read the whole epoch's. Only where the coverage is ``ONCE``.
        """
        ...

    def describe(self, place: WorkerInfo, epoch: int) -> str:
        """The files that the samples come from, for a message."""
        ...


@dataclass(frozen=True)
class EpochPass:
    """What this rank's workers give of an epoch: all of it, or what is left after a stop."""

    source: Source
    num_batches: int  # of this rank, with those taken before a stop that was gone on from as it was
    rows: tuple[WorkerProgress, ...]  # where its workers begin, by worker
    first: int = 0  # number of every worker's first batch, which seeds its augmentation
    visited: Bitmap | None = None  # samples visited so far; None where they are not told apart
    left_out: Bitmap | None = None  # of those the ones that ``source`` leaves out; None where it is the whole epoch
    recounts_skips: bool = False  # whether bad samples that were met before the stop are met, and counted, again

    @property
    def taken(self) -> int:
        """Batches that were taken before."""
        return sum(row.batches for row in self.rows)


def _beginnings(workers: int, attempt: int = 0) -> tuple[WorkerProgress, ...]:
    return tuple(WorkerProgress(worker, attempt) for worker in range(workers))


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
        left_out: Bitmap | None = None,
    ) -> None:
        """``left_out``: samples that ``source`` never gives, where there are such; they count as visited."""
        self.config = config
        self.rank, self.world_size = world.rank, world.size
        visited = (
            (empty_bitmap(num_samples) if left_out is None else left_out) if source.coverage is Coverage.ONCE else None
        )
        self.whole = EpochPass(source, num_batches, _beginnings(self.workers), visited=visited)
        self.resumed: tuple[int, EpochPass] | None = None
        """An epoch that was stopped, and what is left of it."""
        self.epoch = torch.zeros((), dtype=torch.int64)
        self.epoch.share_memory_()  # type: ignore[no-untyped-call]
        self.read_image, self.tokenizer = ImageReader(transform, config.data.fast_decode), tokenizer
        self.preselector: Preselector | None = None  # set before the first pass
        self.warned: set[Skip] = set()  # in the process that this object is in

    @property
    def workers(self) -> int:
        """Of a rank; the training process itself counts as the only one."""
        return max(1, self.config.data.workers)

    @property
    def layout(self) -> dict[str, int | str | None]:
        """What the batches of an epoch depend on, by name; where it is equal, an epoch goes on exactly."""
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
        """What there is to give of an epoch."""
        return self.resumed[1] if self.resumed is not None and self.resumed[0] == epoch else self.whole

    def __iter__(self) -> Iterator[Batch]:
        epoch = int(self.epoch)
        current = self.epoch_pass(epoch)
        place = current_worker(self.rank, self.world_size)
        # The loader takes the next batch from the first process, whose turn it need not be.
        place = place._replace(worker=(place.worker + current.taken) % place.workers)
        made = current.rows[place.worker].batches
        left = range(made, worker_batches(current.num_batches, place.worker, place.workers))
        if not left:  # nor need there be anything to read
            return
        pairs = _Pairs(self, current, place, epoch)
        with contextlib.closing(pairs):
            for number in left:
                here = (epoch, place.rank, place.worker, current.first + number)
                # Nothing is yielded inside, so the training process's generators are as before when it goes on.
                with seeded(derive_seed(self.config.training.seed, Stream.AUGMENT, *here)):
                    chosen = pairs.take(
                        self.config.training.batch_size, derive_seed(self.config.training.seed, Stream.SELECT, *here)
                    )
                    batch = self._collate(chosen, pairs, number + 1)
                yield batch

    def _collate(self, chosen: list[Pair], pairs: _Pairs, batches: int) -> Batch:
        return Batch(
            image=stack_pixels([pair.image for pair in chosen]),
            text=self.tokenizer([pair.caption for pair in chosen]),
            sample_id=torch.tensor([pair.sample_id for pair in chosen], dtype=torch.int64),
            key=pack_keys([pair.key for pair in chosen]) if self.config.selection.record else None,
            progress=pairs.progress(batches).pack(),
            skipped=pairs.drain(),
            normalization=self.read_image.normalization,
            num_read=None if self.preselector is None else self.config.training.batch_size,
            undecoded_ids=pairs.undecoded_ids,
        )


class _Read(NamedTuple):
    """A sample that was read and not yet decoded."""

    sample: RawSample
    skips: SkipCounter  # where it is counted if it cannot be used
    once: bool  # whether it comes once in the epoch, as far as is known beforehand, and this is that time


class _Pairs:
    """The pairs of a worker, without end, and where it stands."""

    def __init__(self, stream: TrainStream, current: EpochPass, place: WorkerInfo, epoch: int) -> None:
        self._stream, self._pass, self._place, self._epoch = stream, current, place, epoch
        begin = current.rows[place.worker]
        self._attempt, self._usable = begin.attempt, begin.usable
        self._counts = torch.zeros(len(Skip), dtype=torch.int64)
        self._counts[: len(begin.counts)] = torch.tensor(begin.counts, dtype=torch.int64)
        self._rows: list[SkipRow] = []
        self._samples = self._open(begin.position)
        self._reading = self._read()
        self._undecided = 0  # samples that were read, and neither decoded nor passed over
        self.undecoded_ids: Tensor | None = None
        """[P] int64, the ids of the samples among which the last pairs were chosen, and that were not decoded."""

    def take(self, size: int, seed: int) -> list[Pair]:
        """The next ``size`` pairs; with a chooser the ones it wants of the next ``size`` samples, in its order.

        For one that cannot be used the next best is taken. ``seed`` is for the chooser.

        Raises:
            TrainingError: a whole attempt gave none.
        """
        chooser = self._stream.preselector
        if chooser is None:
            return self._decode_some(self._reading, size)
        read = list(itertools.islice(self._reading, size))
        ids = torch.tensor([one.sample.sample_id for one in read])
        choice = chooser(ids, torch.tensor([one.once for one in read]), self._epoch, seed)
        places = iter(choice.order.tolist())
        pairs = self._decode_some((read[place] for place in places), choice.count)
        self.undecoded_ids = ids[list(places)]
        self._undecided = 0
        return pairs + self._decode_some(self._reading, choice.count - len(pairs))

    def close(self) -> None:
        """Let go of the shard that is open and of the samples that are shuffled: reading refers to this object."""
        self._reading.close()

    def _decode_some(self, samples: Iterator[_Read], count: int) -> list[Pair]:
        """Pairs of the first ``count`` samples that can be used, or of fewer if there are no more."""
        pairs: list[Pair] = []
        while len(pairs) < count and (read := next(samples, None)) is not None:
            self._undecided -= 1
            try:
                pairs.append(self._decode(read.sample))
            except BadSampleError as bad:
                _count(read, bad)
            else:
                self._usable += 1
        return pairs

    def progress(self, batches: int) -> WorkerProgress:
        """Where the worker stands after so many batches."""
        counts = tuple(self._counts.tolist())
        return WorkerProgress(self._place.worker, self._attempt, self._usable, batches, counts, self._samples.position)

    def drain(self) -> Tensor | None:
        """[B] what was left out since the last call; None for nothing."""
        packed = pack_rows(self._rows) if self._rows else None
        self._rows.clear()
        return packed

    def _open(self, position: tuple[int, ...]) -> Samples:
        source = self._pass.source
        again = self._attempt > 0 and source.coverage is not Coverage.DRAWS
        self._skips = silent_counter() if again else SkipCounter(self._counts, self._stream.warned, self._rows)
        return source.samples(self._place, self._epoch, self._attempt, self._skips, position)

    def _read(self) -> Generator[_Read, None, None]:
        """Samples that are not known to be bad.

        Raises:
            TrainingError: a whole attempt gave none.
        """
        while True:
            for sample in self._samples:
                once = self._attempt == 0 and not (sample.again or sample.twice)
                read = _Read(sample, self._skips, once)
                if sample.problem is not None:
                    _count(read, sample.problem)
                else:
                    self._undecided += 1
                    yield read
            # Of the rest of an epoch a worker may have bad samples only; then it has the whole epoch's to fill up with.
            none = self._usable == 0 and self._undecided == 0
            if none and (self._attempt > 0 or self._pass.left_out is None):
                raise TrainingError(self._explain())
            self._attempt, self._usable = self._attempt + 1, 0
            self._samples = self._open(())

    def _decode(self, sample: RawSample) -> Pair:
        caption = decode_captions(sample.files, self._stream.config.data.json_caption_key)[0]
        return Pair(self._stream.read_image(sample.files), caption, sample.sample_id, sample.key)

    def _explain(self) -> str:
        skipped = {kind.label: count for kind, count in zip(Skip, self._counts.tolist(), strict=True) if count}
        return (
            f"no usable image-caption pair in the training data of rank {self._place.rank}, loader worker "
            f"{self._place.worker} ({self._pass.source.describe(self._place, self._epoch)}); skipped by this worker: "
            f"{skipped}. The log says what is wrong with the first of each kind"
        )


def _count(read: _Read, bad: BadSampleError) -> None:
    skips = silent_counter() if read.sample.again else read.skips
    skips.add(bad.kind, read.sample.shard, read.sample.key, str(bad))


def make_loader(stream: IterableDataset[Any], workers: int, world: World) -> DataLoader[Any]:
    """A loader of a stream's whole batches, in ``workers`` processes that stay alive between epochs."""
    loader: DataLoader[Any] = DataLoader(
        stream,
        batch_size=None,
        num_workers=workers,
        persistent_workers=workers > 0,
        pin_memory=world.device.type == "cuda",
        # Without one of its own the loader draws a seed from the training process's generator in every epoch.
        generator=torch.Generator(),
        worker_init_fn=leave_to_the_parent,
    )
    atexit.register(_end_workers, weakref.ref(loader))
    return loader


def _end_workers(loader: weakref.ref[DataLoader[Any]]) -> None:
    """End the workers of a loader that is still there when Python exits, as after an error.

    Python itself would send them one SIGTERM, which they leave to the training process, and wait for ever.
    """
    remaining = loader()
    if remaining is not None:
        shut_down_workers(remaining)


def _union(bits: Bitmap, world: World) -> Bitmap:
    """Flags that are set on any rank, as a copy; collective."""
    union: Bitmap = bits.copy()
    if world.size > 1:
        for begin in range(0, len(bits), _UNION_BYTES):
            part = slice(begin, begin + _UNION_BYTES)
            flags = torch.from_numpy(np.unpackbits(bits[part])).to(world.device)  # NCCL has no bitwise or
            union[part] = np.packbits(world.max(flags).cpu().numpy())
    return union


def _tensor(bits: Bitmap | None) -> Tensor | None:
    return None if bits is None else torch.from_numpy(bits)


def _differences(then: dict[str, int | str | None], now: dict[str, int | str | None]) -> str:
    return ", ".join(f"{name} is {now[name]}, was {then.get(name)}" for name in now if now[name] != then.get(name))


@dataclass
class TrainData:
    """The training data as this rank sees it."""

    world: World
    loader: DataLoader[Batch]
    """One epoch is exactly ``num_batches`` batches of exactly ``--batch-size`` pairs, the same on all ranks."""
    stream: TrainStream
    num_samples: int
    """Size of the data set: 0 <= sample_id < num_samples."""
    fingerprint: str
    """Hex digest of what the ids stand for: base names and sizes of the shards, or the rows of a table.

    With --train-keep that of the list follows after a ``+``.
    """
    shard_names: tuple[str, ...]
    shard_sizes: NDArray[np.int64] | None
    """Samples of each shard in ``shard_names``; None where they are not known."""
    find_shard: Callable[[NDArray[np.int64]], NDArray[np.int32]]
    subset_size: int
    """Samples of an epoch: those on the list of --train-keep, or all."""
    left_out: Bitmap | None = None
    """The samples that are not on the list of --train-keep; None without one."""
    _pass: EpochPass = field(init=False)
    _rows: list[WorkerProgress] = field(init=False)  # where the workers stand after the last taken batch
    _visited: Bitmap | None = field(init=False)
    _skip_rows: list[Tensor] = field(init=False, default_factory=list)

    def __post_init__(self) -> None:
        self.set_epoch(0)

    def subset_ids(self, numbers: Tensor) -> Tensor:
        """The ids [n] int64 of the samples with these ``numbers`` [n], rising, among those that are trained on."""
        if self.left_out is None:
            return numbers
        return torch.from_numpy(nth_unset(self.left_out, numbers.numpy()))

    @property
    def num_batches(self) -> int:
        """Batches of this rank in a whole epoch."""
        return self.stream.whole.num_batches

    @property
    def remaining_batches(self) -> int:
        """Batches of this rank in the pass that :meth:`set_epoch` began; fewer where the epoch was resumed inside."""
        return self._pass.num_batches - self._pass.taken

    @property
    def recounts_skips(self) -> bool:
        """Whether bad samples that were met in this epoch before a stop are met again, so that their count is new."""
        return self._pass.recounts_skips

    def set_epoch(self, epoch: int) -> None:
        """Say which epoch the next pass over the loader is, from 0; begins the counts of skipped samples anew.

        In an epoch that is resumed they go on.
        """
        self.stream.epoch.fill_(epoch)
        self._pass = self.stream.epoch_pass(epoch)
        self._rows = list(self._pass.rows)
        self._visited = None if self._pass.visited is None else self._pass.visited.copy()

    def consume(self, batch: Batch) -> None:
        """Note a batch as taken, before it goes to the device; every batch once, in their order. Not collective."""
        assert batch.progress is not None
        row = WorkerProgress.unpack(batch.progress.tolist())
        self._rows[row.worker] = row
        if self._visited is not None:
            set_bits(self._visited, batch.sample_id.numpy())
            if batch.undecoded_ids is not None:
                set_bits(self._visited, batch.undecoded_ids.numpy())
        if batch.skipped is not None:
            self._skip_rows.append(batch.skipped.clone())  # off the memory shared with the worker

    def skip_counts(self) -> dict[str, int]:
        """Samples of this rank left out in this epoch up to the last taken batch, by reason. Not collective.

        Every reason is there, so that ranks can add their counts up.
        """
        totals = dict.fromkeys((kind.label for kind in Skip), 0)
        for row in self._rows:
            for kind, count in zip(Skip, row.counts, strict=False):  # an older checkpoint may know fewer kinds
                totals[kind.label] += count
        return totals

    def drain_skips(self) -> Tensor:
        """[B] uint8 packed rows of what this rank left out since the last call, up to the last taken batch."""
        rows = torch.cat([torch.empty(0, dtype=torch.uint8), *self._skip_rows])
        self._skip_rows.clear()
        return rows

    def state_dict(self) -> dict[str, Any]:
        """Where the loaders of all ranks stand in the epoch after the last taken batch; equal on all ranks. Collective.

        ``layout``: what the order of the batches depends on, by name.
        ``batches``, ``first``: see :class:`EpochPass`.
        ``workers`` [sum of P + V] int64: the progress of every worker, rank by rank.
        ``visited`` [ceil(M / 8)] uint8: the samples that were in a batch, and those that --train-keep leaves out; None
        where they are not told apart.
        ``left_out`` [ceil(M / 8)] uint8: of these, the ones from before the epoch was laid out anew; None where it
        never was.
        """
        rows = self.world.all_gather_uneven(pack_all(self._rows).to(self.world.device)).cpu()
        return {
            "layout": self.stream.layout,
            "batches": self._pass.num_batches,
            "first": self._pass.first,
            "workers": rows,
            "visited": _tensor(None if self._visited is None else _union(self._visited, self.world)),
            "left_out": _tensor(self._pass.left_out),
        }

    def resume(self, state: dict[str, Any], epoch: int) -> str | None:
        """Go on in an epoch where :meth:`state_dict` left it; the next pass over it gives what is left. Not collective.

        With an equal layout the batches are those that would have come. Otherwise the samples not yet visited are laid
        out anew, in whole optimizer steps; what was left out as bad is met, and counted, again. Samples that are drawn
        go on with other draws; where shard sizes are unknown, the epoch begins again.

        To be called before the first pass over the loader.

        Returns:
            A sentence that says what differs or is repeated; None where the epoch goes on exactly.
        """
        rows = unpack_all(state["workers"])
        if state["layout"] == self.stream.layout:
            resumed, sentence = self._as_it_was(state, rows), None
        else:
            resumed, told = self._laid_out_anew(state, rows)
            sentence = f"epoch {epoch} goes on otherwise ({_differences(state['layout'], self.stream.layout)}): {told}"
        self.stream.resumed = (epoch, resumed)
        self.set_epoch(epoch)
        return sentence

    def _as_it_was(self, state: dict[str, Any], rows: list[WorkerProgress]) -> EpochPass:
        source, left_out, visited = self.stream.whole.source, state["left_out"], state["visited"]
        if left_out is not None:
            source = source.rest(left_out.numpy(), state["batches"])
        first = self.world.rank * self.stream.workers
        return EpochPass(
            source=source,
            num_batches=state["batches"],
            rows=tuple(rows[first : first + self.stream.workers]),
            first=state["first"],
            visited=None if visited is None else visited.numpy(),
            left_out=None if left_out is None else left_out.numpy(),
        )

    def _laid_out_anew(self, state: dict[str, Any], rows: list[WorkerProgress]) -> tuple[EpochPass, str]:
        """The rest of an epoch in another layout, and what is to say about it."""
        whole, then = self.stream.whole, state["layout"]
        taken = sum(row.batches for row in rows)  # of all ranks
        first = state["first"] + taken // then["world size"]
        if whole.source.coverage is Coverage.DRAWS:
            left = (state["batches"] * then["world size"] - taken) * then["--batch-size"]
            # Draws of an attempt that no worker has begun.
            begin = _beginnings(self.stream.workers, 1 + max(row.attempt for row in rows))
            if self.world.is_main:  # goes on with the counts of all
                counts = map(sum, itertools.zip_longest(*(row.counts for row in rows), fillvalue=0))
                begin = (dataclasses.replace(begin[0], counts=tuple(counts)), *begin[1:])
            told = f"its last {left} samples are other draws than they would have been"
            return EpochPass(whole.source, self._batches(left), begin, first), told
        if state["visited"] is None or whole.visited is None:
            seen = taken * then["--batch-size"]
            told = f"which samples were seen is not known, so the epoch begins again and repeats {seen} samples"
            return dataclasses.replace(whole, first=first, recounts_skips=True), told
        visited: Bitmap = state["visited"].numpy()
        left = self.num_samples - count_set(visited)
        num_batches = self._batches(left)
        rest = whole.source.rest(visited, num_batches)
        return EpochPass(rest, num_batches, whole.rows, first, visited, visited, recounts_skips=True), (
            f"the {left} samples not yet seen are spread anew, each once but for those that fill up the last step; bad "
            "samples met before are met and counted again"
        )

    def _batches(self, num_samples: int) -> int:
        config = self.stream.config
        return count_batches(num_samples, config.training.batch_size, self.world.size, config.training.accum_freq)

    def locate(self, sample_id: NDArray[np.int64]) -> NDArray[np.int32]:
        """[N] ids -> [N] places of their shards in ``shard_names``."""
        return self.find_shard(sample_id)
