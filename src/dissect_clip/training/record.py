"""The per-sample record: what every sample scored and whether it was trained on, one Parquet file an epoch.

Shapes: N pairs of this rank in a batch, R of this rank between two flushes, G of all ranks, C remembered columns,
W bytes of the longest key.

Memory: the tensors of at most ``flush_every`` batches wait on each device, and of no more than ``MAX_ROWS`` samples
over all ranks, at ``17 + 4 * C`` bytes each; keys (W bytes each) wait in main memory. A flush holds the rows of all
ranks on every rank for a moment: at most ``MAX_ROWS * (17 + 4 * C + W)`` bytes, 12 MB with keys of 25 bytes.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import torch
from torch import Tensor

from dissect_clip.data.batch import Batch
from dissect_clip.distributed.world import World
from dissect_clip.run.epoch_parquet import EpochFile
from dissect_clip.selection import Choice

MAX_ROWS = 1 << 18
"""Samples of all ranks between two flushes, give or take a batch."""


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
class _Batch:
    """What one batch leaves: tensors of the device, but for the keys."""

    sample_id: Tensor  # [N] int64
    selected: Tensor  # [N] bool
    values: Tensor  # [N, 2 + C] float32: score, loss, what was remembered, what is reported; NaN where there is none
    key: Tensor  # [N, W] uint8, in main memory


def _values(batch: Batch, choice: Choice, columns: int) -> Tensor:
    """Score, loss, remembered and reported columns [N, 2 + C] float32; NaN where nothing was scored."""
    candidates = choice.candidates
    absent = torch.full((len(batch), 2 + columns), torch.nan, device=batch.sample_id.device)
    if candidates is None:
        return absent
    if candidates.score is not None:
        absent[:, 0] = candidates.score
    if candidates.loss is not None:
        absent[:, 1] = candidates.loss
    parts = [candidates.memory] if choice.reported is None else [candidates.memory, choice.reported]
    absent[:, 2:] = torch.cat(parts, dim=1)
    return absent


class Recorder:
    """Writes the samples of all ranks to ``folder/epoch_00007.parquet`` for epoch 7 (0-based).

    docs/reference/record.md lists the columns.

    Args:
        shard_names: names of the data set's shards.
        locate: sample ids [G] int64 to places [G] int32 in ``shard_names``.
        columns: names of what the strategy remembers.
        reports: names of what it reports.
        accum_freq: batches that an optimizer step takes.
        flush_every: batches between two flushes, the same on all ranks.
        keep_going: where a file cannot be written, log an error in place of raising one.
    """

    def __init__(
        self,
        folder: Path,
        world: World,
        shard_names: Sequence[str],
        locate: Callable[[npt.NDArray[np.int64]], npt.NDArray[np.int32]],
        columns: Sequence[str],
        accum_freq: int = 1,
        flush_every: int = 64,
        reports: Sequence[str] = (),
        keep_going: bool = False,
    ) -> None:
        self.world = world
        self.locate = locate
        self.columns = (*(f"remembered_{name}" for name in columns), *reports)
        self.accum_freq = accum_freq
        self.flush_every = flush_every
        self._shards = pa.array(list(shard_names), pa.string())
        self._schema = _schema(self.columns)
        self._file: EpochFile | None = None
        if world.is_main:
            self._file = EpochFile(folder, self._schema, keep_going, compression="zstd", use_dictionary=["shard"])
        self._batch = 0  # the batch of the epoch that is the first to wait
        self._waiting: list[_Batch] = []

    def begin(self, epoch: int, step: int = 0) -> None:
        """Start an epoch's file, or go on in it after ``step`` of its optimizer steps. Not collective.

        The rows of batches up to there stay if there was a :meth:`cut`; what an interrupted epoch left besides goes.

        Raises:
            TrainingError: if the file cannot be made.
        """
        self._batch, self._waiting = step * self.accum_freq, []
        if self._file is not None:
            self._file.begin(epoch, step)

    def append(self, batch: Batch, choice: Choice) -> None:
        """Keep what was scored and chosen in one batch. N is equal on all ranks.

        No device sync but when enough batches wait, which are then flushed (collective).
        """
        assert batch.key is not None, "the record needs batches with keys"
        selected = torch.zeros(len(batch), dtype=torch.bool, device=batch.sample_id.device)
        selected.index_fill_(0, choice.index, True)  # an indexed write of True would copy it to the device
        values = _values(batch, choice, len(self.columns))
        self._waiting.append(_Batch(batch.sample_id, selected, values, batch.key))
        rows = len(batch) * len(self._waiting) * self.world.size
        if len(self._waiting) >= self.flush_every or rows >= MAX_ROWS:
            self.flush()

    def flush(self) -> None:
        """Write the batches that wait as a row group. Collective; a device sync.

        Raises:
            TrainingError: if the file cannot be written.
        """
        if not self._waiting:
            return
        sizes = [len(batch.sample_id) for batch in self._waiting]
        columns = self._gather()
        if self._file is not None:
            steps = np.repeat(np.arange(self._batch, self._batch + len(sizes), dtype=np.int32), sizes)
            self._file.write(self._table(steps, *columns))
        self._batch += len(sizes)
        self._waiting = []

    def cut(self, step: int) -> None:
        """Put all rows of the epoch's first ``step`` optimizer steps on the disk, before a checkpoint. Collective.

        Raises:
            TrainingError: if the file cannot be written.
        """
        self.flush()
        if self._file is not None:
            self._file.cut(step)

    def end(self) -> None:
        """Complete the epoch's file. Collective.

        Raises:
            TrainingError: if the file cannot be written.
        """
        self.flush()
        if self._file is not None:
            self._file.end()

    def _gather(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Ids [G], selected [G], values [G, 2 + C] and keys [G, W] of all ranks, rank by rank, in main memory."""
        width = torch.tensor([max(batch.key.shape[1] for batch in self._waiting)], device=self.world.device)
        widest = int(self.world.max(width).item())
        keys = [torch.nn.functional.pad(batch.key, (0, widest - batch.key.shape[1])) for batch in self._waiting]
        local = (
            torch.cat([batch.sample_id for batch in self._waiting]),
            # not every backend moves bool
            torch.cat([batch.selected for batch in self._waiting]).to(torch.uint8),
            torch.cat([batch.values for batch in self._waiting]),
            torch.cat(keys).to(self.world.device),
        )
        ids, selected, values, key = (self.world.all_gather(rows).cpu() for rows in local)
        return ids, selected.bool(), values, key

    def _table(
        self, steps: npt.NDArray[np.int32], ids: Tensor, selected: Tensor, values: Tensor, keys: Tensor
    ) -> pa.Table:
        """The gathered rows as Arrow columns; ``steps`` [R] are the batches that one rank's rows are of."""
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


class NullRecorder:
    """Stands for :class:`Recorder` in runs without ``--record``."""

    def begin(self, epoch: int, step: int = 0) -> None:
        """Do nothing."""

    def append(self, batch: Batch, choice: Choice) -> None:
        """Do nothing."""

    def flush(self) -> None:
        """Do nothing."""

    def cut(self, step: int) -> None:
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
            *((name, pa.float32()) for name in columns),
            ("selected", pa.bool_()),
            ("step", pa.int32()),
            ("rank", pa.int16()),
        ]
    )
