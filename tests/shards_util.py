"""Tiny shards, tables and images on disk for tests of whatever reads data."""

import io
import json
import tarfile
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from dissect_clip.config.settings import Config

PIXELS = 8


def image_bytes(
    color: int = 0, kind: str = "png", size: tuple[int, int] = (PIXELS, PIXELS), mode: str = "RGB"
) -> bytes:
    """An encoded image of one color, 0..255 in the red channel."""
    file = io.BytesIO()
    Image.new("RGB", size, (color % 256, 0, 0)).convert(mode).save(file, kind, lossless=True)
    return file.getvalue()


def caption_of(number: int) -> str:
    """A caption that tells which sample it belongs to; see :func:`tokenize`."""
    return f"sample {number}"


def sample(number: int, **changes: bytes | None) -> dict[str, bytes]:
    """The files of a good sample; ``changes`` by suffix replace or (None) remove some."""
    files = {"png": image_bytes(number), "txt": caption_of(number).encode()} | changes
    return {suffix: data for suffix, data in files.items() if data is not None}


def write_tar(path: Path, members: Iterable[tuple[str, bytes]], format: int = tarfile.GNU_FORMAT) -> Path:  # noqa: A002
    """A tar of named files; compressed where the name ends in gz."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w:gz" if path.suffix in (".gz", ".tgz") else "w", format=format) as tar:
        for name, data in members:
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return path


def make_shard(path: Path, samples: Mapping[str, Mapping[str, bytes]]) -> Path:
    """A shard of samples, by key."""
    return write_tar(
        path, ((f"{key}.{suffix}", data) for key, files in samples.items() for suffix, data in files.items())
    )


def read_shard(path: Path) -> list[tuple[str, dict[str, bytes]]]:
    """The keys of a shard in their order, each with its files by suffix."""
    samples: dict[str, dict[str, bytes]] = {}
    with tarfile.open(path) as tar:
        for member in tar:
            key, suffix = member.name.split(".")
            content = tar.extractfile(member)
            assert content is not None
            samples.setdefault(key, {})[suffix] = content.read()
    return list(samples.items())


def make_shards(folder: Path, sizes: Sequence[int], bad: Mapping[int, Mapping[str, bytes | None]] | None = None) -> str:
    """Shards ``train-000.tar`` and on, of these sizes. Keys and captions are the expected ids; returns the pattern.

    ``bad`` changes the files of some samples, by id.
    """
    number = 0
    for place, size in enumerate(sizes):
        ids = range(number, number + size)
        number += size
        make_shard(folder / f"train-{place:03d}.tar", {f"{i:06d}": sample(i, **(bad or {}).get(i, {})) for i in ids})
    return str(folder / f"train-{{000..{len(sizes) - 1:03d}}}.tar")


def write_json(path: Path, content: Any) -> Path:
    """A JSON file."""
    path.write_text(json.dumps(content))
    return path


def to_tensor(image: Image.Image) -> torch.Tensor:
    """[3, H, W] float in [0, 1], resized to a fixed size; a transform without randomness."""
    pixels = np.asarray(image.convert("RGB").resize((PIXELS, PIXELS)), np.float32) / 255
    return torch.from_numpy(pixels).permute(2, 0, 1).contiguous()


def jittered(image: Image.Image) -> torch.Tensor:
    """The same with noise, from torch's generator, as training transforms have."""
    return to_tensor(image) + torch.rand(3, 1, 1)


def tokenize(texts: list[str]) -> torch.Tensor:
    """[N] texts -> [N, 2] int64: the number that the text ends with (else -1), and the text's length."""
    ends = [text.split()[-1] if text.split() else "" for text in texts]
    return torch.tensor(
        [[int(end) if end.isdigit() else -1, len(text)] for end, text in zip(ends, texts, strict=True)]
    ).reshape(len(texts), 2)


def data_config(**changes: Any) -> Config:
    """Settings for loaders: small batches, in this process."""
    return Config.of(**({"workers": 0, "batch_size": 4} | changes))
