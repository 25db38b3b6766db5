"""WebDataset shards: tars whose neighbouring files with one name are a sample."""

from __future__ import annotations

import dataclasses
import logging
import os
import random
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import chain, islice
from pathlib import Path
from typing import Protocol

import numpy as np
from numpy.typing import NDArray
from webdataset.filters import shuffle

from dissect_clip.config.settings import Config
from dissect_clip.data.evaluation.stream import RetrievalData, retrieval_data
from dissect_clip.data.formats.decode import MAX_FILE_SIZE, RawSample, caption_suffixes
from dissect_clip.data.formats.tar import WHOLE, DamagedTarError, ShardReader, TarSample
from dissect_clip.data.formats.urls import check_not_empty, check_present, expand, is_local, name_some
from dissect_clip.data.loaders import Tokenizer, TrainData, TrainStream, Transform, make_loader
from dissect_clip.data.sampling.plan import (
    Coverage,
    CyclePlan,
    EpochPlan,
    RemainderPlan,
    ResamplingPlan,
    ShardSlice,
    ShardSubset,
    SpanPlan,
    SubsetPlan,
    WorkerInfo,
    count_batches,
    share_shards,
)
from dissect_clip.data.sampling.progress import Bitmap, inverted
from dissect_clip.data.sampling.shard_ids import ShardIndex, display_names, fingerprint, index_shards
from dissect_clip.data.sampling.shard_sizes import recorded_sizes
from dissect_clip.data.sampling.subset import Names, list_digest, read_list
from dissect_clip.data.skips import BadSampleError, Skip, SkipCounter, silent_counter
from dissect_clip.distributed.world import World
from dissect_clip.errors import SetupError
from dissect_clip.seeding import Stream, derive_seed

_SHUFFLE_BUFFER = 5000
_SHUFFLE_INITIAL = 1000
"""OpenCLIP's sizes, in samples."""

_log = logging.getLogger(__name__)


def _problem(sample: TarSample) -> BadSampleError | None:
    if not sample.too_large:
        return None
    suffixes = " and ".join(sample.too_large)
    return BadSampleError(Skip.TOO_LARGE_FILE, f"its {suffixes} has more than {MAX_FILE_SIZE} bytes")


class OrdinalSet:
    """Which samples of a shard to read: those of rising ordinals, but for the first ``done`` of them."""

    def __init__(self, ordinals: Sequence[int], done: int = 0) -> None:
        left = ordinals[done:]
        self.stop = ordinals.stop if isinstance(ordinals, range) else ordinals[-1] + 1
        """The first ordinal behind them."""
        self._left = left if isinstance(left, range) else frozenset(left)

    def __contains__(self, ordinal: int) -> bool:
        return ordinal in self._left


@dataclass(frozen=True)
class ShardFile:
    """A shard as its reader needs to know it."""

    url: str
    name: str  # for people
    first_id: int | None  # id of its first sample; None where there is no numbering
    size: int | None  # samples it is said to hold; None where that is not known
    timeout: float  # seconds to wait for a remote shard that sends nothing

    def read(
        self,
        ordinals: Sequence[int],
        suffixes: frozenset[str],
        skips: SkipCounter,
        given: int = 0,
        reread: bool = False,
    ) -> Iterator[RawSample]:
        """The samples of these rising ordinals but for the first ``given``, which were given before.

        Counts those that are not there or not readable, and those behind the recorded size where ``ordinals`` go up to
        it. Where the size is not known, a shard that cannot be read to its end counts as one lost sample. With
        ``reread`` the samples were all read before, and only those are counted that no longer can be.
        """
        wanted, known = OrdinalSet(ordinals, given), reread or self.size is not None
        kind, reason = Skip.BELOW_RECORDED_SIZE, f"it has fewer than the recorded {self.size} samples"
        lost = len(ordinals) - given if known else 0
        try:
            with ShardReader(self.url, suffixes, self.timeout) as reader:
                for sample in reader.read(wanted):
                    given, lost = given + 1, lost - 1
                    sample_id = -1 if self.first_id is None else self.first_id + sample.ordinal
                    yield RawSample(sample_id, self.name, sample.key, sample.files, _problem(sample))
                if not reread and wanted.stop == self.size and (extra := reader.finish() - self.size) > 0:
                    reason = f"it has {extra} samples more than the recorded {self.size}"
                    skips.add(Skip.BEYOND_RECORDED_SIZE, self.name, None, reason, extra)
        except (DamagedTarError, OSError) as error:
            unread = given == 0 and isinstance(error, OSError)
            kind, reason = (Skip.UNREADABLE_SHARD if unread else Skip.DAMAGED_SHARD), str(error)
            lost = lost if known else 1
        if lost > 0:
            skips.add(kind, self.name, None, reason, lost)


