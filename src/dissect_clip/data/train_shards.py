"""The training data in shards: the shards are found, their sizes looked up or counted, and the epoch planned."""

from __future__ import annotations

import logging
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from dissect_clip.config.settings import Config
from dissect_clip.data.formats.decode import caption_suffixes
from dissect_clip.data.formats.urls import check_not_empty, check_present, expand, is_local
from dissect_clip.data.formats.webdataset import ShardFile, ShardSource, sample_keys
from dissect_clip.data.loaders import Tokenizer, Transform, make_loader
from dissect_clip.data.sampling.bitmap import Bitmap, inverted
from dissect_clip.data.sampling.plan import CyclePlan, EpochPlan, ResamplingPlan, ShardSubset, SpanPlan, SubsetPlan
from dissect_clip.data.sampling.shard_ids import ShardIndex, display_names, fingerprint, index_shards
from dissect_clip.data.sampling.shard_sizes import recorded_sizes
from dissect_clip.data.sampling.subset import SampleNames, list_digest, read_list
from dissect_clip.data.sampling.workers import count_batches
from dissect_clip.data.train_data import TrainData
from dissect_clip.data.train_stream import TrainStream
from dissect_clip.distributed.world import World
from dissect_clip.errors import SetupError

_log = logging.getLogger(__name__)


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


# ---- finding the shards


@dataclass(frozen=True)
class ShardDiscovery:
    """What rank 0 finds out about the training shards."""

    sources: list[list[str]]  # URLs of each source
    sizes: dict[str, int]  # recorded sizes by URL, of some shards

    @property
    def urls(self) -> list[str]:
        """All shards, source by source."""
        return [url for source in self.sources for url in source]

    @property
    def has_all_sizes(self) -> bool:
        """Whether the sizes of all shards are recorded."""
        return all(url in self.sizes for url in self.urls)


def _total_workers(config: Config, world: World) -> int:
    return world.size * max(1, config.data.workers)


def _has_too_few_shards(num_shards: int, config: Config, world: World) -> bool:
    """Whether some worker would have no whole shard, if it needs one."""
    return not config.data.dataset_resampled and num_shards < _total_workers(config, world)


def _needs_ids(config: Config) -> bool:
    return config.selection.select or config.data.train_keep is not None


def _discover(config: Config, world: World, run_folder: Path | None) -> ShardDiscovery:
    data = config.data
    assert data.train_data is not None
    sources = expand(data.train_data)
    urls = [url for source in sources for url in source]
    check_present(urls, "--train-data")
    needs_sizes = _needs_ids(config) or data.train_num_samples is None or _has_too_few_shards(len(urls), config, world)
    sizes = recorded_sizes(urls, run_folder, needs_sizes, data.data_timeout)
    check_not_empty([url for url in urls if url not in sizes], "--train-data")
    return ShardDiscovery(sources, sizes)


def _index(found: ShardDiscovery, config: Config, world: World, run_folder: Path | None) -> ShardIndex | None:
    """The shards' sizes, counted if they are needed; None if the run does not need them. Collective."""
    data, urls = config.data, found.urls
    # Local headers are read quickly. Remote shards would be read whole, which a run must not do unless it has to.
    is_cheap = all(map(is_local, urls)) and not data.dataset_resampled
    if found.has_all_sizes or _needs_ids(config) or data.train_num_samples is None or is_cheap:
        return index_shards(urls, found.sizes, world, run_folder, data.data_timeout)
    if not _has_too_few_shards(len(urls), config, world):
        return None
    raise SetupError(
        f"--train-data has {len(urls)} shards, fewer than the {_total_workers(config, world)} loader workers "
        f"({world.size} ranks x --workers {max(1, data.workers)}), and their sizes are not known. Count them "
        "once with\n"
        f"    dissect-clip index '{data.train_data}' --output sizes.json\n"
        "and put the file beside the shards, or give fewer --workers"
    )


def _check_num_samples(index: ShardIndex, config: Config) -> None:
    given = config.data.train_num_samples
    if given is not None and given != index.num_samples and not config.data.dataset_resampled:
        raise SetupError(
            f"--train-num-samples {given} is not the size of --train-data, which has {index.num_samples} samples by "
            f"{index.origin}. Remove --train-num-samples, or add --dataset-resampled for epochs of another length"
        )


def sample_names(index: ShardIndex, timeout: float) -> SampleNames:
    """The names of the samples of shards in records and in lists."""
    return SampleNames(display_names(index.urls), index.sizes, lambda shard: sample_keys(index.urls[shard], timeout))


# ---- the loader


