"""Copies of a run folder on remote storage, reached through ``aws s3 sync`` or any fsspec file system.

OpenCLIP's own ``file_utils`` are not used for this: their fsspec copy downloads every remote file to compare sizes,
dies for good when a file vanishes between listing and reading, and their copying process keeps a crashed run from
ending. The meaning of the flags is the same.
"""

from __future__ import annotations

import logging
import os
import posixpath
import subprocess
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import fsspec

from dissect_clip.errors import SetupError

log = logging.getLogger(__name__)

# Files that are being written, and the newest checkpoint, whose two files may change in the middle of a copy.
_LEFT_OUT = (".tmp", "epoch_latest")


def open_remote(url: str) -> tuple[Any, str]:
    """The file system of an fsspec URL and the path in it.

    Raises:
        SetupError: if the URL's protocol is unknown, or the package for it is missing.
    """
    try:
        return fsspec.core.url_to_fs(url)  # type: ignore[no-any-return]
    except (ImportError, ValueError) as error:
        raise SetupError(f"cannot open {url}: {error}") from error


def glob_remote(url: str, pattern: str) -> list[str]:
    """Paths below ``url`` that match, relative to it, sorted; none where the folder is not there.

    Raises:
        SetupError: if the remote folder cannot be listed.
    """
    system, root = open_remote(url)
    try:
        found = system.glob(f"{root.rstrip('/')}/{pattern}")
    except FileNotFoundError:
        return []
    except OSError as error:
        raise SetupError(f"cannot list {url}: {error}") from error
    return sorted(posixpath.relpath(path, root) for path in found)


def download(url: str, target: Path) -> None:
    """Copy one remote file to ``target``, which appears only when it is complete.

    Raises:
        FileNotFoundError: if there is no such file.
        SetupError: if it cannot be copied.
    """
    system, path = open_remote(url)
    partial = target.with_name(f"{target.name}.tmp")
    try:
        system.get_file(path, str(partial))
        os.replace(partial, target)
    except FileNotFoundError:
        raise
    except OSError as error:
        raise SetupError(f"cannot copy {url}: {error}") from error


def _files(folder: Path) -> Iterator[Path]:
    """The files to copy; scores come before the checkpoint that refers to them."""
    files = [path for path in folder.rglob("*") if path.is_file() and not any(x in path.name for x in _LEFT_OUT)]
    return iter(sorted(files, key=lambda path: (path.suffix == ".pt", path)))


class _FsspecCopier:
    """Copies what is new or changed since the last call, file by file, through fsspec."""

    def __init__(self, folder: Path, url: str) -> None:
        self.folder = folder
        self.system, self.root = open_remote(url)
        self.copied: dict[Path, tuple[int, int]] = {}  # size and time of change when last copied

    def __call__(self) -> None:
        for path in _files(self.folder):
            try:
                facts = path.stat()
                state = (facts.st_size, facts.st_mtime_ns)
                if self.copied.get(path) != state:
                    self._copy(path, facts.st_size)
                    self.copied[path] = state
            except FileNotFoundError:
                if path.exists():  # else it was deleted meanwhile, as old checkpoints are
                    raise

    def _copy(self, path: Path, size: int) -> None:
        target = posixpath.join(self.root, path.relative_to(self.folder).as_posix())
        # A checkpoint that an earlier process of this run has copied; other files may change and keep their size.
        is_checkpoint = path.parent.name == "checkpoints" and path.suffix in (".pt", ".safetensors")
        if path not in self.copied and is_checkpoint and self._remote_size(target) == size:
            return
        self.system.makedirs(posixpath.dirname(target), exist_ok=True)
        self.system.put_file(str(path), target)

    def _remote_size(self, target: str) -> int | None:
        try:
            return int(self.system.size(target))
        except FileNotFoundError:
            return None


def _s3_copier(folder: Path, url: str) -> Callable[[], None]:
    """A copier that runs ``aws s3 sync``, which is much faster than fsspec and takes credentials as aws does."""
    left_out = [word for part in _LEFT_OUT for word in ("--exclude", f"*{part}*")]

    def copy() -> None:
        done = subprocess.run(
            ["aws", "s3", "sync", str(folder), url, *left_out], capture_output=True, text=True, check=False
        )
        if done.returncode != 0:
            raise OSError(f"aws s3 sync ended with status {done.returncode}: {done.stderr.strip()}")

    return copy


class RemoteSync:
    """Copies a run folder to ``url`` every ``frequency`` seconds, in a thread of this process. For rank 0.

    Files that are being written and ``epoch_latest`` are left out, as in OpenCLIP. Nothing is deleted remotely.
    """

    def __init__(self, folder: Path, url: str, protocol: str, frequency: float) -> None:
        self.url = url
        self.frequency = frequency
        self._copy = _s3_copier(folder, url) if protocol == "s3" else _FsspecCopier(folder, url)
        self._ended = threading.Event()
        # A daemon thread does not keep a run that fails from ending.
        self._thread = threading.Thread(target=self._run, name="remote-sync", daemon=True)

    def start(self) -> None:
        """Copy once, then begin copying in the background.

        Raises:
            SetupError: if the first copy fails.
        """
        try:
            self._copy()
        except Exception as error:  # every file system of fsspec has errors of its own
            raise SetupError(f"--remote-sync {self.url}: the first copy failed: {error}") from error
        log.info("Copying the run folder to %s every %g s", self.url, self.frequency)
        self._thread.start()

    def _run(self) -> None:
        while not self._ended.wait(self.frequency):
            self._try()

    def _try(self) -> bool:
        try:
            self._copy()
        except Exception as error:  # a storage that is away for a while must not end the training
            log.warning("Copying the run folder to %s failed, will be tried again: %s", self.url, error)
            return False
        return True

    def finish(self) -> None:
        """End the copying in the background and copy what is left; a failure is logged as an error."""
        self._ended.set()
        self._thread.join()
        if not self._try():
            log.error("The last copy of the run folder to %s failed: copy it by hand", self.url)


class NoSync:
    """Stands for :class:`RemoteSync` where nothing is copied."""

    def start(self) -> None:
        """Do nothing."""

    def finish(self) -> None:
        """Do nothing."""
