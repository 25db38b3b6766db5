"""What benchmarks share: how a figure is told, how things are timed beside each other, shards to read."""

from __future__ import annotations

import io
import itertools
import json
import os
import platform
import statistics
import subprocess
import tarfile
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import open_clip
import torch
from PIL import Image

ROOT = Path(__file__).resolve().parent.parent


# ---- telling


def _commit() -> str:
    done = subprocess.run(
        ["git", "describe", "--always", "--dirty"], cwd=ROOT, capture_output=True, text=True, check=False
    )
    return done.stdout.strip() or "unknown"


def _processor() -> str:
    if torch.cuda.is_available():
        return str(torch.cuda.get_device_name())
    info = Path("/proc/cpuinfo")
    names = (
        [line.split(":")[1].strip() for line in info.read_text().splitlines() if "model name" in line]
        if info.exists()
        else []
    )
    return names[0] if names else platform.processor()


def report(benchmark: str, **figures: Any) -> None:
    """Print a JSON line with figures, machine, versions and commit."""
    line = {
        "benchmark": benchmark,
        **figures,
        "machine": {"processor": _processor(), "cores": os.cpu_count(), "threads": torch.get_num_threads()},
        "versions": {
            "torch": torch.__version__,
            "open_clip": open_clip.__version__,
            "python": platform.python_version(),
        },
        "commit": _commit(),
    }
    print(json.dumps(line), flush=True)


def read_lines(file: Path) -> list[dict[str, Any]]:
    """The objects of a file of JSON lines; other lines are passed over."""
    lines = file.read_text(encoding="utf-8").splitlines()
    return [json.loads(line) for line in lines if line.startswith("{")]


def quartiles(values: Iterable[float], digits: int = 3) -> dict[str, float]:
    """Median, and the quartiles around it as "low" and "high"; one value is all three."""
    found = list(values)
    low, middle, high = statistics.quantiles(found, n=4, method="inclusive") if len(found) > 1 else found * 3
    return {"median": round(middle, digits), "low": round(low, digits), "high": round(high, digits)}


def markdown(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A table."""
    lines = [list(header), ["---"] * len(header), *map(list, rows)]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines)


# ---- timing


def in_turns(works: dict[str, Callable[[], float]], turns: int, warm: int = 1) -> dict[str, list[float]]:
    """What each work returned, ``turns`` numbers by name, in the order of the turns.

    Everything is done once in each turn, so that whatever else the machine does falls on all; who begins changes from
    turn to turn. The first ``warm`` turns do not count.
    """
    names = list(works)
    values: dict[str, list[float]] = {name: [] for name in names}
    for turn in range(turns + warm):
        first = turn % len(names)
        for name in names[first:] + names[:first]:
            values[name].append(works[name]())
    return {name: found[warm:] for name, found in values.items()}


def ratios(above: Sequence[float], below: Sequence[float]) -> list[float]:
    """Turn by turn."""
    return [a / b for a, b in zip(above, below, strict=True)]


# ---- data


def write_shards(folder: Path, samples: int, side: int, per_shard: int = 256) -> str:
    """Shards of pairs; returns their pattern.

    The images are smooth with some noise, as large a JPEG as a photograph of ``side`` pixels; there are 16 of them.
    """
    random = np.random.Generator(np.random.PCG64(0))
    images = [_photograph(random, side) for _ in range(16)]
    count = -(-samples // per_shard)
    for number in range(count):
        with tarfile.open(folder / f"{number:05d}.tar", "w") as tar:
            for sample in range(number * per_shard, min(samples, (number + 1) * per_shard)):
                caption = f"a picture of {sample % 97} things in front of {sample % 89} others, number {sample}"
                for suffix, data in (("jpg", images[sample % len(images)]), ("txt", caption.encode())):
                    info = tarfile.TarInfo(f"{sample:09d}.{suffix}")
                    info.size = len(data)
                    tar.addfile(info, io.BytesIO(data))
    return f"{folder}/{{00000..{count - 1:05d}}}.tar"


def _photograph(random: np.random.Generator, side: int) -> bytes:
    coarse = random.integers(0, 256, (8, 8, 3), np.uint8)
    smooth = np.asarray(Image.fromarray(coarse).resize((side, side), Image.Resampling.BICUBIC), np.float32)
    pixels = np.clip(smooth + random.normal(0, 6, smooth.shape), 0, 255).astype(np.uint8)
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "jpeg", quality=85)
    return file.getvalue()


def flags(settings: dict[str, Any]) -> list[str]:
    """Settings as words of a command line."""
    pairs = ((f"--{name}", str(value)) for name, value in settings.items())
    return list(itertools.chain.from_iterable(pairs))
