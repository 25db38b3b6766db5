#!/usr/bin/env python3
"""What it costs a loader worker to go on inside an epoch, and what a checkpoint holds for it.

    python benchmarks/loader_resume.py [--samples 400000] [--visited 400000000]

One worker reads `--samples` of them from shards of 10,000 (the same shard under many names). It is stopped 20,000
before its end; printed are the seconds to its next batch after the stop, and, to compare, to its first batch of an
epoch and for reading (not decoding) all that was skipped. Then the seconds to note a batch in the flags of
`--visited` samples, to copy them for a checkpoint, and to find the samples of one of 4,096 workers in the half that
is left.
"""

from __future__ import annotations

import argparse
import io
import itertools
import tarfile
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from common import report
from PIL import Image

from dissect_clip.config.settings import Config
from dissect_clip.data import TrainData
from dissect_clip.data.formats.urls import expand
from dissect_clip.data.sampling.bitmap import empty_bitmap, set_bits
from dissect_clip.data.sampling.plan import RemainderPlan, SpanPlan
from dissect_clip.data.sampling.progress import WorkerProgress, pack_all
from dissect_clip.data.sampling.shard_ids import ShardIndex
from dissect_clip.data.sampling.workers import WorkerInfo, count_batches
from dissect_clip.data.skips import silent_counter
from dissect_clip.data.train_shards import train_data
from dissect_clip.distributed.world import World

SHARD, BATCH, BEFORE_END = 10_000, 1_000, 20_000
SIDE = 96


def timed(work: Callable[[], Any]) -> tuple[float, Any]:
    start = time.perf_counter()
    result = work()
    return time.perf_counter() - start, result


def write_shards(folder: Path, count: int) -> str:
    """A shard of noise under many names."""
    pixels = np.random.Generator(np.random.PCG64(0)).integers(0, 256, (SIDE, SIDE, 3), np.uint8)
    image = io.BytesIO()
    Image.fromarray(pixels).save(image, "jpeg")
    with tarfile.open(folder / "0.tar", "w") as tar:
        for number, (suffix, data) in itertools.product(range(SHARD), (("jpg", image.getvalue()), ("txt", b"noise"))):
            info = tarfile.TarInfo(f"{number:06d}.{suffix}")
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    for number in range(1, count):
        (folder / f"{number}.tar").symlink_to(folder / "0.tar")
    return f"{folder}/{{0..{count - 1}}}.tar"


def make_data(pattern: str, count: int) -> TrainData:
    config = Config.of(train_data=pattern, workers=0, batch_size=BATCH)
    sources = expand(pattern)
    index = ShardIndex(tuple(sources[0]), np.full(count, SHARD), "benchmark")

    def transform(image: Image.Image) -> torch.Tensor:
        return torch.from_numpy(np.array(image)).permute(2, 0, 1).float()

    return train_data(config, World(), transform, lambda texts: torch.zeros(len(texts), 77), sources, index)


def resume_seconds(samples: int) -> dict[str, float]:
    count = samples // SHARD
    with tempfile.TemporaryDirectory() as name:
        pattern = write_shards(Path(name), count)
        data = make_data(pattern, count)
        first, _ = timed(lambda: next(iter(data.loader)))
        done = samples - BEFORE_END
        reading = data.stream.whole.source.samples(WorkerInfo(0, 1, 0, 1), 0, 0, silent_counter(), ())
        read, _ = timed(lambda: sum(1 for _ in itertools.islice(reading, done)))
        row = WorkerProgress(0, usable=done, batches=done // BATCH, position=reading.position)
        resumed = make_data(pattern, count)
        resumed.resume({**data.state_dict(), "workers": pack_all([row])}, 0)
        after, _ = timed(lambda: next(iter(resumed.loader)))
    return {"first_batch_seconds": first, "next_batch_after_stop_seconds": after, "reading_seconds": read}


def visited_seconds(samples: int) -> dict[str, float]:
    bits, batch, world_size = empty_bitmap(samples), 4096, 512
    draw = np.random.Generator(np.random.PCG64(0))
    bits[: len(bits) // 2] = 255
    batches = [draw.integers(0, samples, batch) for _ in range(50)]
    noted, _ = timed(lambda: [set_bits(bits, ids) for ids in batches])
    copied, _ = timed(bits.copy)
    sizes = np.full(samples // SHARD, SHARD)
    whole = SpanPlan(sizes, count_batches(samples, batch, world_size), batch, 0)
    rest = RemainderPlan(whole, bits, count_batches(samples // 2, batch, world_size))
    laid_out, _ = timed(lambda: rest.slices(WorkerInfo(7, world_size, 3, 8), 0, 0))
    return {
        "visited_bytes": bits.nbytes,
        "note_batch_seconds": noted / len(batches),
        "copy_seconds": copied,
        "lay_out_rest_seconds": laid_out,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--samples", type=int, default=400_000, help="of one worker; a multiple of 10000")
    parser.add_argument("--visited", type=int, default=400_000_000, help="samples in the data set")
    options = parser.parse_args()
    figures = {**resume_seconds(options.samples), **visited_seconds(options.visited)}
    report("loader_resume", samples=options.samples, visited=options.visited, **figures)


if __name__ == "__main__":
    main()