class ReadPart(Protocol):
    """:meth:`ShardFile.read` of a part's shard."""

    def __call__(self, part: ShardSlice, given: int = 0, reread: bool = False) -> Iterator[RawSample]: ...


class PartsInOrder:
    """The samples of parts of shards, one part after the other, from some place on; knows how far it is."""

    def __init__(self, parts: list[ShardSlice], read: ReadPart, done: int, given: int, uneven: dict[int, int]) -> None:
        self.parts, self._read = parts, read
        self.done = done  # parts read to their end
        self.given = given  # samples of the part after these
        self.uneven = uneven  # samples that a part gave, by its place, where it was not as many as it names

    def __iter__(self) -> Iterator[RawSample]:
        for part in self.parts[self.done :]:
            for sample in self._read(part, given=self.given):
                self.given += 1
                yield sample
            if self.given != len(part.ordinals):
                self.uneven[self.done] = self.given
            self.done, self.given = self.done + 1, 0

    def counts(self) -> list[int]:
        """Samples that each part has given, of those that were begun."""
        ended = [self.uneven.get(place, len(part.ordinals)) for place, part in enumerate(self.parts[: self.done])]
        return [*ended, self.given]


class Shuffled:
    """The samples of parts through a shuffle buffer; see :class:`dissect_clip.data.loaders.Samples`.

    To go on at a position, the buffer is run with numbers in place of the samples that went into it before. It then
    holds the numbers of a few thousand; only these are read again, and only when they come out are they decoded.
    """

    def __init__(self, parts: list[ShardSlice], read: ReadPart, seed: int, position: tuple[int, ...]) -> None:
        self._drawn, done, given, *uneven = position or (0, 0, 0)
        self._in_order = PartsInOrder(parts, read, done, given, dict(zip(uneven[::2], uneven[1::2], strict=True)))
        self._read, self._seed = read, seed

    def __iter__(self) -> Iterator[RawSample]:
        counts = np.array(self._in_order.counts())
        waiting = np.ones(counts.sum(), bool)
        buffer = shuffle(_SHUFFLE_BUFFER, initial=_SHUFFLE_INITIAL, rng=random.Random(self._seed))
        mixed: Iterator[int | RawSample] = buffer(chain(range(len(waiting)), self._in_order))
        waiting[np.fromiter(islice(mixed, self._drawn), np.int64)] = False
        again = self._read_again(np.flatnonzero(waiting), counts)
        for item in mixed:
            self._drawn += 1
            sample = again.pop(item, None) if isinstance(item, int) else item
            if sample is not None:
                yield sample

    def _read_again(self, numbers: NDArray[np.int64], counts: NDArray[np.int64]) -> dict[int, RawSample]:
        """Samples by their numbers, which count what the parts have given; those that are gone are counted as lost."""
        samples: dict[int, RawSample] = {}
        ends = np.cumsum(counts)
        cuts = np.searchsorted(numbers, ends)
        for place, own in enumerate(np.split(numbers, cuts[:-1])):
            if len(own):
                begin = int(ends[place] - counts[place])
                part = self._in_order.parts[place]
                ordinals = part.ordinals[:]
                part = part._replace(ordinals=[ordinals[number - begin] for number in own.tolist()])
                # As many as can still be read: the first ones.
                read = self._read(part, reread=True)
                samples |= {number: sample for sample, number in zip(read, own.tolist(), strict=False)}
        return samples

    @property
    def position(self) -> tuple[int, ...]:
        """Samples out of the buffer, parts read to their end, samples of the next; then parts with their samples."""
        order = self._in_order
        return (self._drawn, order.done, order.given, *chain.from_iterable(order.uneven.items()))


