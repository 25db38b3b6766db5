"""An epoch's file: exactly the rows from before a checkpoint, wherever the run was killed after it."""

from __future__ import annotations

import os
import resource
import shutil
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.dataset as ds
import pyarrow.parquet as pq
import pytest

from dissect_clip.errors import TrainingError
from dissect_clip.run.epoch_parquet import EpochFile

SCHEMA = pa.schema([("row", pa.int64()), ("shard", pa.dictionary(pa.int32(), pa.string()))])


class Killed(BaseException):
    """Stands for kill -9: nothing after it runs."""


def table(*rows: int) -> pa.Table:
    shards = pa.array([f"shard-{row % 3}" for row in rows], pa.string()).dictionary_encode()
    return pa.table({"row": pa.array(rows, pa.int64()), "shard": shards}, SCHEMA)


def make(folder: Path) -> EpochFile:
    return EpochFile(folder, SCHEMA, compression="zstd")


def rows(folder: Path, epoch: int = 3) -> list[int]:
    found = pq.read_table(folder / f"epoch_{epoch:05d}.parquet").to_pydict()
    assert found["shard"] == [f"shard-{row % 3}" for row in found["row"]]
    values: list[int] = found["row"]
    return values


def names(folder: Path) -> list[str]:
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*"))


def run(file: EpochFile, first: int, last: int, every: int = 2) -> None:
    """Steps ``first`` to ``last`` of an epoch, row N in step N, a cut after each ``every``."""
    for step in range(first, last + 1):
        file.write(table(step))
        if step % every == 0:
            file.cut(step)


def test_an_epoch_without_cuts_is_written_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = make(tmp_path)
    file.begin(3)
    file.write(table(1, 2))
    file.write(table(3))
    monkeypatch.setattr(EpochFile, "_copy", None)
    file.end()
    assert names(tmp_path) == ["epoch_00003.parquet"]
    assert rows(tmp_path) == [1, 2, 3]


def test_an_epoch_without_rows_has_an_empty_file(tmp_path: Path) -> None:
    file = make(tmp_path)
    file.begin(3)
    file.cut(2)
    file.end()
    assert rows(tmp_path) == []


def test_parts_become_one_file_in_order(tmp_path: Path) -> None:
    file = make(tmp_path)
    file.begin(3)
    run(file, 1, 12, every=2)
    file.write(table(13))
    assert names(tmp_path / "_epoch_00003.parts") == [f"{n:08d}.parquet" for n in (2, 4, 6, 8, 10, 12)] + ["open.tmp"]
    file.end()
    assert names(tmp_path) == ["epoch_00003.parquet"]
    assert rows(tmp_path) == list(range(1, 14))
    assert pq.ParquetFile(tmp_path / "epoch_00003.parquet").num_row_groups == 13


def test_the_last_row_may_be_in_a_part(tmp_path: Path) -> None:
    file = make(tmp_path)
    file.begin(3)
    run(file, 1, 4)
    file.end()
    assert rows(tmp_path) == [1, 2, 3, 4]


def test_two_cuts_at_one_step_keep_the_rows_of_both(tmp_path: Path) -> None:
    file = make(tmp_path)
    file.begin(3)
    for row in (1, 2, 3):
        file.write(table(row))
        file.cut(5)
    assert names(tmp_path / "_epoch_00003.parts") == ["00000005.parquet"]
    file.write(table(4))
    resumed = make(tmp_path)
    resumed.begin(3, 5)
    resumed.end()
    assert rows(tmp_path) == [1, 2, 3]


def test_an_empty_table_is_no_row(tmp_path: Path) -> None:
    file = make(tmp_path)
    file.begin(3)
    file.write(table())
    file.cut(1)
    file.write(table(1))
    file.end()
    assert rows(tmp_path) == [1]


