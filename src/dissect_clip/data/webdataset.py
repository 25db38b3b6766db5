"""WebDataset shards: tars whose neighbouring files with one name are a sample."""

from __future__ import annotations

import logging
import os
import random
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import chain
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from webdataset.filters import shuffle

from dissect_clip.config import Config
from dissect_clip.data.decode import MAX_FILE_SIZE, RawSample, caption_suffixes
from dissect_clip.data.evalstream import RetrievalData, retrieval_data
from dissect_clip.data.shards import ShardIndex, display_names, fingerprint, index_shards
from dissect_clip.data.sizes import known_sizes
from dissect_clip.data.skips import Skip, SkipCounter
from dissect_clip.data.split import (
    CyclePlan,
    DrawPlan,
    Part,
    Place,
    Plan,
    SpanPlan,
    count_batches,
    share_shards,
)
from dissect_clip.data.stream import Tokenizer, TrainData, TrainStream, Transform, make_loader
from dissect_clip.data.tar import DamagedTarError, ShardReader
from dissect_clip.data.urls import check_not_empty, check_present, expand, is_local, name_some
from dissect_clip.dist import World
from dissect_clip.errors import SetupError
from dissect_clip.seeding import Stream, derive_seed

_SHUFFLE_BUFFER = 5000
_SHUFFLE_INITIAL = 1000
"""OpenCLIP's sizes, in samples."""

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Shard:
    """A shard as its reader needs to know it."""

    url: str
    name: str  # for people
    first_id: int | None  # id of its first sample; None where there is no numbering
    size: int | None  # samples it is said to hold; None where that is not known
    timeout: float  # seconds to wait for a remote shard that sends nothing

    def read(self, keep: range, suffixes: frozenset[str], skips: SkipCounter) -> Iterator[RawSample]:
        """The samples whose ordinals are in ``keep``; counts those that are not there or not readable.

        Where the size is not known, a shard that cannot be read to its end counts as one lost sample.
        """
        given, kind, reason = 0, Skip.BELOW_RECORDED_SIZE, f"it has fewer than the recorded {self.size} samples"
        lost = 0 if self.size is None else len(keep)
        try:
            with ShardReader(self.url, suffixes, self.timeout) as reader:
                for sample in reader.read(keep):
                    given += 1
                    if sample.too_large:
                        reason_here = f"its {' and '.join(sample.too_large)} has more than {MAX_FILE_SIZE} bytes"
                        skips.add(Skip.TOO_LARGE_FILE, self.name, sample.key, reason_here)
                        continue
                    sample_id = -1 if self.first_id is None else self.first_id + sample.ordinal
                    yield RawSample(sample_id, self.name, sample.key, sample.files)
                if keep.stop == self.size and (beyond := reader.finish() - self.size) > 0:
                    reason = f"it has {beyond} samples more than the recorded {self.size}"
                    skips.add(Skip.BEYOND_RECORDED_SIZE, self.name, None, reason, beyond)
        except (DamagedTarError, OSError) as error:
            unread = given == 0 and isinstance(error, OSError)
            kind, reason = (Skip.UNREADABLE_SHARD if unread else Skip.DAMAGED_SHARD), str(error)
            lost = max(lost, given + 1) if self.size is None else lost
        if lost > given:
            skips.add(kind, self.name, None, reason, lost - given)


@dataclass(frozen=True)
class ShardSource:
    """Samples of the shards that a plan gives to a worker, through a shuffle buffer."""

    shards: tuple[Shard, ...]
    plan: Plan
    suffixes: frozenset[str]
    seed: int

    @property
    def repeats(self) -> bool:
        """See :class:`dissect_clip.data.stream.Source`."""
        return self.plan.repeats

    def samples(self, place: Place, epoch: int, attempt: int, skips: SkipCounter) -> Iterator[RawSample]:
        """See :class:`dissect_clip.data.stream.Source`."""
        parts = self.plan.parts(place, epoch, attempt)
        in_order = chain.from_iterable(self._read(part, skips) for part in parts)
        seed = derive_seed(self.seed, Stream.SHUFFLE, epoch, place.rank, place.worker, attempt)
        mixed: Iterator[RawSample] = shuffle(_SHUFFLE_BUFFER, initial=_SHUFFLE_INITIAL, rng=random.Random(seed))(
            in_order
        )
        return mixed

    def _read(self, part: Part, skips: SkipCounter) -> Iterator[RawSample]:
        keep = range(part.first, sys.maxsize if part.last is None else part.last)
        return self.shards[part.shard].read(keep, self.suffixes, skips)

    def describe(self, place: Place, epoch: int) -> str:
        """See :class:`dissect_clip.data.stream.Source`."""
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
    return world.size * max(1, config.workers)


