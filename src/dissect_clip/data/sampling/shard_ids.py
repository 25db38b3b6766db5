"""The sizes of shards, which give every sample its number: id = samples in the shards before + ordinal in its own.

Sizes come from files beside the shards (:mod:`dissect_clip.data.sampling.shard_sizes`). Shards that none of them covers
are counted by reading their headers once, and the counts are kept as ``sizes.json``.
"""

from __future__ import annotations

import hashlib
import logging
import time
from collections import Counter
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from queue import Empty, SimpleQueue

import numpy as np
from numpy.typing import NDArray
from tqdm import tqdm

from dissect_clip.config.settings import DataSettings
from dissect_clip.data.formats.tar import DamagedTarError, ShardReader
from dissect_clip.data.formats.urls import is_local, name_some, shard_name
from dissect_clip.data.sampling.shard_sizes import SIZES_FILE, save_sizes
from dissect_clip.distributed.world import World
from dissect_clip.errors import SetupError

_SCAN_THREADS = 16
_SCAN_PATIENCE = 60.0
"""Seconds between two signs of life while shards are counted: less than what process groups wait for each other."""

_log = logging.getLogger(__name__)


def fingerprint(names: Sequence[str], sizes: Sequence[int]) -> str:
    """Hex digest of shards' base names and sizes, in order."""
    lines = "".join(f"{name}\t{size}\n" for name, size in zip(names, sizes, strict=True))
    return hashlib.sha256(lines.encode("utf-8", "surrogateescape")).hexdigest()


def display_names(urls: Sequence[str]) -> tuple[str, ...]:
    """A short name for each shard: its base name if it is unique, else its URL."""
    times = Counter(map(shard_name, urls))
    return tuple(shard_name(url) if times[shard_name(url)] == 1 else url for url in urls)


@dataclass(frozen=True, eq=False)
class ShardIndex:
    """Shards and the samples in each. S shards, M samples."""

    urls: tuple[str, ...]  # [S]
    sizes: NDArray[np.int64]  # [S]
    origin: str  # where the sizes came from, for people

    @property
    def num_samples(self) -> int:
        """M; ids are 0 <= id < M."""
        return int(self.sizes.sum())

    @property
    def offsets(self) -> NDArray[np.int64]:
        """[S] id of each shard's first sample."""
        offsets: NDArray[np.int64] = np.cumsum(self.sizes) - self.sizes
        return offsets

    @property
    def fingerprint(self) -> str:
        """Hex digest of base names and sizes; the same wherever the shards lie."""
        return fingerprint([shard_name(url) for url in self.urls], self.sizes.tolist())

    def locate(self, sample_id: NDArray[np.int64]) -> NDArray[np.int32]:
        """[N] ids -> [N] places of their shards in ``urls``."""
        places: NDArray[np.int32] = np.searchsorted(np.cumsum(self.sizes), sample_id, "right").astype(np.int32)
        return places


def count_samples(url: str, timeout: float = DataSettings.data_timeout) -> int:
    """Samples in a shard, by its headers; a damaged shard counts up to the damage, with a warning.

    A remote shard that sends nothing for ``timeout`` seconds cannot be read.

    Raises:
        SetupError: the shard cannot be read, or not even its first sample.
    """
    count = 0
    try:
        with ShardReader(url, timeout=timeout) as reader:
            try:
                return reader.finish()
            finally:
                count = reader.count
    except (DamagedTarError, OSError) as error:
        # Another try may read on where a download broke off, so such a count must not be kept.
        if count == 0 or isinstance(error, OSError):
            after = f" after {count} samples" if count else ""
            raise SetupError(f"cannot read the shard {url}{after}: {error}") from error
        _log.warning("%s is damaged after %d samples: %s. Only these are used", url, count, error)
        return count


