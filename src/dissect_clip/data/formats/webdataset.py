"""WebDataset shards: tars in which neighbouring files of one name are a sample. Reading them, for all purposes."""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from dissect_clip.data.formats.decode import MAX_FILE_SIZE, RawSample
from dissect_clip.data.formats.tar import WHOLE, DamagedTarError, ShardReader, TarSample
from dissect_clip.data.formats.urls import name_some
from dissect_clip.data.sampling import shuffle
from dissect_clip.data.sampling.bitmap import Bitmap
from dissect_clip.data.sampling.plan import Coverage, EpochPlan, RemainderPlan, ShardSlice, SpanPlan, SubsetPlan
from dissect_clip.data.sampling.shuffle import ShuffledSamples
from dissect_clip.data.sampling.workers import WorkerInfo
from dissect_clip.data.skips import BadSampleError, Skip, SkipCounter, silent_counter
from dissect_clip.seeding import Stream, derive_seed

_log = logging.getLogger(__name__)


class OrdinalSet:
    """Which samples of a shard to read: those of rising ordinals, except the first ``done`` of them."""

    def __init__(self, ordinals: Sequence[int], done: int = 0) -> None:
        left = ordinals[done:]
        self.stop = ordinals.stop if isinstance(ordinals, range) else ordinals[-1] + 1
        """The first ordinal after them."""
        self._left = left if isinstance(left, range) else frozenset(left)

    def __contains__(self, ordinal: int) -> bool:
        return ordinal in self._left


def _size_problem(sample: TarSample) -> BadSampleError | None:
    if not sample.too_large:
        return None
    suffixes = " and ".join(sample.too_large)
    return BadSampleError(Skip.TOO_LARGE_FILE, f"its {suffixes} has more than {MAX_FILE_SIZE} bytes")


@dataclass(frozen=True)
class ShardFile:
    """A shard and what its reader needs to know of it."""

    url: str
    name: str  # for people
    first_id: int | None  # id of its first sample; None without numbering
    size: int | None  # samples that it should hold; None if that is not known
    timeout: float  # seconds to wait for a remote shard that sends nothing

    def read(
        self,
        ordinals: Sequence[int],
        suffixes: frozenset[str],
        skips: SkipCounter,
        done: int = 0,
        reread: bool = False,
    ) -> Iterator[RawSample]:
        """The samples of these rising ordinals except the first ``done``, which were given before.

        Counts samples that are missing or not readable, and those beyond the recorded size if ``ordinals`` reach it.
        If the size is not known, a shard that cannot be read to its end counts as one lost sample. With ``reread`` the
        samples were all read before, and only those are counted that no longer can be.
        """
        wanted, is_size_known = OrdinalSet(ordinals, done), reread or self.size is not None
        kind, reason = Skip.BELOW_RECORDED_SIZE, f"it has fewer than the recorded {self.size} samples"
        lost = len(ordinals) - done if is_size_known else 0
        try:
            with ShardReader(self.url, suffixes, self.timeout) as reader:
                for sample in reader.read(wanted):
                    done, lost = done + 1, lost - 1
                    sample_id = -1 if self.first_id is None else self.first_id + sample.ordinal
                    yield RawSample(sample_id, self.name, sample.key, sample.files, _size_problem(sample))
                if not reread and wanted.stop == self.size and (extra := reader.finish() - self.size) > 0:
                    reason = f"it has {extra} samples more than the recorded {self.size}"
                    skips.add(Skip.BEYOND_RECORDED_SIZE, self.name, None, reason, extra)
        except (DamagedTarError, OSError) as error:
            is_unread = done == 0 and isinstance(error, OSError)
            kind, reason = (Skip.UNREADABLE_SHARD if is_unread else Skip.DAMAGED_SHARD), str(error)
            lost = lost if is_size_known else 1
        if lost > 0:
            skips.add(kind, self.name, None, reason, lost)


def sample_keys(url: str, timeout: float) -> Iterator[str]:
    """The keys of a shard's samples, from its headers, up to what cannot be read."""
    try:
        with ShardReader(url, timeout=timeout) as reader:
            yield from (sample.key for sample in reader.read(WHOLE))
    except (DamagedTarError, OSError) as error:
        _log.warning("the keys of %s cannot all be read: %s", url, error)


@dataclass(frozen=True)
class ShardSource:
    """Samples of the shards that a plan gives to a worker, through a shuffle buffer."""

    shards: tuple[ShardFile, ...]
    plan: EpochPlan
    suffixes: frozenset[str]
    seed: int

    @property
    def coverage(self) -> Coverage:
        """See :class:`dissect_clip.data.source.Source`."""
        return self.plan.coverage

    @property
    def shuffle_buffer(self) -> int:
        """See :class:`dissect_clip.data.source.Source`."""
        return shuffle.BUFFER_SIZE

    def samples(
        self, worker: WorkerInfo, epoch: int, attempt: int, skips: SkipCounter, position: tuple[int, ...]
    ) -> ShuffledSamples:
        """See :class:`dissect_clip.data.source.Source`."""

        def read(part: ShardSlice, done: int = 0, reread: bool = False) -> Iterator[RawSample]:
            counter = silent_counter() if part.is_repeat else skips
            samples = self.shards[part.shard].read(part.ordinals, self.suffixes, counter, done, reread)
            if not (part.is_repeat or part.has_repeat):
                return samples
            return (sample._replace(is_repeat=part.is_repeat, has_repeat=part.has_repeat) for sample in samples)

        seed = derive_seed(self.seed, Stream.SHUFFLE, epoch, worker.rank, worker.id, attempt)
        return ShuffledSamples(self.plan.slices(worker, epoch, attempt), read, seed, position)

    def rest(self, visits: Bitmap, num_batches: int) -> ShardSource:
        """See :class:`dissect_clip.data.source.Source`."""
        assert isinstance(self.plan, SpanPlan | SubsetPlan)
        return dataclasses.replace(self, plan=RemainderPlan(self.plan, visits, num_batches))

    def describe(self, worker: WorkerInfo, epoch: int) -> str:
        """See :class:`dissect_clip.data.source.Source`."""
        slices = self.plan.slices(worker, epoch, 0)
        return name_some(list(dict.fromkeys(self.shards[part.shard].name for part in slices)))