def _too_few(num_shards: int, config: Config, world: World) -> bool:
    """Whether some worker would have no shard of its own, where it needs one."""
    return not config.dataset_resampled and num_shards < _total_workers(config, world)


def _find(config: Config, world: World, run_folder: Path | None) -> Found:
    assert config.train_data is not None
    sources = expand(config.train_data)
    urls = [url for source in sources for url in source]
    check_present(urls, "--train-data")
    needed = config.select or config.train_num_samples is None or _too_few(len(urls), config, world)
    found = Found(sources, known_sizes(urls, run_folder, needed, config.data_timeout))
    check_not_empty([url for url in urls if url not in found.known], "--train-data")
    return found


def _index(found: Found, config: Config, world: World, run_folder: Path | None) -> ShardIndex | None:
    """The shards' sizes, counted where they are needed; None where the run can do without. Collective."""
    # Local headers are read quickly. Remote shards would be read whole, which a run must not do unless it has to.
    worth_it = all(map(is_local, found.urls)) and not config.dataset_resampled
    if found.complete or config.select or config.train_num_samples is None or worth_it:
        return index_shards(found.urls, found.known, world, run_folder, config.data_timeout)
    if not _too_few(len(found.urls), config, world):
        return None
    raise SetupError(
        f"--train-data has {len(found.urls)} shards, fewer than the {_total_workers(config, world)} loader workers "
        f"({world.size} ranks x --workers {max(1, config.workers)}), and their sizes are not known. Count them once "
        "with\n"
        f"    python scripts/index_shards.py '{config.train_data}' --output sizes.json\n"
        "and put the file beside the shards, or give fewer --workers"
    )


def _check_num_samples(index: ShardIndex, config: Config) -> None:
    given = config.train_num_samples
    if given is not None and given != index.num_samples and not config.dataset_resampled:
        raise SetupError(
            f"--train-num-samples {given} is not the size of --train-data, which has {index.num_samples} samples by "
            f"{index.origin}. Remove --train-num-samples, or add --dataset-resampled for epochs of another length"
        )


def _plan(config: Config, num_batches: int, index: ShardIndex | None, sources: list[list[str]]) -> Plan:
    if config.dataset_resampled:
        text = config.train_data_upsampling_factors
        factors = [1.0] * len(sources) if text is None else parse_factors(text, len(sources))
        weights = [factor for factor, source in zip(factors, sources, strict=True) for _ in source]
        return DrawPlan(weights, None if index is None else index.sizes, config.seed)
    if index is None:
        return CyclePlan(sum(map(len, sources)), config.seed)
    return SpanPlan(index.sizes, num_batches, config.batch_size, config.seed)