@dataclass(frozen=True)
class ShardSource:
    """Samples of the shards that a plan gives to a worker, through a shuffle buffer."""

    shards: tuple[ShardFile, ...]
    plan: EpochPlan
    suffixes: frozenset[str]
    seed: int

    @property
    def coverage(self) -> Coverage:
        """See :class:`dissect_clip.data.loaders.Source`."""
        return self.plan.coverage

    @property
    def shuffle_buffer(self) -> int:
        """See :class:`dissect_clip.data.loaders.Source`."""
        return _SHUFFLE_BUFFER

    def samples(
        self, place: WorkerInfo, epoch: int, attempt: int, skips: SkipCounter, position: tuple[int, ...]
    ) -> Shuffled:
        """See :class:`dissect_clip.data.loaders.Source`."""

        def read(part: ShardSlice, given: int = 0, reread: bool = False) -> Iterator[RawSample]:
            counter = silent_counter() if part.again else skips
            samples = self.shards[part.shard].read(part.ordinals, self.suffixes, counter, given, reread)
            if not (part.again or part.twice):
                return samples
            return (sample._replace(again=part.again, twice=part.twice) for sample in samples)

        seed = derive_seed(self.seed, Stream.SHUFFLE, epoch, place.rank, place.worker, attempt)
        return Shuffled(self.plan.parts(place, epoch, attempt), read, seed, position)

    def rest(self, visited: Bitmap, num_batches: int) -> ShardSource:
        """See :class:`dissect_clip.data.loaders.Source`."""
        assert isinstance(self.plan, SpanPlan | SubsetPlan)
        return dataclasses.replace(self, plan=RemainderPlan(self.plan, visited, num_batches))

    def describe(self, place: WorkerInfo, epoch: int) -> str:
        """See :class:`dissect_clip.data.loaders.Source`."""
        parts = self.plan.parts(place, epoch, 0)
        return name_some(list(dict.fromkeys(self.shards[part.shard].name for part in parts)))


# ---- training


def parse_factors(text: str, num_sources: int) -> list[float]:
    """``--train-data-upsampling-factors`` as a number for each source.

    Raises:
        SetupError: not as many positive numbers as there are sources.
    """
    flag = f"--train-data-upsampling-factors {text}"
    try:
        factors = [float(factor) for factor in text.split("::")]
    except ValueError as error:
        raise SetupError(f"{flag}: {error}; give numbers joined by ::, as 1::2") from error
    if len(factors) != num_sources:
        raise SetupError(
            f"{flag} has {len(factors)} factors, but --train-data has {num_sources} sources; give one factor for each"
        )
    if not all(0 < factor < float("inf") for factor in factors):
        raise SetupError(f"{flag}: factors must be above 0")
    return factors


@dataclass(frozen=True)
class Found:
    """What rank 0 finds out about the training shards."""

    sources: list[list[str]]  # URLs of each source
    known: dict[str, int]  # sizes by URL, of some shards

    @property
    def urls(self) -> list[str]:
        """All shards, source by source."""
        return [url for source in self.sources for url in source]

    @property
    def complete(self) -> bool:
        """Whether all sizes are known."""
        return all(url in self.known for url in self.urls)


def _total_workers(config: Config, world: World) -> int:
    return world.size * max(1, config.data.workers)


def _too_few(num_shards: int, config: Config, world: World) -> bool:
    """Whether some worker would have no shard of its own, where it needs one."""
    return not config.data.dataset_resampled and num_shards < _total_workers(config, world)


def _needs_ids(config: Config) -> bool:
    return config.selection.select or config.data.train_keep is not None


def _find(config: Config, world: World, run_folder: Path | None) -> Found:
    assert config.data.train_data is not None
    sources = expand(config.data.train_data)
    urls = [url for source in sources for url in source]
    check_present(urls, "--train-data")
    needed = _needs_ids(config) or config.data.train_num_samples is None or _too_few(len(urls), config, world)
    found = Found(sources, recorded_sizes(urls, run_folder, needed, config.data.data_timeout))
    check_not_empty([url for url in urls if url not in found.known], "--train-data")
    return found


def _index(found: Found, config: Config, world: World, run_folder: Path | None) -> ShardIndex | None:
    """The shards' sizes, counted where they are needed; None where the run can do without. Collective."""
    # Local headers are read quickly. Remote shards would be read whole, which a run must not do unless it has to.
    worth_it = all(map(is_local, found.urls)) and not config.data.dataset_resampled
    if found.complete or _needs_ids(config) or config.data.train_num_samples is None or worth_it:
        return index_shards(found.urls, found.known, world, run_folder, config.data.data_timeout)
    if not _too_few(len(found.urls), config, world):
        return None
    raise SetupError(
        f"--train-data has {len(found.urls)} shards, fewer than the {_total_workers(config, world)} loader workers "
        f"({world.size} ranks x --workers {max(1, config.data.workers)}), and their sizes are not known. "
        "Count them once "
        "with\n"
        f"    dissect-clip index '{config.data.train_data}' --output sizes.json\n"
        "and put the file beside the shards, or give fewer --workers"
    )