@pytest.mark.parametrize("step", range(8))
def test_going_on_after_a_step_keeps_what_was_cut_by_then(tmp_path: Path, step: int) -> None:
    file = make(tmp_path)
    file.begin(3)
    run(file, 1, 7, every=3)
    resumed = make(tmp_path)
    resumed.begin(3, step)
    kept = step // 3 * 3
    resumed.write(table(*range(kept + 1, 9)))
    resumed.end()
    assert rows(tmp_path) == list(range(1, 9))


def test_a_cut_without_rows_is_a_mark_all_the_same(tmp_path: Path) -> None:
    file = make(tmp_path)
    file.begin(3)
    run(file, 1, 2)
    file.cut(4)
    file.write(table(5))
    file.cut(6)
    resumed = make(tmp_path)
    resumed.begin(3, 4)
    resumed.end()
    assert rows(tmp_path) == [1, 2]


def test_starting_the_epoch_again_forgets_its_parts(tmp_path: Path) -> None:
    run_to = make(tmp_path)
    run_to.begin(3)
    run(run_to, 1, 4)
    again = make(tmp_path)
    again.begin(3)
    again.write(table(7))
    again.end()
    assert rows(tmp_path) == [7]


def test_another_epoch_removes_what_one_left(tmp_path: Path) -> None:
    file = make(tmp_path)
    file.begin(3)
    run(file, 1, 3)
    (tmp_path / "epoch_00002.parquet.tmp").write_bytes(b"half")
    make(tmp_path).begin(4)
    assert names(tmp_path) == ["_epoch_00004.parts"]


def test_a_longer_runs_file_stays_until_the_epoch_is_complete(tmp_path: Path) -> None:
    longer = make(tmp_path)
    longer.begin(3)
    run(longer, 1, 5)
    longer.end()
    file = make(tmp_path)
    file.begin(3)
    run(file, 1, 2)
    assert rows(tmp_path) == [1, 2, 3, 4, 5]
    file.end()
    assert rows(tmp_path) == [1, 2]


