"""The per-sample record: what every sample scored and whether it was trained on, one Parquet file an epoch.

Shapes: N pairs of this rank in a batch, R of this rank between two flushes, G of all ranks, C remembered columns,
W bytes of the longest key.

Memory: the tensors of at most ``flush_every`` steps wait on each device, and of no more than ``MAX_ROWS`` samples over
all ranks, at ``17 + 4 * C`` bytes each; keys (W bytes each) wait in main memory. A flush holds the rows of all ranks on
every rank for a moment: at most ``MAX_ROWS * (17 + 4 * C + W)`` bytes, 12 MB with keys of 25 bytes.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from torch import Tensor

from dissect_clip.batch import Batch
from dissect_clip.dist import World
from dissect_clip.errors import TrainingError
from dissect_clip.selection.base import Selection, clip_score

MAX_ROWS = 1 << 18
"""Samples of all ranks between two flushes, give or take a step."""


def decode_keys(keys: npt.NDArray[np.uint8]) -> pa.Array:
    """[G, W] bytes of UTF-8, padded with 0, to G Arrow strings; invalid bytes become U+FFFD.

    No Python object is made for a key. Each key is closed with a 0, which ends an invalid sequence and is part of no
    valid one, so that all keys are repaired in one pass and found again.
    """
    closed = np.concatenate([keys, np.zeros((len(keys), 1), np.uint8)], axis=1)
    keep = closed != 0
    keep[:, -1] = True
    repaired = closed[keep].tobytes().decode("utf-8", "replace").encode("utf-8")
    joined = np.frombuffer(repaired, np.uint8)
    ends = np.flatnonzero(joined == 0)
    offsets = np.zeros(len(keys) + 1, np.int32)
    offsets[1:] = ends - np.arange(len(keys))  # the zeros before each end are taken out
    return pa.StringArray.from_buffers(len(keys), pa.py_buffer(offsets), pa.py_buffer(joined[joined != 0]))


@dataclass(frozen=True, slots=True)
class _Step:
    """What one step leaves: tensors of the device, but for the keys."""

    sample_id: Tensor  # [N] int64
    selected: Tensor  # [N] bool
    values: Tensor  # [N, 2 + C] float32: score, loss, what was remembered; NaN where there is none
    key: Tensor  # [N, W] uint8, in main memory


def _values(batch: Batch, selection: Selection, columns: int) -> Tensor:
    """Score, loss and remembered columns [N, 2 + C] float32; NaN where nothing was scored."""
    candidates = selection.candidates
    absent = torch.full((len(batch), 2 + columns), torch.nan, device=batch.sample_id.device)
    if candidates is None:
        return absent
    if candidates.similarity is not None:
        absent[:, 0] = clip_score(candidates.similarity.float())
    if candidates.loss is not None:
        absent[:, 1] = candidates.loss
    absent[:, 2:] = candidates.memory
    return absent


class Recorder:
    """Writes the samples of all ranks to ``folder/epoch_00007.parquet`` for epoch 7 (0-based); columns: docs/record.md.

    Args:
        shard_names: names of the data set's shards.
        locate: sample ids [G] int64 to places [G] int32 in ``shard_names``.
        columns: names of what the strategy remembers.
        flush_every: steps between two flushes, the same on all ranks.
    """

    def __init__(
        self,
        folder: Path,
        world: World,
        shard_names: Sequence[str],
        locate: Callable[[npt.NDArray[np.int64]], npt.NDArray[np.int32]],
        columns: Sequence[str],
        flush_every: int = 64,
    ) -> None:
        self.folder = folder
        self.world = world
        self.locate = locate
        self.columns = tuple(columns)
        self.flush_every = flush_every
        self._shards = pa.array(list(shard_names), pa.string())
        self._schema = _schema(self.columns)
        self._writer: pq.ParquetWriter | None = None
        self._epoch = 0
        self._step = 0  # of the first step that waits
        self._waiting: list[_Step] = []

    @property
    def path(self) -> Path:
        """The file of this epoch, once it is complete."""
        return self.folder / f"epoch_{self._epoch:05d}.parquet"

    @property
    def _partial(self) -> Path:
        return self.path.with_name(self.path.name + ".tmp")

    def begin(self, epoch: int) -> None:
        """Start an epoch's file; what an interrupted epoch left behind is removed. Not collective.

        Raises:
            TrainingError: if the file cannot be made.
        """
        self._epoch, self._step, self._waiting = epoch, 0, []
        if self.world.is_main:
            with _naming(self._partial):
                self._writer = self._open()

    def _open(self) -> pq.ParquetWriter:
        self.folder.mkdir(parents=True, exist_ok=True)
        for leftover in self.folder.glob("epoch_*.parquet.tmp"):
            leftover.unlink()
        return pq.ParquetWriter(self._partial, self._schema, compression="zstd", use_dictionary=["shard"])

    def append(self, batch: Batch, selection: Selection) -> None:
        """Keep what one step scored and chose. N is equal on all ranks.

        No device sync but when enough steps wait, which are then flushed (collective).
        """
        assert batch.key is not None, "the record needs batches with keys"
        selected = torch.zeros(len(batch), dtype=torch.bool, device=batch.sample_id.device)
        selected.index_fill_(0, selection.index, True)  # an indexed write of True would copy it to the device
        values = _values(batch, selection, len(self.columns))
        self._waiting.append(_Step(batch.sample_id, selected, values, batch.key))
        rows = len(batch) * len(self._waiting) * self.world.size
        if len(self._waiting) >= self.flush_every or rows >= MAX_ROWS:
            self.flush()

    def flush(self) -> None:
        """Write the steps that wait as a row group. Collective; a device sync.

        Raises:
            TrainingError: if the file cannot be written.
        """
        if not self._waiting:
            return
        sizes = [len(step.sample_id) for step in self._waiting]
        columns = self._gather()
        if self._writer is not None:
            steps = np.repeat(np.arange(self._step, self._step + len(sizes), dtype=np.int32), sizes)
            with _naming(self._partial):
                self._writer.write_table(self._table(steps, *columns))
        self._step += len(sizes)
        self._waiting = []

    def end(self) -> None:
        """Complete the epoch's file. Collective.

        Raises:
            TrainingError: if the file cannot be written.
        """
        self.flush()
        if self._writer is not None:
            with _naming(self._partial):
                self._writer.close()
                os.replace(self._partial, self.path)
            self._writer = None

    def _gather(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Ids [G], selected [G], values [G, 2 + C] and keys [G, W] of all ranks, rank by rank, in main memory."""
        width = torch.tensor([max(step.key.shape[1] for step in self._waiting)], device=self.world.device)
        widest = int(self.world.max(width).item())
        keys = [torch.nn.functional.pad(step.key, (0, widest - step.key.shape[1])) for step in self._waiting]
        local = (
            torch.cat([step.sample_id for step in self._waiting]),
            # not every backend moves bool
            torch.cat([step.selected for step in self._waiting]).to(torch.uint8),
            torch.cat([step.values for step in self._waiting]),
            torch.cat(keys).to(self.world.device),
        )
        ids, selected, values, key = (self.world.all_gather(rows).cpu() for rows in local)
        return ids, selected.bool(), values, key

    def _table(
        self, steps: npt.NDArray[np.int32], ids: Tensor, selected: Tensor, values: Tensor, keys: Tensor
    ) -> pa.Table:
        """The gathered rows as Arrow columns; ``steps`` [R] are those of one rank."""
        size = self.world.size
        shards = pa.array(self.locate(ids.numpy()), pa.int32())
        floats = values.numpy()
        measured = [pa.array(column, pa.float32(), mask=np.isnan(column)) for column in floats.T]
        columns = [
            pa.array(ids.numpy()),
            pa.DictionaryArray.from_arrays(shards, self._shards),
            decode_keys(keys.numpy()),
            *measured,
            pa.array(selected.numpy()),
            pa.array(np.tile(steps, size)),
            pa.array(np.repeat(np.arange(size, dtype=np.int16), len(steps))),
        ]
        return pa.Table.from_arrays(columns, schema=self._schema)


@contextmanager
def _naming(path: Path) -> Iterator[None]:
    """Turn a failure to write into a TrainingError that names the file."""
    try:
        yield
    except OSError as error:
        raise TrainingError(f"cannot write the record {path}: {error}. Make room, or leave --record out") from error


class NullRecorder:
    """Stands for :class:`Recorder` in runs without ``--record``."""

    def begin(self, epoch: int) -> None:
        """Do nothing."""

    def append(self, batch: Batch, selection: Selection) -> None:
        """Do nothing."""

    def flush(self) -> None:
        """Do nothing."""

    def end(self) -> None:
        """Do nothing."""


def _schema(columns: Sequence[str]) -> pa.Schema:
    return pa.schema(
        [
            ("sample_id", pa.int64()),
            ("shard", pa.dictionary(pa.int32(), pa.string())),
            ("key", pa.string()),
            ("score", pa.float32()),
            ("loss", pa.float32()),
            *((f"remembered_{name}", pa.float32()) for name in columns),
            ("selected", pa.bool_()),
            ("step", pa.int32()),
            ("rank", pa.int16()),
        ]
    )