def _shards(urls: list[str], names: tuple[str, ...], index: ShardIndex | None, timeout: float) -> tuple[Shard, ...]:
    if index is None:
        return tuple(Shard(url, name, None, None, timeout) for url, name in zip(urls, names, strict=True))
    return tuple(
        Shard(url, name, first, size, timeout)
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
) -> TrainData:
    """The loader of shards whose sizes are known (``index``), or not. Not collective.

    Raises:
        SetupError: the flags do not fit the shards.
    """
    urls = [url for source in sources for url in source]
    names = display_names(urls)
    if index is not None:
        _check_num_samples(index, config)
    num_samples = config.train_num_samples if index is None else index.num_samples
    assert num_samples is not None
    length = config.train_num_samples if config.dataset_resampled else None
    num_batches = count_batches(length or num_samples, config.batch_size, world.size, config.accum_freq)
    plan = _plan(config, num_batches, index, sources)
    suffixes = caption_suffixes(config.json_caption_key)
    source = ShardSource(_shards(urls, names, index, config.data_timeout), plan, suffixes, config.seed)
    stream = TrainStream(source, config, world, num_batches, transform, tokenizer)
    return TrainData(
        loader=make_loader(stream, config.workers, world),
        stream=stream,
        num_samples=num_samples,
        fingerprint=fingerprint(names, [-1] * len(names)) if index is None else index.fingerprint,
        shard_names=names,
        find_shard=_no_ids if index is None else index.locate,
    )


def build_train(
    config: Config, world: World, transform: Transform, tokenizer: Tokenizer, run_folder: Path | None
) -> TrainData:
    """Training data in shards; collective.

    Raises:
        SetupError: shards are missing, empty or unreadable, a file of sizes is broken, or the flags do not fit.
    """
    found = world.on_main(lambda: _find(config, world, run_folder))
    index = _index(found, config, world, run_folder)
    data = train_data(config, world, transform, tokenizer, found.sources, index)
    if world.is_main:
        samples = "unknown sizes" if index is None else f"{index.num_samples} samples by {index.origin}"
        _log.info("training data: %d shards, %s", len(found.urls), samples)
    if world.is_main and index is not None and _too_few(len(found.urls), config, world):
        _log.warning(
            "%d shards for %d loader workers (%d ranks x --workers %d): workers share shards, each reading a part",
            len(found.urls), _total_workers(config, world), world.size, max(1, config.workers),
        )  # fmt: skip
    return data


# ---- evaluation


def benchmark_shards(folder: str, flag: str) -> list[str] | None:
    """The test shards of a CLIP_benchmark webdataset folder; None where the folder is not one.

    Raises:
        SetupError: ``nshards.txt`` holds no number.
    """
    for place in (os.path.join(folder, "test"), folder):
        path = os.path.join(place, "nshards.txt")
        if os.path.isfile(path):
            text = Path(path).read_text(encoding="utf-8").strip()
            if not text.isdigit() or int(text) == 0:
                raise SetupError(f"{flag}: {path} should hold the number of shards, not {text[:40]!r}")
            return [os.path.join(place, f"{number}.tar") for number in range(int(text))]
    return None


@dataclass(frozen=True)
class SharedShards:
    """Shards that all workers read once, together."""

    shards: tuple[Shard, ...]
    suffixes: frozenset[str]

    def samples(self, place: Place, skips: SkipCounter) -> Iterator[RawSample]:
        """See :class:`dissect_clip.data.evalstream.EvalSource`."""
        for shard, ordinals in share_shards(len(self.shards), place):
            yield from self.shards[shard].read(ordinals, self.suffixes, skips)


def shared_shards(urls: list[str], suffixes: frozenset[str], flag: str, timeout: float) -> SharedShards:
    """A source of all samples of some shards.

    Raises:
        SetupError: shards are missing or empty.
    """
    check_present(urls, flag)
    check_not_empty(urls, flag)
    shards = (
        Shard(url, name, number << 32, None, timeout)
        for number, (url, name) in enumerate(zip(urls, display_names(urls), strict=True))
    )
    return SharedShards(tuple(shards), suffixes)


def build_retrieval(config: Config, world: World, transform: Transform, tokenizer: Tokenizer) -> RetrievalData:
    """Validation data in shards, or in a CLIP_benchmark folder. Not collective.

    Raises:
        SetupError: shards are missing or empty.
    """
    assert config.val_data is not None
    urls = benchmark_shards(config.val_data, "--val-data")
    if urls is None:
        urls = [url for source in expand(config.val_data, "--val-data") for url in source]
    source = shared_shards(urls, caption_suffixes(config.json_caption_key), "--val-data", config.data_timeout)
    return retrieval_data(source, config, world, transform, tokenizer)
