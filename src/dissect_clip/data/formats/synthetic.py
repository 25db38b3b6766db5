"""Synthetic data: a blank image and a dummy caption, as often as asked for, to time and test training without data."""

from __future__ import annotations

import hashlib
import io
from collections.abc import Iterator

from PIL import Image

from dissect_clip.config.settings import Config
from dissect_clip.data.evaluation.stream import RetrievalData
from dissect_clip.data.formats.decode import RawSample
from dissect_clip.data.formats.table import table_retrieval, table_train
from dissect_clip.data.loaders import Tokenizer, Transform
from dissect_clip.data.train_data import TrainData
from dissect_clip.distributed.world import World
from dissect_clip.errors import SetupError
from dissect_clip.seeding import seeded

_CAPTION = b"Dummy caption"
_PROBE_SIZE = (256, 256)


def _blank_image(transform: Transform) -> bytes:
    """A blank PNG of the size that the transform makes of any image."""
    with seeded(0):
        _, height, width = transform(Image.new("RGB", _PROBE_SIZE)).shape
    file = io.BytesIO()
    Image.new("RGB", (width, height)).save(file, "png")
    return file.getvalue()


class SyntheticTable:
    """Rows that are all alike."""

    name = "synthetic"

    def __init__(self, num_samples: int, transform: Transform) -> None:
        self._num_samples = num_samples
        self._files = {"png": _blank_image(transform), "txt": _CAPTION}

    def __len__(self) -> int:
        return self._num_samples

    def read(self, row: int) -> RawSample:
        """The blank pair, under the row's number."""
        return RawSample(row, self.name, str(row), self._files)

    def keys(self) -> Iterator[str]:
        """The rows' numbers."""
        return map(str, range(len(self)))


def build_train(config: Config, world: World, transform: Transform, tokenizer: Tokenizer) -> TrainData:
    """--train-num-samples synthetic pairs. Not collective.

    Raises:
        SetupError: --train-num-samples is not given.
    """
    if config.data.train_num_samples is None:
        raise SetupError("--dataset-type synthetic needs --train-num-samples")
    table = SyntheticTable(config.data.train_num_samples, transform)
    digest = hashlib.sha256(f"synthetic\t{len(table)}\n".encode()).hexdigest()
    return table_train(table, digest, config, world, transform, tokenizer)


def build_retrieval(config: Config, world: World, transform: Transform, tokenizer: Tokenizer) -> RetrievalData:
    """--val-num-samples synthetic pairs, or else --train-num-samples. Not collective.

    Raises:
        SetupError: neither is given.
    """
    num_samples = config.evaluation.val_num_samples or config.data.train_num_samples
    if num_samples is None:
        raise SetupError("--dataset-type synthetic needs --val-num-samples for its validation data")
    return table_retrieval(SyntheticTable(num_samples, transform), config, world, transform, tokenizer)
