"""The per-sample record: every sample of every rank, once, as it was; strings and nulls exact."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from processes import run_on_ranks

from dissect_clip.data.batch import Batch
from dissect_clip.distributed.world import World
from dissect_clip.errors import TrainingError
from dissect_clip.selection import Candidates, Choice
from dissect_clip.training import record
from dissect_clip.training.record import NullRecorder, Recorder, decode_keys

SHARDS = ("a.tar", "b.tar")
Rows = list[dict[str, Any]]


def padded(keys: list[bytes]) -> torch.Tensor:
    """[N, W] uint8 as the loaders make it."""
    width = max(map(len, keys))
    return torch.tensor([list(key.ljust(width, b"\0")) for key in keys], dtype=torch.uint8).reshape(len(keys), width)


def locate(ids: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    """The first ten samples are in the first shard."""
    return (ids >= 10).astype(np.int32)


def make_batch(ids: list[int], keys: list[bytes] | None = None) -> Batch:
    keys = keys or [f"key{i}".encode() for i in ids]
    return Batch(
        torch.zeros(len(ids), 3, 2, 2), torch.zeros(len(ids), 4, dtype=torch.int64), torch.tensor(ids), padded(keys)
    )


def make_selection(
    index: list[int], similarity: list[float], memory: list[list[float]], loss: list[float] | None = None
) -> Choice:
    candidates = Candidates(
        epoch=0,
        generator=torch.Generator(),
        memory=torch.tensor(memory),
        similarity=torch.tensor(similarity),
        loss=None if loss is None else torch.tensor(loss),
    )
    return Choice(torch.tensor(index), candidates=candidates)


def make_recorder(
    folder: Path, world: World | None = None, columns: tuple[str, ...] = ("clip_score",), **kwargs: Any
) -> Recorder:
    return Recorder(folder, world or World(), SHARDS, locate, columns, **kwargs)


def read(path: Path) -> Rows:
    rows: Rows = pq.read_table(path).to_pylist()
    return rows


def one_step(folder: Path, batch: Batch, selection: Choice, **kwargs: Any) -> Rows:
    recorder = make_recorder(folder, **kwargs)
    recorder.begin(0)
    recorder.append(batch, selection)
    recorder.end()
    return read(folder / "epoch_00000.parquet")


@pytest.mark.parametrize(
    "key",
    ["plain", "", "ключ", "鍵/子", "😀.smile", "é" * 50, "a b\n", "\ufffd"],
)
def test_valid_keys_come_back_exactly(key: str) -> None:
    keys = [b"first", key.encode(), b"a-longer-last-one"]
    assert decode_keys(padded(keys).numpy()).to_pylist() == ["first", key, "a-longer-last-one"]


@pytest.mark.parametrize("key", [b"caf\xe9", b"\xff\xfe", "鍵".encode()[:2], b"\xed\xa0\x80"])
def test_invalid_bytes_are_replaced_and_leave_the_neighbours_alone(key: bytes) -> None:
    decoded = decode_keys(padded([key, b"next", key]).numpy())
    decoded.validate(full=True)
    assert decoded.to_pylist() == [key.decode("utf-8", "replace"), "next", key.decode("utf-8", "replace")]


def test_no_keys_are_no_strings() -> None:
    assert decode_keys(np.zeros((0, 5), np.uint8)).to_pylist() == []
    assert decode_keys(np.zeros((2, 0), np.uint8)).to_pylist() == ["", ""]


def test_a_row_holds_what_the_step_had(tmp_path: Path) -> None:
    rows = one_step(
        tmp_path,
        make_batch([3, 12], [b"x", "ü".encode()]),
        make_selection([1], [0.25, 0.5], [[7.0], [8.0]], [1.5, 2.5]),
    )
    assert rows == [
        {
            "sample_id": 3, "shard": "a.tar", "key": "x", "score": 25.0, "loss": 1.5, "remembered_clip_score": 7.0,
            "selected": False, "step": 0, "rank": 0,
        },
        {
            "sample_id": 12, "shard": "b.tar", "key": "ü", "score": 50.0, "loss": 2.5, "remembered_clip_score": 8.0,
            "selected": True, "step": 0, "rank": 0,
        },
    ]  # fmt: skip


def test_the_score_is_clamped_at_zero(tmp_path: Path) -> None:
    rows = one_step(tmp_path, make_batch([0]), make_selection([0], [-0.3], [[1.0]]))
    assert rows[0]["score"] == 0.0


def test_never_seen_and_not_computed_are_null(tmp_path: Path) -> None:
    rows = one_step(tmp_path, make_batch([0, 1]), make_selection([0], [0.1, 0.2], [[torch.nan], [4.0]]))
    assert [row["remembered_clip_score"] for row in rows] == [None, 4.0]
    assert [row["loss"] for row in rows] == [None, None]


def test_without_scores_the_choice_is_still_recorded(tmp_path: Path) -> None:
    rows = one_step(tmp_path, make_batch([0, 1]), Choice(torch.tensor([1])))
    assert [row["score"] for row in rows] == [None, None]
    assert [row["remembered_clip_score"] for row in rows] == [None, None]
    assert [row["selected"] for row in rows] == [False, True]


def test_the_columns_follow_what_is_remembered(tmp_path: Path) -> None:
    one_step(tmp_path, make_batch([0]), Choice(torch.tensor([0])), columns=("loss", "step_of"))
    assert pq.read_schema(tmp_path / "epoch_00000.parquet").names == [
        "sample_id", "shard", "key", "score", "loss", "remembered_loss", "remembered_step_of", "selected", "step",
        "rank",
    ]  # fmt: skip


def test_types_are_as_documented(tmp_path: Path) -> None:
    one_step(tmp_path, make_batch([0]), Choice(torch.tensor([0])), columns=("clip_score",))
    schema = pq.read_schema(tmp_path / "epoch_00000.parquet")
    assert schema.types == [
        pa.int64(), pa.dictionary(pa.int32(), pa.string()), pa.string(), pa.float32(), pa.float32(), pa.float32(),
        pa.bool_(), pa.int32(), pa.int16(),
    ]  # fmt: skip


def test_keys_of_different_width_and_steps_are_flushed_in_row_groups(tmp_path: Path) -> None:
    recorder = make_recorder(tmp_path, flush_every=2)
    recorder.begin(4)
    for step in range(5):
        recorder.append(make_batch([step, step + 10], [b"k" * (step + 1), b"s"]), Choice(torch.tensor([0])))
    recorder.end()
    path = tmp_path / "epoch_00004.parquet"
    assert pq.ParquetFile(path).num_row_groups == 3
    rows = read(path)
    assert [row["step"] for row in rows] == [0, 0, 1, 1, 2, 2, 3, 3, 4, 4]
    assert [row["key"] for row in rows[::2]] == ["k" * n for n in range(1, 6)]


def test_many_rows_are_flushed_before_many_steps(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(record, "MAX_ROWS", 4)
    recorder = make_recorder(tmp_path)
    recorder.begin(0)
    for step in range(4):
        recorder.append(make_batch([2 * step, 2 * step + 1]), Choice(torch.tensor([0])))
    recorder.end()
    assert pq.ParquetFile(tmp_path / "epoch_00000.parquet").num_row_groups == 2


def test_the_file_appears_only_when_complete(tmp_path: Path) -> None:
    recorder = make_recorder(tmp_path)
    recorder.begin(0)
    recorder.append(make_batch([0]), Choice(torch.tensor([0])))
    recorder.flush()
    assert not (tmp_path / "epoch_00000.parquet").exists()
    recorder.end()
    assert [path.name for path in tmp_path.iterdir()] == ["epoch_00000.parquet"]


def test_what_an_interrupted_epoch_left_is_removed(tmp_path: Path) -> None:
    (tmp_path / "epoch_00003.parquet.tmp").write_bytes(b"half")
    recorder = make_recorder(tmp_path)
    recorder.begin(4)
    recorder.end()
    assert [path.name for path in tmp_path.iterdir()] == ["epoch_00004.parquet"]
    assert read(tmp_path / "epoch_00004.parquet") == []


def test_epochs_follow_each_other(tmp_path: Path) -> None:
    recorder = make_recorder(tmp_path)
    for epoch in range(2):
        recorder.begin(epoch)
        recorder.append(make_batch([epoch]), Choice(torch.tensor([0])))
        recorder.end()
    rows = read(tmp_path / "epoch_00001.parquet")
    assert [(row["sample_id"], row["step"]) for row in rows] == [(1, 0)]


def test_a_folder_that_cannot_be_made_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(TrainingError, match=r"epoch_00000\.parquet"):
        make_recorder(tmp_path / "file" / "record").begin(0)


def test_the_memory_recorded_is_not_that_of_later_steps(tmp_path: Path) -> None:
    batch, memory = make_batch([0]), [[5.0]]
    recorder = make_recorder(tmp_path)
    recorder.begin(0)
    selection = make_selection([0], [0.1], memory)
    recorder.append(batch, selection)
    assert selection.candidates is not None
    selection.candidates.memory.fill_(9.0)
    recorder.end()
    assert read(tmp_path / "epoch_00000.parquet")[0]["remembered_clip_score"] == 5.0


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_appending_does_not_wait_for_the_device(tmp_path: Path) -> None:
    world = World(device=torch.device("cuda"))
    recorder = make_recorder(tmp_path, world)
    recorder.begin(0)
    batch = make_batch([0, 11]).to(world.device)
    candidates = Candidates(
        epoch=0,
        generator=torch.Generator(),
        memory=torch.tensor([[1.0], [2.0]], device=world.device),
        similarity=torch.tensor([0.25, 0.5], device=world.device),
    )
    selection = Choice(torch.tensor([1], device=world.device), candidates=candidates)
    torch.cuda.set_sync_debug_mode("error")
    try:
        recorder.append(batch, selection)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    recorder.end()
    rows = read(tmp_path / "epoch_00000.parquet")
    assert [(row["score"], row["selected"]) for row in rows] == [(25.0, False), (50.0, True)]


def test_null_recorder_writes_nothing(tmp_path: Path) -> None:
    recorder = NullRecorder()
    recorder.begin(0)
    recorder.append(make_batch([0]), Choice(torch.tensor([0])))
    recorder.flush()
    recorder.cut(1)
    recorder.end()
    assert list(tmp_path.iterdir()) == []


def _record_on(world: World, folder: str) -> None:
    recorder = make_recorder(Path(folder), world, flush_every=2)
    recorder.begin(0)
    for step in range(3):
        ids = [4 * step + 2 * world.rank, 4 * step + 2 * world.rank + 1]
        keys = [f"{'long-' * world.rank}{i}".encode() for i in ids]
        recorder.append(make_batch(ids, keys), make_selection([world.rank], [i / 100 for i in ids], [[torch.nan]] * 2))
    recorder.end()


def _record_in_two_runs_on(world: World, folder: str) -> None:
    """Six batches, two an optimizer step; killed after a cut at step 2 and two lost batches."""
    selection = Choice(torch.tensor([0]))
    recorder = make_recorder(Path(folder), world, accum_freq=2)
    recorder.begin(0)
    for batch in range(6):
        recorder.append(make_batch([2 * batch + world.rank]), selection)
        if batch == 3:
            recorder.cut(2)
    recorder.flush()
    resumed = make_recorder(Path(folder), world, accum_freq=2)
    resumed.begin(0, 2)
    for batch in range(4, 6):
        resumed.append(make_batch([2 * batch + world.rank]), selection)
    resumed.end()


@pytest.mark.dist
def test_an_epoch_in_two_runs_has_every_row_once_and_counts_on(tmp_path: Path) -> None:
    run_on_ranks(2, _record_in_two_runs_on, str(tmp_path))
    assert [path.name for path in tmp_path.iterdir()] == ["epoch_00000.parquet"]
    rows = sorted((row["sample_id"], row["step"], row["rank"]) for row in read(tmp_path / "epoch_00000.parquet"))
    assert rows == [(2 * batch + rank, batch, rank) for batch in range(6) for rank in range(2)]


@pytest.mark.dist
def test_all_ranks_samples_are_in_one_file(tmp_path: Path) -> None:
    run_on_ranks(2, _record_on, str(tmp_path))
    assert [path.name for path in tmp_path.iterdir()] == ["epoch_00000.parquet"]
    rows = sorted(read(tmp_path / "epoch_00000.parquet"), key=lambda row: int(row["sample_id"]))
    assert [row["sample_id"] for row in rows] == list(range(12))
    for row in rows:
        sample, rank = row["sample_id"], row["sample_id"] // 2 % 2
        assert (row["rank"], row["step"]) == (rank, sample // 4)
        assert row["key"] == f"{'long-' * rank}{sample}"
        assert row["selected"] == (sample % 2 == rank)
        assert row["score"] == pytest.approx(sample, abs=1e-5)
