"""Shards to evaluate on: read once by all workers together, found by a pattern or in a CLIP_benchmark folder."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from dissect_clip.config.settings import Config
from dissect_clip.data.evaluation.stream import RetrievalData, retrieval_data
from dissect_clip.data.formats.decode import RawSample, caption_suffixes
from dissect_clip.data.formats.urls import check_not_empty, check_present, expand
from dissect_clip.data.formats.webdataset import ShardFile
from dissect_clip.data.loaders import Tokenizer, Transform
from dissect_clip.data.sampling.plan import share_shards
from dissect_clip.data.sampling.shard_ids import display_names
from dissect_clip.data.sampling.workers import WorkerInfo
from dissect_clip.data.skips import SkipCounter
from dissect_clip.distributed.world import World
from dissect_clip.errors import SetupError


def numbered_shards(count: str, folder: str, flag: str) -> list[str]:
    """The shards of a CLIP_benchmark folder or URL, whose ``nshards.txt`` has the text ``count``.

    Raises:
        SetupError: it is no number.
    """
    text = count.strip()
    if not re.fullmatch(r"0*[1-9][0-9]{0,5}", text):
        raise SetupError(f"{flag}: {folder}/nshards.txt should hold the number of shards, not {text[:40]!r}")
    return [os.path.join(folder, f"{number}.tar") for number in range(int(text))]


def benchmark_shards(folder: str, flag: str) -> list[str] | None:
    """The test shards of a CLIP_benchmark webdataset folder; None if the folder is not one.

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

    def samples(self, worker: WorkerInfo, skips: SkipCounter) -> Iterator[RawSample]:
        """See :class:`dissect_clip.data.evaluation.stream.EvaluationSource`."""
        for part in share_shards(len(self.shards), worker):
            for sample in self.shards[part.shard].read(part.ordinals, self.suffixes, skips):
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
    pattern = config.evaluation.val_data
    assert pattern is not None
    urls = benchmark_shards(pattern, "--val-data")
    if urls is None:
        urls = [url for source in expand(pattern, "--val-data") for url in source]
    suffixes = caption_suffixes(config.data.json_caption_key)
    source = evaluation_shards(urls, suffixes, "--val-data", config.data.data_timeout)
    return retrieval_data(source, config, world, transform, tokenizer)