def _check_num_samples(index: ShardIndex, config: Config) -> None:
    given = config.data.train_num_samples
    if given is not None and given != index.num_samples and not config.data.dataset_resampled:
        raise SetupError(
            f"--train-num-samples {given} is not the size of --train-data, which has {index.num_samples} samples by "
            f"{index.origin}. Remove --train-num-samples, or add --dataset-resampled for epochs of another length"
        )


def _keys(url: str, timeout: float) -> Iterator[str]:
    """The keys of a shard's samples, by its headers, up to what cannot be read."""
    try:
        with ShardReader(url, timeout=timeout) as reader:
            yield from (sample.key for sample in reader.read(WHOLE))
    except (DamagedTarError, OSError) as error:
        _log.warning("the keys of %s are not all known: %s", url, error)


def shard_names(index: ShardIndex, timeout: float) -> Names:
    """How the samples of shards are called in a record and in lists."""
    return Names(display_names(index.urls), index.sizes, lambda place: _keys(index.urls[place], timeout))


def _read_keep(config: Config, world: World, index: ShardIndex) -> Bitmap:
    assert config.data.train_keep is not None
    return read_list(
        config.data.train_keep,
        shard_names(index, config.data.data_timeout),
        "--train-keep",
        world.watchdog.report_progress,
    )


def _plan(
    config: Config, num_batches: int, index: ShardIndex | None, kept: ShardSubset | None, sources: list[list[str]]
) -> EpochPlan:
    if config.data.dataset_resampled:
        text = config.data.train_data_upsampling_factors
        factors = [1.0] * len(sources) if text is None else parse_factors(text, len(sources))
        weights = [factor for factor, source in zip(factors, sources, strict=True) for _ in source]
        return ResamplingPlan(weights, None if index is None else index.sizes, config.training.seed, kept)
    if index is None:
        return CyclePlan(sum(map(len, sources)), config.training.seed)
    if kept is not None:
        return SubsetPlan(kept, num_batches, config.training.batch_size, config.training.seed)
    return SpanPlan(index.sizes, num_batches, config.training.batch_size, config.training.seed)


def _shards(urls: list[str], names: tuple[str, ...], index: ShardIndex | None, timeout: float) -> tuple[ShardFile, ...]:
    if index is None:
        return tuple(ShardFile(url, name, None, None, timeout) for url, name in zip(urls, names, strict=True))
    return tuple(
        ShardFile(url, name, first, size, timeout)
        for url, name, first, size in zip(urls, names, index.offsets.tolist(), index.sizes.tolist(), strict=True)
    )


def _no_ids(sample_id: NDArray[np.int64]) -> NDArray[np.int32]:
    raise ValueError("samples were not numbered in this run, so their shards cannot be told")


def train_data(
    config: Config,
    world: World,
    transform: Transform,
    tokenizer: Tokenizer,
    sources: list[list[str]],
    index: ShardIndex | None,
    keep: Bitmap | None = None,
) -> TrainData:
    """The loader of shards whose sizes are known (``index``), or not; of the samples ``keep`` only. Not collective.

    Raises:
        SetupError: the flags do not fit the shards.
    """
    urls = [url for source in sources for url in source]
    names = display_names(urls)
    if index is not None:
        _check_num_samples(index, config)
    num_samples = config.data.train_num_samples if index is None else index.num_samples
    assert num_samples is not None
    print_of_all = fingerprint(names, [-1] * len(names)) if index is None else index.fingerprint
    left_out = None if keep is None else inverted(keep, num_samples)
    kept = None if left_out is None or index is None else ShardSubset.of(index.sizes, left_out)
    subset_size = num_samples if kept is None else int(kept.counts.sum())
    length = config.data.train_num_samples if config.data.dataset_resampled else None
    num_batches = count_batches(
        length or subset_size, config.training.batch_size, world.size, config.training.accum_freq
    )
    plan = _plan(config, num_batches, index, kept, sources)
    suffixes = caption_suffixes(config.data.json_caption_key)
    source = ShardSource(_shards(urls, names, index, config.data.data_timeout), plan, suffixes, config.training.seed)
    stream = TrainStream(source, config, world, num_batches, num_samples, transform, tokenizer, left_out)
    return TrainData(
        world=world,
        loader=make_loader(stream, config.data.workers, world),
        stream=stream,
        num_samples=num_samples,
        fingerprint=print_of_all if keep is None else f"{print_of_all}+{list_digest(keep)}",
        shard_names=names,
        shard_sizes=None if index is None else index.sizes,
        find_shard=_no_ids if index is None else index.locate,
        subset_size=subset_size,
        left_out=left_out,
    )


