"""What was left out: every row of every rank once, whatever stops the run, and an end where it is too much."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
import torch
from processes import run_on_ranks

from dissect_clip.data import skip_log as skipped
from dissect_clip.data.skip_log import SkipLog, gather_rows
from dissect_clip.data.skips import Skip, SkipRow, pack_rows, unpack_rows
from dissect_clip.distributed.world import World
from dissect_clip.errors import SetupError, TrainingError

NOTHING = torch.empty(0, dtype=torch.uint8)


def row(number: int, shard: str = "a.tar", kind: Skip = Skip.BAD_IMAGE, samples: int = 1) -> SkipRow:
    key = f"{number:05d}" if samples == 1 else None
    return SkipRow(int(kind), shard, key, f"reason {number}", samples)


def add(log: SkipLog, *rows: SkipRow) -> None:
    log.add(pack_rows(rows))


def reasons(folder: Path, epoch: int = 0) -> list[str]:
    values: list[str] = pq.read_table(folder / f"epoch_{epoch:05d}.parquet").column("reason").to_pylist()
    return values


def test_a_row_holds_what_was_left_out(tmp_path: Path) -> None:
    log = SkipLog(tmp_path, World())
    log.begin(3)
    add(log, SkipRow(int(Skip.DAMAGED_SHARD), "b.tar", None, "cut off", 7), row(1))
    log.end()
    assert pq.read_table(tmp_path / "epoch_00003.parquet").to_pylist() == [
        {"epoch": 3, "rank": 0, **found}
        for found in (
            {"kind": "damaged_shard", "shard": "b.tar", "key": None, "reason": "cut off", "samples": 7},
            {"kind": "bad_image", "shard": "a.tar", "key": "00001", "reason": "reason 1", "samples": 1},
        )
    ]


def test_pandas_reads_all_epochs_as_one_table(tmp_path: Path) -> None:
    log = SkipLog(tmp_path / "skipped.parquet", World())
    for epoch, shard in enumerate(["a.tar", "b.tar", "a.tar"]):
        log.begin(epoch)
        add(log, row(epoch, shard))
        log.end()
    log.begin(3)
    log.end()  # nothing was left out
    log.begin(4)
    add(log, row(4))
    log.cut(1)  # not complete
    table = pytest.importorskip("pandas").read_parquet(tmp_path / "skipped.parquet")
    assert table["epoch"].tolist() == [0, 1, 2]
    assert table["shard"].tolist() == ["a.tar", "b.tar", "a.tar"]
    assert table.groupby("shard", observed=True)["samples"].sum().to_dict() == {"a.tar": 2, "b.tar": 1}


def test_a_resumed_epoch_has_every_row_once(tmp_path: Path) -> None:
    log = SkipLog(tmp_path, World())
    log.begin(0)
    add(log, row(1))
    log.cut(10)
    add(log, row(2))
    log.cut(20)
    add(log, row(3))  # and killed
    log = SkipLog(tmp_path, World())
    log.begin(0, step=10)
    add(log, row(2))
    log.cut(20)
    add(log, row(3))
    log.end()
    assert reasons(tmp_path) == ["reason 1", "reason 2", "reason 3"]


def test_names_that_are_not_utf_8_are_repaired(tmp_path: Path) -> None:
    log = SkipLog(tmp_path, World())
    log.begin(0)
    add(log, SkipRow(int(Skip.NO_IMAGE), "\udcff.tar", "k\udc80", "of \udcfe", 1))
    log.end()
    (found,) = pq.read_table(tmp_path / "epoch_00000.parquet").to_pylist()
    assert (found["shard"], found["key"], found["reason"]) == ("�.tar", "k�", "of �")


def test_what_does_not_fit_into_memory_is_counted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    packed = pack_rows([row(1)])
    monkeypatch.setattr(skipped, "WAITING", 2 * len(packed))
    log = SkipLog(tmp_path, World())
    log.begin(0)
    for _ in range(2):
        for _ in range(5):
            log.add(packed)
        add(log, row(9, kind=Skip.NO_CAPTION), row(9, kind=Skip.NO_CAPTION))
        log.cut(1)
    log.end()
    rows = pq.read_table(tmp_path / "epoch_00000.parquet").to_pylist()
    told = [(found["kind"], found["shard"], found["reason"], found["samples"]) for found in rows]
    assert told == 2 * [
        ("bad_image", "a.tar", "reason 1", 1),
        ("bad_image", "a.tar", "reason 1", 1),
        ("bad_image", None, "more of this kind, only counted", 3),
        ("no_caption", None, "more of this kind, only counted", 2),
    ]


def test_without_a_folder_nothing_is_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    log = SkipLog(None, World())
    log.begin(0)
    add(log, row(1))
    log.cut(1)
    log.end()
    with pytest.raises(TrainingError, match=r"--max-skip-fraction 0\. .*1 bad_image.*a\.tar \(1\)\. Mend"):
        log.check(1, 1000, 0.0)
    assert list(tmp_path.iterdir()) == []


# ---- the limit


@pytest.mark.parametrize(
    ("lost", "samples", "limit", "stops"),
    [
        (50, 1000, 0.05, False),
        (51, 1000, 0.05, True),
        (0, 5000, 0.0, False),
        (1, 5000, 0.0, True),
        (5000, 5000, 1.0, False),
    ],
)
def test_the_limit(tmp_path: Path, lost: int, samples: int, limit: float, stops: bool) -> None:
    log = SkipLog(tmp_path, World())
    log.begin(0)
    add(log, row(1, samples=lost or 1))
    if stops:
        with pytest.raises(TrainingError, match="--max-skip-fraction"):
            log.check(lost, samples, limit)
    else:
        log.check(lost, samples, limit)


def test_the_message_names_kinds_the_worst_shards_and_the_file(tmp_path: Path) -> None:
    log = SkipLog(tmp_path, World())
    log.begin(2)
    for shard in range(1, 8):
        add(log, *(row(n, f"{shard}.tar") for n in range(shard)))
    add(log, SkipRow(int(Skip.DAMAGED_SHARD), "3.tar", None, "cut off", 30))
    with pytest.raises(TrainingError) as error:
        log.check(58, 1000, 0.05)
    message = str(error.value)
    assert message.startswith(
        "58 training samples of epoch 2 could not be used so far, 5.8% of its 1000, more than --max-skip-fraction 0.05."
    )
    assert "By kind: 30 damaged_shard, 28 bad_image." in message
    assert "Worst shards: 3.tar (33), 7.tar (7), 6.tar (6), 5.tar (5), 4.tar (4)." in message
    assert str(tmp_path) in message
    assert len(reasons(tmp_path, 2)) == 29  # the file that it points to is there


def test_after_a_resume_the_message_says_what_it_counts(tmp_path: Path) -> None:
    log = SkipLog(tmp_path, World())
    log.begin(2, step=5)
    add(log, row(1))
    with pytest.raises(TrainingError, match="By kind since the run was resumed: 1 bad_image"):
        log.check(60, 1000, 0.05)


def test_an_epoch_starts_from_nothing(tmp_path: Path) -> None:
    log = SkipLog(tmp_path, World())
    log.begin(0)
    add(log, row(1, "old.tar"))
    log.begin(1)
    add(log, row(2, "new.tar"))
    with pytest.raises(TrainingError, match=r"Worst shards: new\.tar \(1\)\. "):
        log.check(1, 1, 0.05)
    assert reasons(tmp_path, 1) == ["reason 2"]


# ---- several ranks


@pytest.mark.parametrize("piece", [1, 7, 100, 1 << 20])
def test_rows_cut_by_pieces_are_put_together(piece: int) -> None:
    rows = [row(number, "s" * (number % 13)) for number in range(40)]
    found = [
        (rank, unpack_rows(packed)) for part in gather_rows(pack_rows(rows), World(), piece) for rank, packed in part
    ]
    assert [one for rank, some in found for one in some] == rows
    assert {rank for rank, _ in found} == {0}
    assert list(gather_rows(NOTHING, World(), piece)) == []


def _on_ranks(world: World, folder: str) -> dict[str, Any]:
    """Gathered rows by how many this rank has; the outcome of the limit, and of a file that cannot be written."""
    gathered = {}
    for few in (0, 3):
        mine = [row(number, f"{world.rank}.tar") for number in range([few, 40][world.rank])]
        packed = pack_rows(mine) if mine else NOTHING
        gathered[few] = [
            (rank, one.shard, one.key)
            for part in gather_rows(packed, world, piece=250)
            for rank, rows in part
            for one in unpack_rows(rows)
        ]
    log = SkipLog(Path(folder) / "whole", world)
    log.begin(0)
    log.add(packed)
    log.cut(1)
    try:
        log.check(43, 43, 0.5)
        limit = ""
    except TrainingError as error:
        limit = str(error)
    log = SkipLog(Path(folder) / "broken", world)
    log.begin(0)
    log.add(packed)
    if world.is_main:
        log._file.write = _full  # type: ignore[method-assign,union-attr]
    try:
        log.end()
        broken = ""
    except (TrainingError, SetupError) as error:
        broken = str(error)
    return {"gathered": gathered, "limit": limit, "broken": broken}


def _full(table: object) -> None:
    raise TrainingError("disk full")


def expected(*counts: int) -> list[tuple[int, str, str]]:
    return [(rank, f"{rank}.tar", f"{number:05d}") for rank, count in enumerate(counts) for number in range(count)]


@pytest.mark.dist
def test_ranks_with_none_some_and_many(tmp_path: Path) -> None:
    for answer in run_on_ranks(2, _on_ranks, str(tmp_path)):
        assert answer["gathered"] == {0: expected(0, 40), 3: expected(3, 40)}
        assert "43 training samples" in answer["limit"]
        assert "Worst shards: 1.tar (40), 0.tar (3)." in answer["limit"]
        assert answer["broken"] == "disk full"
    table = pq.read_table(tmp_path / "whole").to_pandas()
    assert table.groupby("rank")["samples"].sum().to_dict() == {0: 3, 1: 40}
    assert [f"{rank}.tar" for rank in table["rank"]] == table["shard"].tolist()
