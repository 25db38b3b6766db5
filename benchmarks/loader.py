#!/usr/bin/env python3
"""How many samples a second the training loader gives, beside OpenCLIP's on the same shards and the decoder's limit.

    python benchmarks/loader.py [--openclip-python VENV/bin/python] [--size 375x500 768x1024] [--samples 2048]
    python benchmarks/loader.py --shards 'data/cc3m/{00000..00007}.tar'

For each image size a line of JSON. The loaders run whole epochs with `--workers` processes each, in turns, so that
whatever else the machine does falls on all of them; a ratio is taken within each turn. The first turn is not counted.

`ours` and `ours_fast` (with --fast-decode) give bytes, which the device normalises; `openclip` gives floats. `limits`
are of one process and without a loader, times the cores: `decode` of the JPEGs by Pillow, `decode_reduced` at the
resolution that --fast-decode takes, `pixels` and `pixels_fast` with crop and resize too. `normalise_us` is what the
device's part takes for an image on one core.

OpenCLIP's loader needs a webdataset that this project does not, and so a Python of its own; without
`--openclip-python` it is left out.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import itertools
import json
import os
import statistics
import subprocess
import sys
import tarfile
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from common import report
from PIL import Image

from dissect_clip.config.parser import parse_args
from dissect_clip.config.settings import Config
from dissect_clip.data import TrainData, build_train
from dissect_clip.data.batch import Batch
from dissect_clip.data.formats.decode import decode_image
from dissect_clip.data.formats.pixels import CropBeforeDecoding, ImageReader, stack_pixels
from dissect_clip.data.formats.urls import expand
from dissect_clip.distributed.world import World
from dissect_clip.models.build import Model, build_model
from dissect_clip.selection import STRATEGIES

DIFFERENT = 64  # images; a shard holds them again and again
FEWEST_SHARDS = 8
PROBES = 48  # images that limits are measured on in a turn
WORDS = ("a", "the", "of", "in", "on", "with", "and", "photo", "red", "blue", "old", "dog", "house", "tree", "man")


def natural(height: int, width: int, random: np.random.Generator) -> Image.Image:
    """An image as photographs are: smooth, with less and less contrast the finer the detail, and a little noise."""
    total = np.zeros((height, width, 3), np.float32)
    cells = 2
    while cells < max(height, width):
        noise = random.normal(size=(cells, cells, 3)).astype(np.float32)
        noise = 0.75 * noise.mean(axis=2, keepdims=True) + 0.25 * noise  # colors change less than brightness
        for channel in range(3):
            layer = Image.fromarray(noise[..., channel]).resize((width, height), Image.Resampling.BICUBIC)
            total[..., channel] += np.asarray(layer) * 2 / cells**0.5
        cells *= 2
    total += random.normal(scale=0.05, size=(height, width, 1))
    return Image.fromarray((127 + 45 * total).clip(0, 255).astype(np.uint8))


def jpegs(size: str, quality: int) -> list[bytes]:
    """Encoded images of ``HEIGHTxWIDTH``."""
    height, width = map(int, size.split("x"))
    random = np.random.default_rng(0)
    found = []
    for _ in range(DIFFERENT):
        file = io.BytesIO()
        natural(height, width, random).save(file, "jpeg", quality=quality)
        found.append(file.getvalue())
    return found


def caption(random: np.random.Generator) -> str:
    """Some ten words, one of which is new each time, as in captions from the web."""
    new = "".join(random.choice(list("bdfgklmnprst")) + random.choice(list("aeiou")) for _ in range(3))
    return " ".join([*random.choice(WORDS, size=random.integers(5, 15)), new])


def write_shards(folder: Path, images: Sequence[bytes], samples: int, shards: int) -> str:
    """Shards of pairs, equally large; returns the pattern."""
    random = np.random.default_rng(1)
    for shard in range(shards):
        with tarfile.open(folder / f"{shard:03d}.tar", "w") as tar:
            for number in range(shard, samples, shards):
                files = {"jpg": images[number % len(images)], "txt": caption(random).encode()}
                for suffix, data in files.items():
                    info = tarfile.TarInfo(f"{number:08d}.{suffix}")
                    info.size = len(data)
                    tar.addfile(info, io.BytesIO(data))
    return str(folder / f"{{000..{shards - 1:03d}}}.tar")


def first_images(pattern: str, count: int) -> list[dict[str, bytes]]:
    """The files of the first samples of the first shard that have a jpg."""
    with tarfile.open(expand(pattern, "--shards")[0][0]) as tar:
        names = (member for member in tar if member.name.endswith(".jpg"))
        return [{"jpg": tar.extractfile(member).read()} for member in itertools.islice(names, count)]  # type: ignore[union-attr]


# ---- loaders


class Ours:
    """This project's loader."""

    def __init__(self, options: argparse.Namespace, pattern: str, model: Model, folder: Path, *flags: str) -> None:
        self.data: TrainData = build_train(
            make_config(options, pattern, *flags), World(), model.preprocess_train, model.tokenizer, folder
        )
        self.epoch = 0

    def run(self) -> float:
        """Samples a second of an epoch."""
        self.data.set_epoch(self.epoch)
        self.epoch += 1
        began, samples = time.perf_counter(), 0
        for batch in self.data.loader:
            self.data.consume(batch)
            samples += len(batch)
        return samples / (time.perf_counter() - began)


