"""Samples that training skipped, over all ranks: a row each in ``RUN/skipped.parquet``, and a limit on their share.

Shapes: B bytes of packed rows (:mod:`dissect_clip.data.skips`).

Memory: up to ``WAITING`` bytes of packed rows wait on each rank; later rows are only counted, and the file says so. A
gather moves pieces of ``PIECE`` bytes of the rows of all ranks together, so that its cost is the sum over the ranks,
not (ranks) x (the largest of them).
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from itertools import accumulate
from pathlib import Path

import pyarrow as pa
import torch
from torch import Tensor

from dissect_clip.data.skips import Skip, SkipRow, pack_rows, unpack_rows
from dissect_clip.distributed.world import World
from dissect_clip.errors import TrainingError
from dissect_clip.run.epoch_parquet import EpochFile

WAITING = 64 << 20
"""Bytes of packed rows that a rank keeps between two gathers; hundreds of thousands of samples."""

PIECE = 16 << 20
"""Bytes of packed rows of all ranks that are gathered at a time."""

_WORST = 5
_UNTOLD = "more of this kind, only counted"
_SENT = 1000
"""Shards that a rank names when the limit is passed: those with the most skipped samples."""

_SCHEMA = pa.schema(
    [
        ("epoch", pa.int32()),
        ("kind", pa.dictionary(pa.int32(), pa.string())),
        ("shard", pa.dictionary(pa.int32(), pa.string())),
        ("key", pa.string()),
        ("reason", pa.string()),
        ("samples", pa.int64()),
        ("rank", pa.int16()),
    ]
)
_LONE_SURROGATE = re.compile("[\ud800-\udfff]")


class SkipLog:
    """Writes the left-out samples of all ranks to ``folder/epoch_00007.parquet`` for epoch 7.

    docs/reference/run-folder.md lists the columns.

    Args:
        folder: which Parquet readers take as one dataset; None writes nothing.
        keep_going: where a file cannot be written, log an error in place of raising one.
    """

    def __init__(self, folder: Path | None, world: World, keep_going: bool = False) -> None:
        self.folder = folder
        self.world = world
        self._file: EpochFile | None = None
        if folder is not None and world.is_main:
            self._file = EpochFile(folder, _SCHEMA, keep_going, compression="zstd")
        self._start(0, 0)

    def _start(self, epoch: int, step: int) -> None:
        self._epoch, self._resumed = epoch, step > 0
        self._waiting = bytearray()  # packed rows
        self._untold: Counter[int] = Counter()  # samples by kind whose rows came when no more could wait
        self._samples: Counter[tuple[int, str]] = Counter()  # of this rank, by kind and shard

    def begin(self, epoch: int, step: int = 0) -> None:
        """Start an epoch, or resume it after ``step`` of its optimizer steps: later rows are dropped. Not collective.

        Raises:
            TrainingError: if the file cannot be made.
        """
        self._start(epoch, step)
        if self._file is not None:
            self._file.begin(epoch, step)

    def add(self, rows: Tensor) -> None:
        """Keep what this rank left out, [B] uint8 packed rows. Not collective."""
        fits = len(self._waiting) + len(rows) <= WAITING
        for row in unpack_rows(rows):
            self._samples[row.kind, row.shard] += row.samples
            if not fits:
                self._untold[row.kind] += row.samples
        if fits and self.folder is not None:
            self._waiting += rows.numpy().tobytes()

    def cut(self, step: int) -> None:
        """Write what waits as rows of the epoch's first ``step`` optimizer steps, before their checkpoint. Collective.

        Raises:
            TrainingError: if the file cannot be written.
        """
        self._write(lambda file: file.cut(step))

    def end(self) -> None:
        """Complete the epoch's file. Collective.

        Raises:
            TrainingError: if the file cannot be written.
        """
        self._write(lambda file: file.end())

    def _write(self, finish: Callable[[EpochFile], None]) -> None:
        """Gather what waits, write it on rank 0, then ``finish`` the file."""
        if self.folder is None:
            return
        untold = [SkipRow(kind, "", None, _UNTOLD, samples) for kind, samples in self._untold.items()]
        waiting = _as_tensor(self._waiting + _packed(untold))
        self._waiting, self._untold = bytearray(), Counter()
        problem: TrainingError | None = None
        for piece in gather_rows(waiting, self.world):
            if self._file is not None and problem is None:
                try:
                    self._file.write(_table(self._epoch, piece))
                except TrainingError as error:  # the other ranks are still in the gather
                    problem = error

        def complete() -> None:
            if problem is not None:
                raise problem
            assert self._file is not None
            finish(self._file)

        self.world.on_main(complete)

    def check(self, skipped: int, samples: int, limit: float) -> None:
        """Check that at most the share ``limit`` of an epoch's samples was skipped. Collective if it was more.

        Args:
            skipped: left-out samples of the epoch so far, over all ranks.
            samples: of the whole epoch, over all ranks.
            limit: in [0, 1].

        Raises:
            TrainingError: on all ranks; says how many of which kind, and names the worst shards.
        """
        if skipped <= limit * samples:
            return
        mine = [SkipRow(kind, shard, None, "", n) for (kind, shard), n in self._samples.most_common(_SENT)]
        kinds: Counter[int] = Counter()
        shards: Counter[str] = Counter()
        for piece in gather_rows(_as_tensor(_packed(mine)), self.world):
            for _, rows in piece:
                for row in unpack_rows(rows):
                    kinds[row.kind] += row.samples
                    shards[row.shard] += row.samples
        self.end()
        raise TrainingError(self._explain(skipped, samples, limit, kinds, shards))

    def _explain(self, skipped: int, samples: int, limit: float, kinds: Counter[int], shards: Counter[str]) -> str:
        since = " since the run was resumed" if self._resumed else ""
        by_kind = ", ".join(f"{count} {Skip(kind).label}" for kind, count in kinds.most_common())
        by_shard = ", ".join(f"{shard} ({count})" for shard, count in shards.most_common(_WORST))
        look = "" if self.folder is None else f"{self.folder} names each with the reason. "
        return (
            f"{skipped} training samples of epoch {self._epoch} could not be used so far, {skipped / samples:.1%} of "
            f"its {samples}, more than --max-skip-fraction {limit:g}. By kind{since}: {by_kind}. Worst shards: "
            f"{by_shard}. {look}Mend these shards or leave them out of --train-data, or train without their samples "
            "with a larger --max-skip-fraction (1 never stops)"
        )


def _packed(rows: list[SkipRow]) -> bytes:
    return pack_rows(rows).numpy().tobytes() if rows else b""


def _as_tensor(data: bytes | bytearray) -> Tensor:
    """[B] uint8, also of nothing, which torch.frombuffer refuses."""
    return torch.frombuffer(bytearray(data), dtype=torch.uint8) if data else torch.empty(0, dtype=torch.uint8)


def gather_rows(rows: Tensor, world: World, piece: int = PIECE) -> Iterator[list[tuple[int, Tensor]]]:
    """Packed rows [B] of every rank, B of any size -> those of all ranks in pieces: (rank, packed rows) in its order.

    Collective, on every rank until it is exhausted: a sum over the ranks for each ``piece`` of bytes, into which
    every rank puts its own where the others have zeros.
    """
    sizes = world.all_gather(torch.tensor([len(rows)], device=world.device)).tolist()
    stops = list(accumulate(sizes))
    begin = stops[world.rank] - len(rows)
    rest = b""  # of a row that continues in the next piece
    for start in range(0, stops[-1], piece):
        stop = min(start + piece, stops[-1])
        part = torch.zeros(stop - start, dtype=torch.uint8)
        low, high = max(start, begin), min(stop, begin + len(rows))
        if low < high:
            part[low - start : high - start] = rows[low - begin : high - begin]
        gathered = world.sum(part.to(world.device)).cpu().numpy().tobytes()
        found = []
        for rank, (size, end) in enumerate(zip(sizes, stops, strict=True)):
            data = rest + gathered[max(0, end - size - start) : max(0, end - start)]
            whole = data.rfind(b"\n") + 1
            rest = data[whole:]
            if whole:
                found.append((rank, _as_tensor(data[:whole])))
        if found:
            yield found


def _strings(texts: Sequence[str | None]) -> pa.Array:
    """Texts for Arrow; what was not UTF-8 where it came from is U+FFFD, as in the record."""
    try:
        return pa.array(texts, pa.string())
    except UnicodeEncodeError:
        return pa.array([text and _LONE_SURROGATE.sub("�", text) for text in texts], pa.string())


def _table(epoch: int, piece: list[tuple[int, Tensor]]) -> pa.Table:
    parts = [(rank, unpack_rows(packed)) for rank, packed in piece]
    kinds, shards, keys, reasons, samples = zip(*(row for _, rows in parts for row in rows), strict=True)
    columns = [
        pa.array([epoch] * len(kinds), pa.int32()),
        pa.DictionaryArray.from_arrays(pa.array(kinds, pa.int32()), pa.array([kind.label for kind in Skip])),
        _strings([shard or None for shard in shards]).dictionary_encode(),
        _strings(keys),
        _strings(reasons),
        pa.array(samples, pa.int64()),
        pa.array([rank for rank, rows in parts for _ in rows], pa.int16()),
    ]
    return pa.Table.from_arrays(columns, schema=_SCHEMA)