@pytest.mark.parametrize("step", range(8))
def test_a_complete_epoch_can_be_gone_back_into(tmp_path: Path, step: int) -> None:
    """The run died after the end of the epoch, before its checkpoint: the newest one is in the middle."""
    file = make(tmp_path)
    file.begin(3)
    run(file, 1, 7, every=3)
    file.end()
    file.begin(4)
    run(file, 1, 3)
    resumed = make(tmp_path)
    resumed.begin(3, step)
    resumed.write(table(*range(step // 3 * 3 + 1, 9)))
    resumed.end()
    assert rows(tmp_path) == list(range(1, 9))
    assert names(tmp_path) == ["epoch_00003.parquet"]


def test_the_folder_reads_as_a_data_set_at_any_time(tmp_path: Path) -> None:
    file = make(tmp_path)
    for epoch in (0, 1):
        file.begin(epoch)
        run(file, 1, 3)
        if epoch == 0:
            file.end()
    assert "_epoch_00001.parts" in names(tmp_path)
    assert pq.read_table(tmp_path).num_rows == ds.dataset(tmp_path).count_rows() == 3


# ---- killed


def kill_at(monkeypatch: pytest.MonkeyPatch, moment: int) -> None:
    """Die before the ``moment``-th change of the folder from now on."""
    left = moment

    def deadly(change: Any) -> Any:
        def changed(*args: Any, **kwargs: Any) -> Any:
            nonlocal left
            left -= 1
            if left < 0:
                raise Killed
            return change(*args, **kwargs)

        return changed

    monkeypatch.setattr(os, "replace", deadly(os.replace))
    monkeypatch.setattr(os, "unlink", deadly(os.unlink))  # of rmtree: one file of several
    monkeypatch.setattr(os, "rmdir", deadly(os.rmdir))
    monkeypatch.setattr(Path, "unlink", deadly(Path.unlink))
    monkeypatch.setattr(Path, "mkdir", deadly(Path.mkdir))
    monkeypatch.setattr(EpochFile, "_open", deadly(EpochFile._open))


def life(folder: Path, step: int, saved: list[int]) -> None:
    """Go on in epoch 3 after ``step`` up to its end and into the next; ``saved`` gets each step that may be saved."""
    file = make(folder)
    file.begin(3, step)
    for done in range(step + 1, 8):
        file.write(table(done))
        if done % 3 == 0:
            file.cut(done)
            saved.append(done)
    file.end()
    file.begin(4)


@pytest.mark.parametrize("back", [0, 1])
def test_killed_at_any_change_it_goes_on_right(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, back: int) -> None:
    """Killed once at each change, going on from the newest checkpoint or the one before; then killed there again."""
    died = 0
    for first in range(100):
        folder = tmp_path / str(first)
        saved = [0]
        with monkeypatch.context() as patch:
            kill_at(patch, first)
            try:
                life(folder, 0, saved)
            except Killed:
                died += 1
            else:
                break
        for second in range(0, 40, 5):
            copy = tmp_path / "copy"
            shutil.copytree(folder, copy) if folder.exists() else copy.mkdir()
            reached = saved[: max(1, len(saved) - back)]
            with monkeypatch.context() as patch:
                kill_at(patch, second)
                try:
                    life(copy, reached[-1], reached)
                except Killed:
                    died += 1
            life(copy, reached[-1], [])
            assert rows(copy) == [1, 2, 3, 4, 5, 6, 7], f"killed at {first} and {second}"
            shutil.rmtree(copy)
    assert died > 50


# ---- disks that fail


def test_a_folder_that_cannot_be_made_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(TrainingError, match=r"epoch_00003\.parquet.*Make room"):
        make(tmp_path / "file" / "record").begin(3)


@pytest.mark.parametrize("call", ["begin", "write", "cut", "end"])
def test_keeping_going_an_epoch_has_no_file_and_the_next_is_tried(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, call: str
) -> None:
    def full(*args: object) -> None:
        raise OSError("no space left")

    file = EpochFile(tmp_path / "record", SCHEMA, keep_going=True, compression="zstd")
    names_of_calls = {"begin": "_remove_leftovers", "write": "_open", "cut": "_close", "end": "_finished"}
    if call != "begin":
        file.begin(3)
    if call in ("cut", "end"):
        file.write(table(1))
    with monkeypatch.context() as patch:
        patch.setattr(EpochFile, names_of_calls[call], full)
        calls = {"begin": lambda: file.begin(3), "write": lambda: file.write(table(1)), "cut": lambda: file.cut(1)}
        calls.get(call, file.end)()
    (message,) = [record.getMessage() for record in caplog.records]
    assert "epoch_00003.parquet: no space left" in message
    file.write(table(2))
    file.cut(2)
    file.end()
    assert names(tmp_path / "record") == []
    file.begin(4)
    file.write(table(5))
    file.end()
    assert rows(tmp_path / "record", 4) == [5]


def test_rows_that_are_in_another_folder_are_told_of(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    file = make(tmp_path)
    file.begin(3, 2)
    assert f"rows of the first 2 steps of epoch 3 are not in {tmp_path}" in caplog.text
    caplog.clear()
    file.begin(3, 2)
    file.end()
    file.begin(3, 2)
    assert caplog.text == ""


@pytest.mark.parametrize("call", ["cut", "end"])
def test_a_folder_that_was_deleted_is_named(tmp_path: Path, call: str) -> None:
    file = make(tmp_path)
    file.begin(3)
    file.write(table(1))
    shutil.rmtree(tmp_path / "_epoch_00003.parts")
    with pytest.raises(TrainingError, match=r"epoch_00003\.parquet"):
        file.cut(1) if call == "cut" else file.end()


def test_a_full_disk_is_named_and_earlier_parts_stay(tmp_path: Path) -> None:
    file = make(tmp_path)
    file.begin(3)
    run(file, 1, 2)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, limits[1]))
    try:
        with pytest.raises(TrainingError, match=r"epoch_00003\.parquet"):
            file.write(table(*range(10**5)))
        del file  # what is left of it must not fail again
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    resumed = make(tmp_path)
    resumed.begin(3, 2)
    resumed.end()
    assert rows(tmp_path) == [1, 2]