class OpenCLIP:
    """OpenCLIP's loader, in a process of another Python."""

    def __init__(self, options: argparse.Namespace, pattern: str, samples: int) -> None:
        words = ["--shards", pattern, "--samples", samples, "--batch-size", options.batch_size]
        words += ["--workers", options.workers, "--pixels", options.pixels]
        script = Path(__file__).with_name("openclip_loader.py")
        self.process = subprocess.Popen(
            [options.openclip_python, str(script), *map(str, words)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        self.versions = self._answer()

    def _answer(self) -> dict[str, Any]:
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        if not line:
            sys.exit(f"OpenCLIP's loader ended with status {self.process.wait()}: see above")
        answer: dict[str, Any] = json.loads(line)
        return answer

    def run(self) -> float:
        """Samples a second of an epoch."""
        assert self.process.stdin is not None
        print(file=self.process.stdin, flush=True)
        answer = self._answer()
        return float(answer["samples"] / answer["seconds"])

    def close(self) -> None:
        """End the process."""
        assert self.process.stdin is not None
        # The end of its stdin alone would not reach it: the workers that were forked since hold it open.
        print("end", file=self.process.stdin, flush=True)
        self.process.wait()


def make_config(options: argparse.Namespace, pattern: str, *flags: str) -> Config:
    words = ["--train-data", pattern, "--model", "RN-tiny", "--force-image-size", str(options.pixels), "--logs", "none"]
    words += ["--batch-size", str(options.batch_size), "--workers", str(options.workers), "--device", "cpu"]
    return parse_args([*words, *flags], STRATEGIES)


# ---- limits of one core


def rate(work: Callable[[dict[str, bytes]], Any], files: Sequence[dict[str, bytes]]) -> float:
    """Calls a second on one core; the same crops in every turn and for every ``work``."""
    torch.manual_seed(0)
    began = time.perf_counter()
    for one in files:
        work(one)
    return len(files) / (time.perf_counter() - began)


def limits(transform: Any) -> dict[str, Callable[[dict[str, bytes]], Any]]:
    """What is measured of one core, by name."""
    crop = CropBeforeDecoding(transform.transforms[0])
    return {
        "decode": decode_image,
        "decode_reduced": lambda files: decode_image(files, crop.prepare),
        "pixels": ImageReader(transform),
        "pixels_fast": ImageReader(transform, fast=True),
    }


def normalise_us(transform: Any, files: Sequence[dict[str, bytes]]) -> float:
    """Microseconds for an image, of what the device does, on this processor."""
    reader = ImageReader(transform)
    ids = torch.arange(len(files))
    batch = Batch(stack_pixels([reader(one) for one in files]), ids, ids, normalization=reader.normalization)
    turns = []
    for _ in range(5):
        began = time.perf_counter()
        batch.to(torch.device("cpu"))
        turns.append(time.perf_counter() - began)
    return min(turns) / len(files) * 1e6


# ---- turns


def spread(values: Sequence[float], digits: int) -> dict[str, float]:
    low, middle, high = statistics.quantiles(values, n=4) if len(values) > 1 else (values[0],) * 3
    return {"median": round(middle, digits), "low": round(low, digits), "high": round(high, digits)}


@contextlib.contextmanager
def shards(options: argparse.Namespace, size: str | None) -> Iterator[tuple[str, Path]]:
    """A pattern, and a folder for what is kept of it."""
    with tempfile.TemporaryDirectory() as name:
        if size is None:
            yield options.shards, Path(name)
        else:
            count = max(FEWEST_SHARDS, options.workers)
            yield write_shards(Path(name), jpegs(size, options.quality), options.samples, count), Path(name)


def measure(options: argparse.Namespace, size: str | None, model: Model) -> None:
    """Print the line of an image size, or (None) of the given shards."""
    with shards(options, size) as (pattern, folder):
        ours = Ours(options, pattern, model, folder)
        fast = Ours(options, pattern, model, folder, "--fast-decode")
        loaders: dict[str, Ours | OpenCLIP] = {"ours": ours, "ours_fast": fast}
        openclip = None
        if options.openclip_python is not None:
            openclip = loaders["openclip"] = OpenCLIP(options, pattern, ours.data.num_samples)
        probes = first_images(pattern, PROBES)
        alone = limits(model.preprocess_train)
        speeds: dict[str, list[float]] = {name: [] for name in (*loaders, *alone)}
        for turn in range(1 + options.turns):
            order = list(loaders)
            for name in order[turn % len(order) :] + order[: turn % len(order)]:
                speeds[name].append(loaders[name].run())
            for name, work in alone.items():
                speeds[name].append(rate(work, probes))
        if openclip is not None:
            openclip.close()
    counted = {name: values[1:] for name, values in speeds.items()}
    pairs = [("ours_fast", "ours"), *((name, "openclip") for name in ("ours", "ours_fast") if openclip is not None)]
    cores = options.workers
    report(
        "loader",
        images=size or options.shards,
        pixels=options.pixels,
        workers=options.workers,
        batch_size=options.batch_size,
        turns=options.turns,
        samples_per_second={name: spread(counted[name], 0) for name in loaders},
        ratios={
            f"{left}/{right}": spread([a / b for a, b in zip(counted[left], counted[right], strict=True)], 3)
            for left, right in pairs
        },
        limits={name: spread([cores * value for value in counted[name]], 0) for name in alone},
        normalise_us=round(normalise_us(model.preprocess_train, probes), 1),
        openclip=openclip.versions if openclip is not None else "left out: no --openclip-python",
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--openclip-python", help="of an environment with open_clip_torch 3.3.0 and webdataset 0.2.86")
    parser.add_argument("--shards", help="your own, instead of some that are made")
    parser.add_argument("--size", nargs="+", default=["375x500", "768x1024"], help="height x width of the made images")
    parser.add_argument("--quality", type=int, default=90)
    parser.add_argument("--samples", type=int, default=2048, help="in an epoch of made shards")
    parser.add_argument("--pixels", type=int, default=224)
    parser.add_argument("--workers", type=int, default=os.cpu_count())
    parser.add_argument("--batch-size", type=int, default=64)
    parser.add_argument("--turns", type=int, default=7)
    options = parser.parse_args()
    torch.set_num_threads(1)
    model = build_model(make_config(options, "none.tar"), World())
    for size in [None] if options.shards else options.size:
        measure(options, size, model)


if __name__ == "__main__":
    main()