class ShardCounter:
    """Counts the samples of shards in background threads, with a progress bar on a terminal."""

    def __init__(
        self,
        urls: Sequence[str],
        threads: int = _SCAN_THREADS,
        timeout: float = DataSettings.data_timeout,
    ) -> None:
        self._left = len(urls)
        self._done: SimpleQueue[tuple[str, Future[int]]] = SimpleQueue()
        self._bar = tqdm(total=len(urls), desc="counting samples", unit="shard", disable=None)
        self._pool = ThreadPoolExecutor(threads, thread_name_prefix="count-samples")
        for url in urls:
            self._pool.submit(count_samples, url, timeout).add_done_callback(partial(self._report, url))
        self.sizes: dict[str, int] = {}
        """Samples by URL, of the shards counted so far."""

    def _report(self, url: str, future: Future[int]) -> None:
        self._done.put((url, future))

    def wait(self, seconds: float) -> bool:
        """Count for about ``seconds`` seconds; whether all shards are counted.

        Raises:
            SetupError: a shard cannot be read.
        """
        deadline = time.monotonic() + seconds
        try:
            while self._left:
                url, future = self._done.get(timeout=max(0.0, deadline - time.monotonic()))
                self.sizes[url] = future.result()
                self._left -= 1
                self._bar.update()
        except Empty:
            return False
        except SetupError:
            self._close()
            raise
        self._close()
        return True

    def _close(self) -> None:
        self._bar.close()
        self._pool.shutdown(wait=False, cancel_futures=True)


def _announce(urls: Sequence[str]) -> None:
    _log.info("counting the samples of %d shards, once", len(urls))
    if not all(map(is_local, urls)):
        _log.warning(
            "counting remote shards reads every byte of them once. To do it beforehand, where they are near: "
            "dissect-clip index PATTERN --output sizes.json, and put the file beside the shards"
        )


def count_shards(
    urls: Sequence[str],
    world: World,
    timeout: float = DataSettings.data_timeout,
    keep: Callable[[dict[str, int]], object] = lambda sizes: None,
) -> dict[str, int]:
    """Samples by URL, counted on rank 0; collective.

    It may take longer than ``--rank-timeout``: a shard that sends nothing is given up by itself.

    Args:
        keep: gets what was counted where a shard cannot be read, so that the next run need not count it again.

    Raises:
        SetupError: a shard cannot be read, or holds no sample.
    """
    scan = None
    if world.is_main:
        _announce(urls)
        scan = ShardCounter(urls, timeout=timeout)

    def go_on() -> bool:
        assert scan is not None
        try:
            return scan.wait(_SCAN_PATIENCE)
        except SetupError:
            keep(scan.sizes)
            raise

    with world.watchdog.suspend_timeout():
        while not world.on_main(go_on):
            pass
    sizes = world.broadcast(None if scan is None else scan.sizes)
    assert sizes is not None
    empty = [url for url in urls if sizes[url] == 0]
    if empty:
        raise SetupError(
            f"{len(empty)} of {len(urls)} shards hold no sample: {name_some(empty)}. Make them again, or leave them "
            f"out of the pattern; a {SIZES_FILE} beside them that gives them 0 samples is taken as meant"
        )
    return sizes


def index_shards(
    urls: Sequence[str],
    recorded: dict[str, int],
    world: World,
    run_folder: Path | None,
    timeout: float = DataSettings.data_timeout,
) -> ShardIndex:
    """The index of shards, some with ``recorded`` sizes by URL; counts the others. Collective.

    A remote shard is given up when it sends nothing for ``timeout`` seconds.

    Raises:
        SetupError: a shard cannot be read, or there is no sample at all.
    """
    uncounted = [url for url in dict.fromkeys(urls) if url not in recorded]
    if uncounted:
        counted = count_shards(uncounted, world, timeout, lambda sizes: save_sizes(sizes, run_folder))
        if world.is_main and (unsaved := save_sizes(counted, run_folder)):
            _log.warning(
                "no folder to save the sizes of %d shards in (%s), so the next run counts them again: write them to a "
                "file with dissect-clip index",
                len(unsaved), name_some(unsaved),
            )  # fmt: skip
        recorded = {**recorded, **counted}
    sizes = np.array([recorded[url] for url in urls], np.int64)
    if sizes.sum() == 0:
        raise SetupError(f"all {len(urls)} shards are empty: {name_some(list(urls))}")
    return ShardIndex(tuple(urls), sizes, _origin(len(set(urls)), len(uncounted)))


def _origin(num_shards: int, num_counted: int) -> str:
    if num_counted == 0:
        return "their recorded sizes"
    if num_counted == num_shards:
        return "a count of all shards"
    return f"recorded sizes and a count of {num_counted} of {num_shards} shards"
