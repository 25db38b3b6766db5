"""Copies of the run folder: complete at the end, checkpoints after their scores, and never the end of a run."""

from __future__ import annotations

import logging
import os
import time
from pathlib import Path

import pytest

from dissect_clip.errors import SetupError
from dissect_clip.remote import NoSync, RemoteSync, download, glob_remote, open_remote


@pytest.fixture
def run(tmp_path: Path) -> Path:
    folder = tmp_path / "run"
    (folder / "checkpoints").mkdir(parents=True)
    (folder / "out.log").write_text("one\n")
    (folder / "checkpoints" / "epoch_1.pt").write_bytes(b"weights")
    (folder / "checkpoints" / "epoch_1.scores.safetensors").write_bytes(b"scores")
    return folder


def make_sync(run: Path, url: str, frequency: float = 1000) -> RemoteSync:
    return RemoteSync(run, url, "fsspec", frequency)


def files(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.mark.parametrize("scheme", ["", "file://"])
def test_start_and_finish_copy_everything(run: Path, tmp_path: Path, scheme: str) -> None:
    sync = make_sync(run, f"{scheme}{tmp_path}/there/run")
    sync.start()
    assert files(tmp_path / "there" / "run") == files(run)
    (run / "out.log").write_text("two\n")  # of the same size
    (run / "record").mkdir()
    (run / "record" / "epoch_00000.parquet").write_bytes(b"rows")
    sync.finish()
    assert files(tmp_path / "there" / "run") == files(run)


def test_it_copies_in_the_background(run: Path, tmp_path: Path) -> None:
    sync = make_sync(run, str(tmp_path / "there"), frequency=0.01)
    sync.start()
    (run / "train.jsonl").write_text("{}\n")
    deadline = time.monotonic() + 10
    while not (tmp_path / "there" / "train.jsonl").exists() and time.monotonic() < deadline:
        time.sleep(0.01)
    assert (tmp_path / "there" / "train.jsonl").exists()
    sync.finish()


def test_what_is_being_written_is_left_out(run: Path, tmp_path: Path) -> None:
    for name in ("epoch_2.pt.tmp", "epoch_latest.pt", "epoch_latest-ab12.scores.safetensors"):
        (run / "checkpoints" / name).write_bytes(b"half")
    sync = make_sync(run, str(tmp_path / "there"))
    sync.start()
    sync.finish()
    copied = sorted(path.name for path in (tmp_path / "there" / "checkpoints").iterdir())
    assert copied == ["epoch_1.pt", "epoch_1.scores.safetensors"]


def test_what_was_copied_is_not_copied_again(run: Path, tmp_path: Path) -> None:
    make_sync(run, str(tmp_path / "there")).start()
    there = tmp_path / "there" / "checkpoints" / "epoch_1.pt"
    os.utime(there, (1, 1))
    sync = make_sync(run, str(tmp_path / "there"))  # as of a resumed run
    sync.start()
    sync.finish()
    assert there.stat().st_mtime == 1


def test_a_checkpoint_saved_again_is_copied_again(run: Path, tmp_path: Path) -> None:
    sync = make_sync(run, str(tmp_path / "there"))
    sync.start()
    path = run / "checkpoints" / "epoch_1.pt"
    path.write_bytes(b"WEIGHTS")
    os.utime(path, (2, 2))
    sync.finish()
    assert (tmp_path / "there" / "checkpoints" / "epoch_1.pt").read_bytes() == b"WEIGHTS"


def test_scores_arrive_before_the_checkpoint(run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    system, _ = open_remote(str(tmp_path))
    order: list[str] = []
    put = type(system).put_file
    monkeypatch.setattr(type(system), "put_file", lambda self, a, b: (order.append(Path(a).name), put(self, a, b)))
    make_sync(run, str(tmp_path / "there")).start()
    assert order[-1] == "epoch_1.pt"
    assert "epoch_1.scores.safetensors" in order


def test_a_first_copy_that_fails_is_an_error(run: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(SetupError, match=r"--remote-sync .*file/below.*first copy failed"):
        make_sync(run, f"{tmp_path}/file/below").start()


def test_a_later_copy_that_fails_is_logged(run: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    sync = make_sync(run, str(tmp_path / "there"))
    sync.start()
    (run / "file").write_text("")
    (tmp_path / "there" / "file").mkdir()
    sync.finish()
    assert [record.levelno for record in caplog.records][-1] == logging.ERROR


def test_a_failing_aws_is_an_error(run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    aws = tmp_path / "aws"
    aws.write_text('#!/bin/sh\necho "$@" > "$(dirname "$0")/arguments"\necho no bucket >&2\nexit 2\n')
    aws.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)
    with pytest.raises(SetupError, match="no bucket"):
        RemoteSync(run, "s3://bucket/run", "s3", 1000).start()
    arguments = (tmp_path / "arguments").read_text().strip()
    assert arguments == f"s3 sync {run} s3://bucket/run --exclude *.tmp* --exclude *epoch_latest*"


def test_aws_that_is_not_installed_is_an_error(run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(SetupError, match="aws"):
        RemoteSync(run, "s3://bucket/run", "s3", 1000).start()


def test_an_unknown_protocol_is_named() -> None:
    with pytest.raises(SetupError, match="nowhere://bucket"):
        open_remote("nowhere://bucket")


def test_listing_a_missing_folder_is_empty(run: Path, tmp_path: Path) -> None:
    assert glob_remote(f"file://{tmp_path}/missing", "*/out.log") == []
    assert glob_remote(f"file://{tmp_path}/", "*/out.log") == ["run/out.log"]


def test_a_download_is_whole_or_absent(run: Path, tmp_path: Path) -> None:
    download(f"file://{run}/out.log", tmp_path / "copy")
    assert (tmp_path / "copy").read_text() == "one\n"
    with pytest.raises(FileNotFoundError):
        download(f"file://{run}/missing", tmp_path / "other")
    assert not (tmp_path / "other").exists()


def test_no_sync_does_nothing() -> None:
    sync = NoSync()
    sync.start()
    sync.finish()
