"""Copies of the run folder: complete at the end, checkpoints after their scores, and never the end of a run."""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from dissect_clip.errors import SetupError
from dissect_clip.run.remote_sync import (
    NoSync,
    RemoteSync,
    download,
    fetch_logs,
    glob_remote,
    remote_filesystem,
    superseded,
)


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


def wait_for(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 30
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.01)


@pytest.mark.parametrize("scheme", ["", "file://"])
def test_start_and_finish_copy_everything(run: Path, tmp_path: Path, scheme: str) -> None:
    sync = make_sync(run, f"{scheme}{tmp_path}/there/run")
    sync.start()
    assert files(tmp_path / "there" / "run") == files(run)
    (run / "out.log").write_text("two\n")  # of the same size
    (run / "record").mkdir()
    (run / "record" / "epoch_00000.parquet").write_bytes(b"rows")
    assert sync.finish()
    assert files(tmp_path / "there" / "run") == files(run)


def test_it_copies_in_the_background(run: Path, tmp_path: Path) -> None:
    sync = make_sync(run, str(tmp_path / "there"), frequency=0.01)
    sync.start()
    (run / "train.jsonl").write_text("{}\n")
    wait_for((tmp_path / "there" / "train.jsonl").exists)
    sync.finish()


def test_what_is_being_written_is_left_out(run: Path, tmp_path: Path) -> None:
    for name in ("epoch_2.pt.tmp", "epoch_latest.pt", "epoch_latest-ab12.scores.safetensors"):
        (run / "checkpoints" / name).write_bytes(b"half")
    parts = run / "record" / "_epoch_00003.parts"
    parts.mkdir(parents=True)
    (parts / "00000400.parquet").write_bytes(b"rows")
    sync = make_sync(run, str(tmp_path / "there"))
    sync.start()
    sync.finish()
    assert not (tmp_path / "there" / "record").exists()
    copied = sorted(path.name for path in (tmp_path / "there" / "checkpoints").iterdir())
    assert copied == ["epoch_1.pt", "epoch_1.scores.safetensors"]


def test_what_was_copied_is_not_copied_again(run: Path, tmp_path: Path) -> None:
    make_sync(run, str(tmp_path / "there")).start()
    there = tmp_path / "there" / "checkpoints" / "epoch_1.pt"
    os.utime(run / "checkpoints" / "epoch_1.pt", (1, 1))
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


def test_a_checkpoint_of_another_run_is_replaced_though_it_has_the_same_size(run: Path, tmp_path: Path) -> None:
    there = tmp_path / "there" / "checkpoints" / "epoch_1.pt"
    there.parent.mkdir(parents=True)
    there.write_bytes(b"others!")
    os.utime(there, (1, 1))
    make_sync(run, str(tmp_path / "there")).start()
    assert there.read_bytes() == b"weights"


def test_a_checkpoint_that_was_fetched_is_not_copied_back(run: Path, tmp_path: Path) -> None:
    there = tmp_path / "there" / "checkpoints" / "epoch_2.pt"
    there.parent.mkdir(parents=True)
    there.write_bytes(b"of another machine")
    os.utime(there, (1, 1))
    download(str(there), run / "checkpoints" / "epoch_2.pt")
    make_sync(run, str(tmp_path / "there")).start()
    assert there.stat().st_mtime == 1


