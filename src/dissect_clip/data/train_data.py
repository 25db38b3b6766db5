"""The training data in the training process: its loader, what was consumed of the epoch, and resuming inside it.

Shapes: N pairs of this rank, M samples in the dataset, V loader workers of all ranks, P numbers of a worker's progress,
B bytes of packed rows.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import DataLoader

from dissect_clip.data.batch import Batch
from dissect_clip.data.sampling.bitmap import Bitmap, count_set, nth_unset, set_bits
from dissect_clip.data.sampling.plan import Coverage
from dissect_clip.data.sampling.progress import WorkerProgress, initial_progress, pack_all, unpack_all
from dissect_clip.data.sampling.workers import count_batches
from dissect_clip.data.skips import Skip
from dissect_clip.data.train_stream import EpochPass, TrainStream
from dissect_clip.distributed.world import World

_UNION_BYTES = 1 << 20
"""Bytes of a bitmap that the ranks combine at a time, as 8 MiB of numbers."""


def _union(bitmap: Bitmap, world: World) -> Bitmap:
    """Bits that are set on any rank, as a copy; collective."""
    union: Bitmap = bitmap.copy()
    if world.size > 1:
        for begin in range(0, len(bitmap), _UNION_BYTES):
            part = slice(begin, begin + _UNION_BYTES)
            flags = torch.from_numpy(np.unpackbits(bitmap[part])).to(world.device)  # NCCL has no bitwise or
            union[part] = np.packbits(world.max(flags).cpu().numpy())
    return union


def _as_tensor(bitmap: Bitmap | None) -> Tensor | None:
    return None if bitmap is None else torch.from_numpy(bitmap)


def _as_bitmap(tensor: Tensor | None) -> Bitmap | None:
    return None if tensor is None else tensor.numpy()


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
    """Size of the dataset: 0 <= sample_id < num_samples."""
    fingerprint: str
    """Hex digest of what the ids stand for: base names and sizes of the shards, or the rows of a table.

    With --train-keep that of the list follows after a ``+``.
    """
    shard_names: tuple[str, ...]
    shard_sizes: NDArray[np.int64] | None
    """Samples of each shard in ``shard_names``; None if they are not known."""
    find_shard: Callable[[NDArray[np.int64]], NDArray[np.int32]]
    subset_size: int
    """Samples of an epoch: those on the list of --train-keep, or all."""
    exclusions: Bitmap | None = None
    """The samples that are not on the list of --train-keep; None without a list."""
    _pass: EpochPass = field(init=False)
    _progress: list[WorkerProgress] = field(init=False)  # of the workers, after the last consumed batch
    _visits: Bitmap | None = field(init=False)
    _skip_rows: list[Tensor] = field(init=False, default_factory=list)

    def __post_init__(self) -> None:
        self.set_epoch(0)

    def subset_ids(self, numbers: Tensor) -> Tensor:
        """The ids [n] int64 of the samples with these ``numbers`` [n], rising, among those that are trained on."""
        if self.exclusions is None:
            return numbers
        return torch.from_numpy(nth_unset(self.exclusions, numbers.numpy()))

    def locate(self, sample_id: NDArray[np.int64]) -> NDArray[np.int32]:
        """[N] ids -> [N] positions of their shards in ``shard_names``."""
        return self.find_shard(sample_id)

    # ---- an epoch

    @property
    def num_batches(self) -> int:
        """Batches of this rank in a whole epoch."""
        return self.stream.whole.num_batches

    @property
    def remaining_batches(self) -> int:
        """Batches of this rank in the pass that :meth:`set_epoch` began; fewer if it resumes inside an epoch."""
        return self._pass.num_batches - self._pass.num_consumed

    @property
    def epoch(self) -> int:
        """The epoch that :meth:`set_epoch` named."""
        return int(self.stream.epoch)

    @property
    def inside_epoch(self) -> bool:
        """Whether some of the pass's batches were taken, and some are left."""
        return 0 < sum(row.batches for row in self._progress) < self._pass.num_batches

    @property
    def recounts_skips(self) -> bool:
        """Whether bad samples that were met in this epoch before a stop are met again, so that their count is new."""
        return self._pass.recounts_skips

    def set_epoch(self, epoch: int) -> None:
        """Set the epoch, from 0, of the next pass over the loader, and reset the counts of skipped samples.

        In an epoch that resumes, the counts continue.
        """
        self.stream.epoch.fill_(epoch)
        self._pass = self.stream.epoch_pass(epoch)
        self._progress = list(self._pass.start)
        self._visits = None if self._pass.visits is None else self._pass.visits.copy()

    def consume(self, batch: Batch) -> None:
        """Note that a batch is used, before it goes to the device; every batch once, in order. Not collective."""
        assert batch.progress is not None
        progress = WorkerProgress.unpack(batch.progress.tolist())
        self._progress[progress.worker] = progress
        if self._visits is not None:
            set_bits(self._visits, batch.sample_id.numpy())
            if batch.undecoded_ids is not None:
                set_bits(self._visits, batch.undecoded_ids.numpy())
        if batch.skips is not None:
            self._skip_rows.append(batch.skips.clone())  # off the memory shared with the worker

    def skip_counts(self) -> dict[str, int]:
        """Samples of this rank skipped in this epoch up to the last consumed batch, by reason. Not collective.

        Every reason is a key, so that counts of several ranks can be added.
        """
        totals = dict.fromkeys((kind.label for kind in Skip), 0)
        for progress in self._progress:
            for kind, count in zip(Skip, progress.counts, strict=False):  # an older checkpoint may know fewer kinds
                totals[kind.label] += count
        return totals

    def drain_skips(self) -> Tensor:
        """[B] uint8 packed rows of what this rank skipped since the last call, up to the last consumed batch."""
        rows = torch.cat([torch.empty(0, dtype=torch.uint8), *self._skip_rows])
        self._skip_rows.clear()
        return rows

    # ---- stopping and resuming

    def state_dict(self) -> dict[str, Any]:
        """The position of all ranks' loaders after the last consumed batch; equal on all ranks. Collective.

        ``layout``: what the order of the batches depends on, by name.
        ``batches``, ``first``: ``num_batches`` and ``first_batch`` of :class:`EpochPass`.
        ``workers`` [sum of P + V] int64: the progress of every worker, rank by rank.
        ``visited`` [ceil(M / 8)] uint8: the samples that were in a batch, and those that --train-keep leaves out; None
        if samples are not distinguished.
        ``left_out`` [ceil(M / 8)] uint8: of these, the ones from before the epoch was laid out again; None if it
        never was.
        """
        workers = self.world.all_gather_uneven(pack_all(self._progress).to(self.world.device)).cpu()
        return {
            "layout": self.stream.layout,
            "batches": self._pass.num_batches,
            "first": self._pass.first_batch,
            "workers": workers,
            "visited": _as_tensor(None if self._visits is None else _union(self._visits, self.world)),
            "left_out": _as_tensor(self._pass.earlier_visits),
        }

    def resume(self, state: dict[str, Any], epoch: int) -> str | None:
        """Continue an epoch where :meth:`state_dict` left it; the next pass over it gives the rest. Not collective.

        With an equal layout the batches are those that would have come. Otherwise the samples not yet visited are laid
        out again, in whole optimizer steps; bad samples among the visited ones are met, and counted, again. Samples
        that are drawn continue with other draws; if shard sizes are unknown, the epoch restarts.

        To be called before the first pass over the loader.

        Returns:
            A sentence that names what differs or is repeated; None if the epoch continues exactly.
        """
        workers = unpack_all(state["workers"])
        if state["layout"] == self.stream.layout:
            rest, sentence = self._same_layout(state, workers), None
        else:
            rest, consequence = self._other_layout(state, workers)
            changes = _differences(state["layout"], self.stream.layout)
            sentence = f"epoch {epoch} cannot resume exactly ({changes}): {consequence}"
        self.stream.partial_epoch = (epoch, rest)
        self.set_epoch(epoch)
        return sentence

    def _same_layout(self, state: dict[str, Any], workers: list[WorkerProgress]) -> EpochPass:
        source, earlier = self.stream.whole.source, _as_bitmap(state["left_out"])
        if earlier is not None:
            source = source.rest(earlier, state["batches"])
        first = self.world.rank * self.stream.workers
        return EpochPass(
            source=source,
            num_batches=state["batches"],
            start=tuple(workers[first : first + self.stream.workers]),
            first_batch=state["first"],
            visits=_as_bitmap(state["visited"]),
            earlier_visits=earlier,
        )

    def _other_layout(self, state: dict[str, Any], workers: list[WorkerProgress]) -> tuple[EpochPass, str]:
        """The rest of an epoch in another layout, and a sentence on what that changes."""
        whole, then = self.stream.whole, state["layout"]
        consumed = sum(progress.batches for progress in workers)  # of all ranks
        first_batch = state["first"] + consumed // then["world size"]
        if whole.source.coverage is Coverage.DRAWS:
            left = (state["batches"] * then["world size"] - consumed) * then["--batch-size"]
            # Draws of an attempt that no worker has begun.
            start = initial_progress(self.stream.workers, 1 + max(progress.attempt for progress in workers))
            if self.world.is_main:  # continues the counts of all ranks
                counts = map(sum, itertools.zip_longest(*(progress.counts for progress in workers), fillvalue=0))
                start = (dataclasses.replace(start[0], counts=tuple(counts)), *start[1:])
            rest = EpochPass(whole.source, self._count_batches(left), start, first_batch)
            return rest, f"its last {left} samples are other draws than they would have been"
        if state["visited"] is None or whole.visits is None:
            return dataclasses.replace(whole, first_batch=first_batch, recounts_skips=True), (
                "which samples were seen is not known, so the epoch restarts and repeats "
                f"{consumed * then['--batch-size']} samples"
            )
        visits: Bitmap = state["visited"].numpy()
        left = self.num_samples - count_set(visits)
        num_batches = self._count_batches(left)
        source = whole.source.rest(visits, num_batches)
        return EpochPass(source, num_batches, whole.start, first_batch, visits, visits, recounts_skips=True), (
            f"the {left} samples not yet seen are distributed again, each once except those that fill the last step; "
            "bad samples met before are met and counted again"
        )

    def _count_batches(self, num_samples: int) -> int:
        training = self.stream.config.training
        return count_batches(num_samples, training.batch_size, self.world.size, training.accum_freq)