def _plan(
    config: Config, num_batches: int, index: ShardIndex | None, subset: ShardSubset | None, sources: list[list[str]]
) -> EpochPlan:
    batch_size, seed = config.training.batch_size, config.training.seed
    if config.data.dataset_resampled:
        text = config.data.train_data_upsampling_factors
        factors = [1.0] * len(sources) if text is None else parse_factors(text, len(sources))
        weights = [factor for factor, source in zip(factors, sources, strict=True) for _ in source]
        return ResamplingPlan(weights, None if index is None else index.sizes, seed, subset)
    if index is None:
        return CyclePlan(sum(map(len, sources)), seed)
    if subset is not None:
        return SubsetPlan(subset, num_batches, batch_size, seed)
    return SpanPlan(index.sizes, num_batches, batch_size, seed)


def _shard_files(
    urls: list[str], names: tuple[str, ...], index: ShardIndex | None, timeout: float
) -> tuple[ShardFile, ...]:
    if index is None:
        return tuple(ShardFile(url, name, None, None, timeout) for url, name in zip(urls, names, strict=True))
    return tuple(
        ShardFile(url, name, first, size, timeout)
        for url, name, first, size in zip(urls, names, index.offsets.tolist(), index.sizes.tolist(), strict=True)
    )


def _locate_nothing(sample_id: NDArray[np.int64]) -> NDArray[np.int32]:
    raise ValueError("samples were not numbered in this run, so their shards are not known")


def train_data(
    config: Config,
    world: World,
    transform: Transform,
    tokenizer: Tokenizer,
    sources: list[list[str]],
    index: ShardIndex | None,
    keep: Bitmap | None = None,
) -> TrainData:
    """The loader of shards, with their sizes in ``index`` or unknown; of the samples ``keep`` only. Not collective.

    Raises:
        SetupError: the flags do not fit the shards.
    """
    data, training = config.data, config.training
    urls = [url for source in sources for url in source]
    names = display_names(urls)
    if index is not None:
        _check_num_samples(index, config)
    num_samples = data.train_num_samples if index is None else index.num_samples
    assert num_samples is not None
    digest = fingerprint(names, [-1] * len(names)) if index is None else index.fingerprint
    exclusions = None if keep is None else inverted(keep, num_samples)
    subset = None if exclusions is None or index is None else ShardSubset.of(index.sizes, exclusions)
    subset_size = num_samples if subset is None else int(subset.counts.sum())
    length = data.train_num_samples if data.dataset_resampled else None
    num_batches = count_batches(length or subset_size, training.batch_size, world.size, training.accum_freq)
    source = ShardSource(
        shards=_shard_files(urls, names, index, data.data_timeout),
        plan=_plan(config, num_batches, index, subset, sources),
        suffixes=caption_suffixes(data.json_caption_key),
        seed=training.seed,
    )
    stream = TrainStream(source, config, world, num_batches, num_samples, transform, tokenizer, exclusions)
    return TrainData(
        world=world,
        loader=make_loader(stream, data.workers, world),
        stream=stream,
        num_samples=num_samples,
        fingerprint=digest if keep is None else f"{digest}+{list_digest(keep)}",
        shard_names=names,
        shard_sizes=None if index is None else index.sizes,
        find_shard=_locate_nothing if index is None else index.locate,
        subset_size=subset_size,
        exclusions=exclusions,
    )


def build_train(
    config: Config, world: World, transform: Transform, tokenizer: Tokenizer, run_folder: Path | None
) -> TrainData:
    """Training data in shards; collective.

    Raises:
        SetupError: shards are missing, empty or unreadable, a file of sizes or the list of --train-keep is broken, or
            the flags do not fit.
    """
    found = world.on_main(lambda: _discover(config, world, run_folder))
    index = _index(found, config, world, run_folder)
    path, timeout = config.data.train_keep, config.data.data_timeout
    keep = None
    if path is not None and index is not None:
        names, report = sample_names(index, timeout), world.watchdog.report_progress
        keep = world.on_main(lambda: read_list(path, names, "--train-keep", report))
    data = train_data(config, world, transform, tokenizer, found.sources, index, keep)
    if world.is_main:
        samples = "unknown sizes" if index is None else f"{index.num_samples} samples by {index.origin}"
        _log.info("training data: %d shards, %s", len(found.urls), samples)
    if world.is_main and index is not None and _has_too_few_shards(len(found.urls), config, world):
        _log.warning(
            "%d shards for %d loader workers (%d ranks x --workers %d): workers share shards, each reading a part",
            len(found.urls), _total_workers(config, world), world.size, max(1, config.data.workers),
        )  # fmt: skip
    return data
