"""One Parquet file an epoch, written in parts, so that an epoch can be resumed at a checkpoint in its middle.

    folder/epoch_00003.parquet                    a complete epoch
    folder/_epoch_00003.parts/00000400.parquet    rows of the current one, up to its optimizer step 400
    folder/_epoch_00003.parts/*.tmp               what is being written

Readers of datasets leave out names with a leading underscore, so ``folder`` can be read as one at any time.

The parts are what counts as long as their folder is there. A complete file remembers where its parts ended: where a run
dies after the end of an epoch and before the checkpoint of that moment, it resumes inside the epoch, and the rows from
before are taken from the complete file.
"""

from __future__ import annotations

import json
import logging
import os
import shutil
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from dissect_clip.errors import TrainingError
from dissect_clip.run.atomic import put_in_place, sync_folder

log = logging.getLogger(__name__)

_MARKS = b"dissect_clip.parts"
"""Metadata of a complete file: [step, row groups up to it] of its parts, rising, as JSON."""


class EpochFile:
    """The file of one epoch after the other. For one process; not collective.

    Where the disk does not do what it should, all methods raise TrainingError, which names the file; with
    ``keep_going`` they log an error instead, and there is no file of this epoch.

    Args:
        schema: of all tables that are written.
        keep_going: as ``--on-save-error continue`` asks for.
        writer_options: of pyarrow's ParquetWriter.
    """

    def __init__(self, folder: Path, schema: pa.Schema, keep_going: bool = False, **writer_options: Any) -> None:
        self.folder = folder
        self.schema = schema
        self.keep_going = keep_going
        self.writer_options = writer_options
        self._epoch = 0
        self._writer: pq.ParquetWriter | None = None
        self._given_up = False

    @property
    def path(self) -> Path:
        """The file of this epoch, once it is complete."""
        return self.folder / f"epoch_{self._epoch:05d}.parquet"

    @property
    def _parts(self) -> Path:
        return self.folder / f"_epoch_{self._epoch:05d}.parts"

    @property
    def _open_part(self) -> Path:
        return self._parts / "open.tmp"

    def begin(self, epoch: int, step: int = 0) -> None:
        """Start an epoch (0-based), or resume it after ``step`` of its optimizer steps.

        Rows that were written up to a :meth:`cut` at or before ``step`` stay, later ones are gone, and so is what other
        epochs left unfinished. A complete file of this epoch from a longer run is replaced by :meth:`end` only.
        """
        self._epoch, self._writer, self._given_up = epoch, None, False
        with self._writing():
            self.folder.mkdir(parents=True, exist_ok=True)
            self._remove_leftovers()
            if not self._parts.exists():
                if step > 0 and not self.path.exists():
                    log.warning(
                        "The rows of the first %d steps of epoch %d are not in %s, as if the run was resumed from "
                        "another folder or machine: its file will lack them", step, epoch, self.folder,
                    )  # fmt: skip
                self._restore(step)
            for end, part in self._finished():
                if end > step:
                    part.unlink()
            sync_folder(self._parts)

    def write(self, table: pa.Table) -> None:
        """Append rows."""
        if self._given_up:
            return
        with self._writing():
            if self._writer is None:
                self._writer = self._open(self._open_part, self.schema)
            self._writer.write_table(table)

    def cut(self, step: int) -> None:
        """End a part: put all rows so far on the disk, as those of the epoch's first ``step`` optimizer steps.

        A checkpoint of this step may be saved afterwards, not before.
        """
        if self._writer is None:
            return
        part = self._parts / f"{step:08d}.parquet"
        with self._writing():
            self._close()
            if part.exists():  # a second cut at the same step
                self._copy(_row_groups([part, self._open_part]), self._whole, self.schema)
                put_in_place(self._whole, part)
                self._open_part.unlink()
            else:
                put_in_place(self._open_part, part)

    def end(self) -> None:
        """Complete the epoch's file. With parts, their rows are copied, a row group at a time."""
        if self._given_up:
            return
        with self._writing():
            finished = self._finished()
            if self._writer is None and not finished:
                self._writer = self._open(self._open_part, self.schema)
            rest = [] if self._writer is None else [self._open_part]
            self._close()
            if finished:
                parts = [part for _, part in finished]
                marked = self.schema.with_metadata({_MARKS: _marks(finished)})
                self._copy(_row_groups([*parts, *rest]), self._whole, marked)
                put_in_place(self._whole, self.path)
            else:
                put_in_place(self._open_part, self.path)
            self._discard_parts()

    @contextmanager
    def _writing(self) -> Iterator[None]:
        """Turn a failure to write into a TrainingError that names the file, or give the epoch's file up."""
        try:
            yield
        except (OSError, pa.ArrowException) as error:
            if not self.keep_going:
                raise TrainingError(
                    f"cannot write {self.path}: {error}. Make room for it; --resume latest then continues from the "
                    "last checkpoint"
                ) from error
            self._give_up(error)

    def _give_up(self, error: Exception) -> None:
        """Leave nothing of the epoch, since a part of its rows would be taken for all."""
        log.error(
            "cannot write %s: %s. Training continues (--on-save-error continue), and this epoch has no such file; that "
            "of the next is tried again", self.path, error,
        )  # fmt: skip
        self._given_up = True
        with suppress(OSError, pa.ArrowException):
            self._close()
        self._writer = None
        shutil.rmtree(self._parts, ignore_errors=True)

    @property
    def _whole(self) -> Path:
        return self._parts / "whole.tmp"

    @property
    def _aside(self) -> Path:
        """Where the folder of parts is filled before it counts, and goes when it counts no more."""
        return self.folder / f"_epoch_{self._epoch:05d}.tmp"

    def _open(self, path: Path, schema: pa.Schema) -> pq.ParquetWriter:
        return pq.ParquetWriter(path, schema, **self.writer_options)

    def _close(self) -> None:
        if self._writer is not None:
            self._writer.close()
            self._writer = None

    def _copy(self, tables: Iterable[pa.Table], target: Path, schema: pa.Schema) -> None:
        with self._open(target, schema) as writer:
            for table in tables:
                writer.write_table(table)

    def _finished(self) -> list[tuple[int, Path]]:
        """The parts and the steps they end at, rising."""
        return sorted((int(part.stem), part) for part in self._parts.glob("*.parquet"))

    def _remove_leftovers(self) -> None:
        for path in self.folder.glob("_epoch_*"):
            if path != self._parts:
                shutil.rmtree(path)
        for path in (*self.folder.glob("epoch_*.parquet.tmp"), *self._parts.glob("*.tmp")):
            path.unlink()

    def _restore(self, step: int) -> None:
        """Make the folder of parts, with those that a complete file holds; it appears when all is in it."""
        self._aside.mkdir()
        marks = _read_marks(self.path) if step > 0 and self.path.exists() else []
        ends = [(end, groups) for end, groups in marks if end <= step]
        if ends:
            end, groups = ends[-1]
            partial = self._aside / "open.tmp"
            self._copy(_row_groups([self.path], groups), partial, self.schema)
            put_in_place(partial, self._aside / f"{end:08d}.parquet")
        os.replace(self._aside, self._parts)
        sync_folder(self.folder)

    def _discard_parts(self) -> None:
        os.replace(self._parts, self._aside)  # at once, so that no half of them is taken for the whole
        sync_folder(self.folder)
        shutil.rmtree(self._aside)


def _row_groups(files: Iterable[Path], count: int | None = None) -> Iterator[pa.Table]:
    """The row groups of some files in order; of each all, or the first ``count``."""
    for path in files:
        with pq.ParquetFile(path) as file:
            for group in range(file.num_row_groups if count is None else count):
                yield file.read_row_group(group)


def _marks(parts: Iterable[tuple[int, Path]]) -> bytes:
    groups, marks = 0, []
    for step, part in parts:
        groups += pq.read_metadata(part).num_row_groups
        marks.append((step, groups))
    return json.dumps(marks).encode()


def _read_marks(path: Path) -> list[tuple[int, int]]:
    metadata = pq.read_schema(path).metadata or {}
    return [(step, groups) for step, groups in json.loads(metadata.get(_MARKS, b"[]"))]