def build_train(
    config: Config, world: World, transform: Transform, tokenizer: Tokenizer, run_folder: Path | None
) -> TrainData:
    """Training data in shards; collective.

    Raises:
        SetupError: shards are missing, empty or unreadable, a file of sizes or the list of --train-keep is broken, or
            the flags do not fit.
    """
    found = world.on_main(lambda: _find(config, world, run_folder))
    index = _index(found, config, world, run_folder)
    keep = None
    if config.data.train_keep is not None and index is not None:
        whole = index
        keep = world.on_main(lambda: _read_keep(config, world, whole))
    data = train_data(config, world, transform, tokenizer, found.sources, index, keep)
    if world.is_main:
        samples = "unknown sizes" if index is None else f"{index.num_samples} samples by {index.origin}"
        _log.info("training data: %d shards, %s", len(found.urls), samples)
    if world.is_main and index is not None and _too_few(len(found.urls), config, world):
        _log.warning(
            "%d shards for %d loader workers (%d ranks x --workers %d): workers share shards, each reading a part",
            len(found.urls), _total_workers(config, world), world.size, max(1, config.data.workers),
        )  # fmt: skip
    return data


# ---- evaluation


def numbered_shards(count: str, place: str, flag: str) -> list[str]:
    """The shards of a CLIP_benchmark folder or URL, of whose ``nshards.txt`` the text is ``count``.

    Raises:
        SetupError: it is no number.
    """
    text = count.strip()
    if not re.fullmatch(r"0*[1-9][0-9]{0,5}", text):
        raise SetupError(f"{flag}: {place}/nshards.txt should hold the number of shards, not {text[:40]!r}")
    return [os.path.join(place, f"{number}.tar") for number in range(int(text))]


def benchmark_shards(folder: str, flag: str) -> list[str] | None:
    """The test shards of a CLIP_benchmark webdataset folder; None where the folder is not one.

    Raises:
        SetupError: ``nshards.txt`` holds no number.
    """
    for place in (os.path.join(folder, "test"), folder):
        path = os.path.join(place, "nshards.txt")
        if os.path.isfile(path):
            return numbered_shards(Path(path).read_text(encoding="utf-8"), place, flag)
    return None


@dataclass(frozen=True)
class EvaluationShards:
    """Shards that all workers read once, together."""

    shards: tuple[ShardFile, ...]
    suffixes: frozenset[str]

    def samples(self, place: WorkerInfo, skips: SkipCounter) -> Iterator[RawSample]:
        """See :class:`dissect_clip.data.evaluation.stream.EvalSource`."""
        for shard, ordinals in share_shards(len(self.shards), place):
            for sample in self.shards[shard].read(ordinals, self.suffixes, skips):
                if sample.problem is None:
                    yield sample
                else:
                    skips.add(sample.problem.kind, sample.shard, sample.key, str(sample.problem))


def evaluation_shards(urls: list[str], suffixes: frozenset[str], flag: str, timeout: float) -> EvaluationShards:
    """A source of all samples of some shards.

    Raises:
        SetupError: shards are missing or empty.
    """
    check_present(urls, flag)
    check_not_empty(urls, flag)
    shards = (
        ShardFile(url, name, number << 32, None, timeout)
        for number, (url, name) in enumerate(zip(urls, display_names(urls), strict=True))
    )
    return EvaluationShards(tuple(shards), suffixes)


def build_retrieval(config: Config, world: World, transform: Transform, tokenizer: Tokenizer) -> RetrievalData:
    """Validation data in shards, or in a CLIP_benchmark folder. Not collective.

    Raises:
        SetupError: shards are missing or empty.
    """
    assert config.evaluation.val_data is not None
    urls = benchmark_shards(config.evaluation.val_data, "--val-data")
    if urls is None:
        urls = [url for source in expand(config.evaluation.val_data, "--val-data") for url in source]
    source = evaluation_shards(
        urls, caption_suffixes(config.data.json_caption_key), "--val-data", config.data.data_timeout
    )
    return retrieval_data(source, config, world, transform, tokenizer)