def test_scores_arrive_before_the_checkpoint(run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    system, _ = remote_filesystem(str(tmp_path))
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


def test_a_later_copy_that_fails_is_known_until_one_is_good(
    run: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    sync = make_sync(run, str(tmp_path / "there"), frequency=0.01)
    sync.start()
    assert sync.failed is None
    (tmp_path / "there" / "file").mkdir()
    (run / "file").write_text("")
    wait_for(lambda: sync.failed is not None)
    assert f"copying the run folder to {tmp_path}/there failed" in str(sync.failed)
    assert caplog.records[-1].levelno == logging.ERROR
    (tmp_path / "there" / "file").rmdir()
    wait_for(lambda: sync.failed is None)
    assert sync.finish()
    assert (tmp_path / "there" / "file").is_file()


def test_a_last_copy_that_fails_is_told(run: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    sync = make_sync(run, str(tmp_path / "there"))
    sync.start()
    (run / "file").write_text("")
    (tmp_path / "there" / "file").mkdir()
    assert not sync.finish()
    assert "copy it by hand" in caplog.text


@pytest.mark.parametrize("when", ["before", "after"])
def test_a_file_that_vanishes_is_no_error(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, when: str
) -> None:
    system, _ = remote_filesystem(str(tmp_path))
    put = type(system).put_file

    def vanish(self: object, source: str, target: str) -> None:
        if when == "before" and source.endswith(".pt"):
            Path(source).unlink()
        put(self, source, target)
        if when == "after" and source.endswith(".pt"):
            Path(source).unlink()

    monkeypatch.setattr(type(system), "put_file", vanish)
    sync = make_sync(run, str(tmp_path / "there"))
    sync.start()
    assert sync.finish()
    assert (tmp_path / "there" / "checkpoints" / "epoch_1.pt").exists() == (when == "after")


# ---- step checkpoints


def add_step(run: Path, epoch: int, step: int) -> None:
    for suffix in (".pt", ".scores.safetensors"):
        (run / "checkpoints" / f"epoch_{epoch}_step_{step}{suffix}").write_bytes(b"state")


def remove_step(run: Path, epoch: int, step: int) -> None:
    for path in (run / "checkpoints").glob(f"epoch_{epoch}_step_{step}.*"):
        path.unlink()


def step_files(epoch: int, step: int) -> list[str]:
    return [f"epoch_{epoch}_step_{step}.pt", f"epoch_{epoch}_step_{step}.scores.safetensors"]


SPARE = "epoch_0_step_9-0a.scores.safetensors"  # as where a step was saved a second time


@pytest.mark.parametrize(
    ("there", "here", "expected"),
    [
        ([*step_files(1, 50), "epoch_1_step_100.pt"], ["epoch_1_step_100.pt"], step_files(1, 50)),
        ([*step_files(1, 50), "epoch_2.pt"], ["epoch_2.pt"], step_files(1, 50)),
        (["epoch_1_step_9.pt", "epoch_1_step_10.pt"], ["epoch_1_step_10.pt"], ["epoch_1_step_9.pt"]),
        (["epoch_1.pt", SPARE], ["epoch_1.pt"], [SPARE]),
        (["epoch_1.pt", "epoch_2.pt", "epoch_2.scores.safetensors"], ["epoch_2.pt"], []),  # of whole epochs
        (step_files(1, 50), [], []),  # about to be fetched
        (step_files(1, 50), ["epoch_1.pt"], []),  # newer than what is here
        (step_files(1, 50), ["epoch_1_step_100.pt"], []),  # which was not copied
        ([*step_files(1, 50), *step_files(1, 100)], ["epoch_1_step_100.scores.safetensors"], []),
        (["a_epoch_1_step_50.pt", "epoch_1_step_x.pt", "epoch_1_step_50.pt.bak", "epoch_2.pt"], ["epoch_2.pt"], []),
    ],
)  # fmt: skip
def test_what_a_newer_checkpoint_replaces(there: list[str], here: list[str], expected: list[str]) -> None:
    assert superseded(there, here) == expected


def test_remote_step_checkpoints_do_not_pile_up(run: Path, tmp_path: Path) -> None:
    there = tmp_path / "there" / "checkpoints"
    there.mkdir(parents=True)
    (there / "epoch_0.pt").write_bytes(b"of an earlier run")
    add_step(tmp_path / "there", 0, 50)
    sync = make_sync(run, str(tmp_path / "there"))
    sync.start()
    assert (there / "epoch_0_step_50.pt").exists()  # the first copy deletes nothing
    add_step(run, 1, 100)
    sync.finish()
    assert sorted(path.name for path in there.iterdir()) == [
        "epoch_0.pt", "epoch_1.pt", "epoch_1.scores.safetensors", *step_files(1, 100),
    ]  # fmt: skip
    remove_step(run, 1, 100)
    add_step(run, 1, 150)
    sync = make_sync(run, str(tmp_path / "there"))
    sync.start()
    sync.finish()
    assert [path.name for path in sorted(there.glob("*_step_*"))] == step_files(1, 150)


def test_a_copy_before_a_checkpoint_is_fetched_deletes_nothing(run: Path, tmp_path: Path) -> None:
    there = tmp_path / "there"
    (there / "checkpoints").mkdir(parents=True)
    add_step(there, 1, 100)
    sync = make_sync(run, str(there))
    sync.start()
    sync.finish()
    assert (there / "checkpoints" / "epoch_1_step_100.pt").exists()


def test_a_failing_deletion_is_a_warning(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    sync = make_sync(run, str(tmp_path / "there"))
    sync.start()
    add_step(tmp_path / "there", 0, 50)
    system, _ = remote_filesystem(str(tmp_path))

    def refuse(self: object, path: str) -> None:
        raise PermissionError("may not delete")

    monkeypatch.setattr(type(system), "rm_file", refuse)
    assert sync.finish()
    assert "may not delete" in caplog.text


# ---- aws


AWS = """#!/bin/sh
# Stands for the aws command line tool: s3://bucket is the folder $BUCKET.
echo "$@" >> "$BUCKET/../arguments"
there() { echo "$BUCKET${1#s3://bucket}"; }
case "$2" in
sync) target=$(there "$4"); mkdir -p "$target"; cp -r "$3/." "$target" ;;
ls) ls "$(there "$3")" 2>/dev/null | sed 's|.*/||' | sed 's/^/2025-01-01 12:00:00       1234 /' | grep . ;;
cp) cp "$(there "$3")" "$4" ;;
rm) rm "$(there "$3")" ;;
esac
"""


@pytest.fixture
def bucket(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder that stands for s3://bucket."""
    fake_aws(tmp_path, monkeypatch, AWS)
    (tmp_path / "bucket").mkdir()
    monkeypatch.setenv("BUCKET", str(tmp_path / "bucket"))
    return tmp_path / "bucket"


def fake_aws(folder: Path, monkeypatch: pytest.MonkeyPatch, script: str) -> None:
    (folder / "bin").mkdir()
    (folder / "bin" / "aws").write_text(script)
    (folder / "bin" / "aws").chmod(0o755)
    monkeypatch.setenv("PATH", str(folder / "bin"), prepend=os.pathsep)


def test_aws_copies_all_but_what_is_being_written(run: Path, bucket: Path) -> None:
    RemoteSync(run, "s3://bucket/run", "s3", 1000).start()
    assert files(bucket / "run") == files(run)
    words = (bucket.parent / "arguments").read_text().strip()
    assert words == f"s3 sync {run} s3://bucket/run --exclude *.tmp* --exclude *.parts* --exclude *epoch_latest*"


def test_step_checkpoints_do_not_pile_up_on_s3(run: Path, bucket: Path) -> None:
    sync = RemoteSync(run, "s3://bucket/run", "s3", 1000)
    add_step(run, 0, 50)
    sync.start()
    remove_step(run, 0, 50)
    add_step(run, 1, 100)
    assert sync.finish()
    assert [path.name for path in sorted((bucket / "run" / "checkpoints").glob("*_step_*"))] == step_files(1, 100)


def test_s3_without_checkpoints_has_none_to_delete(run: Path, bucket: Path, caplog: pytest.LogCaptureFixture) -> None:
    for path in (run / "checkpoints").iterdir():
        path.unlink()
    sync = RemoteSync(run, "s3://bucket/run", "s3", 1000)
    sync.start()
    assert sync.finish()
    assert "Deleting" not in caplog.text


def test_a_failing_aws_is_an_error(run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fake_aws(tmp_path, monkeypatch, "#!/bin/sh\necho no bucket >&2\nexit 2\n")
    with pytest.raises(SetupError, match="aws s3 sync ended with status 2: no bucket"):
        RemoteSync(run, "s3://bucket/run", "s3", 1000).start()


@pytest.mark.parametrize(("times", "good"), [(1, True), (5, False)])
def test_aws_is_tried_again_where_files_vanish(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, times: int, good: bool
) -> None:
    for number in range(times):
        (run / f"{number}.vanishing").write_text("")
    fake_aws(
        tmp_path,
        monkeypatch,
        '#!/bin/sh\nfor file in "$3"/*.vanishing; do rm "$file" 2> /dev/null && echo gone >&2 && exit 1; done\n:\n',
    )
    sync = RemoteSync(run, "s3://bucket/run", "s3", 1000)
    if good:
        sync.start()
    else:
        with pytest.raises(SetupError, match="gone"):
            sync.start()


def test_aws_that_is_not_installed_is_an_error(run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(SetupError, match="aws"):
        RemoteSync(run, "s3://bucket/run", "s3", 1000).start()


# ---- logs of another machine


LOGS = ("train.jsonl", "checkpoints/results.jsonl", "out.log")


def logs_there(folder: Path) -> dict[str, bytes]:
    (folder / "checkpoints").mkdir(parents=True)
    (folder / "train.jsonl").write_text("{}\n")
    (folder / "out.log").write_text("of another machine\n")
    return files(folder)


@pytest.mark.parametrize("protocol", ["s3", "fsspec"])
def test_logs_are_fetched_where_the_run_goes_on(tmp_path: Path, bucket: Path, protocol: str) -> None:
    logged, here = logs_there(bucket / "run"), tmp_path / "here"
    url = "s3://bucket/run" if protocol == "s3" else f"file://{bucket}/run"
    (here / "checkpoints").mkdir(parents=True)
    assert not fetch_logs(here, f"{url}2", protocol, LOGS, goes_on=True)
    assert files(here) == {}
    with pytest.raises(SetupError, match=f"{url} exists already: give another --name, or --resume latest"):
        fetch_logs(here, url, protocol, LOGS, goes_on=False)
    assert fetch_logs(here, url, protocol, LOGS, goes_on=True)
    assert files(here) == logged


def test_logs_that_cannot_be_fetched_are_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fake_aws(tmp_path, monkeypatch, "#!/bin/sh\necho no bucket >&2\nexit 2\n")
    with pytest.raises(SetupError, match="cannot fetch what the run has logged there: aws s3 ls ended with status 2"):
        fetch_logs(tmp_path, "s3://bucket/run", "s3", LOGS, goes_on=True)


def test_an_unknown_protocol_is_named() -> None:
    with pytest.raises(SetupError, match="nowhere://bucket"):
        remote_filesystem("nowhere://bucket")


def test_listing_a_missing_folder_is_empty(run: Path, tmp_path: Path) -> None:
    assert glob_remote(f"file://{tmp_path}/missing", "*/out.log") == []
    assert glob_remote(f"file://{tmp_path}/", "*/out.log") == ["run/out.log"]


def test_a_folder_with_the_signs_of_a_pattern_is_a_folder(tmp_path: Path) -> None:
    (tmp_path / "a[b]*").mkdir()
    (tmp_path / "a[b]*" / "epoch_1.pt").write_text("")
    assert glob_remote(f"file://{tmp_path}/a[b]*", "epoch_*") == ["epoch_1.pt"]


def test_a_download_is_whole_or_absent(run: Path, tmp_path: Path) -> None:
    download(f"file://{run}/out.log", tmp_path / "copy")
    assert (tmp_path / "copy").read_text() == "one\n"
    with pytest.raises(FileNotFoundError):
        download(f"file://{run}/missing", tmp_path / "other")
    assert not (tmp_path / "other").exists()


def test_no_sync_does_nothing() -> None:
    sync = NoSync()
    sync.start()
    assert sync.failed is None
    assert sync.finish()
