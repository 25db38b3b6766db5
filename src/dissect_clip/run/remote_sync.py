"""Copies of a run folder on remote storage, reached through ``aws s3 sync`` or any fsspec file system.

OpenCLIP's own ``file_utils`` are not used for this: their fsspec copy downloads every remote file to compare sizes,
dies for good when a file vanishes between listing and reading, and their copying process keeps a crashed run from
ending. The meaning of the flags is the same.
"""

from __future__ import annotations

import glob
import logging
import os
import posixpath
import re
import subprocess
import threading
from collections.abc import Iterable, Iterator, Sequence
from datetime import datetime, timezone
from pathlib import Path
from typing import Any, Protocol

import fsspec

from dissect_clip.errors import SetupError

log = logging.getLogger(__name__)

# Files that are being written, the parts of an epoch's file, which is copied when it is complete, and the newest
# checkpoint, whose two files may change in the middle of a copy.
_LEFT_OUT = (".tmp", ".parts", "epoch_latest")
_CHECKPOINT = re.compile(r"epoch_(\d+)(?:_step_(\d+))?(?:\.pt|(?:-[0-9a-f]+)?\.scores\.safetensors)")
_CLOCK = 1.0
"""Seconds by which a storage may round down when a file was written."""
_TRIES = 3
"""Times that aws is started for one copy, where it fails because files vanish under it."""


def remote_filesystem(url: str) -> tuple[Any, str]:
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
    system, root = remote_filesystem(url)
    try:
        found = system.glob(f"{glob.escape(root.rstrip('/'))}/{pattern}")
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
    system, path = remote_filesystem(url)
    try:
        _get(system, path, target)
    except FileNotFoundError:
        raise
    except OSError as error:
        raise SetupError(f"cannot copy {url}: {error}") from error


def _get(system: Any, path: str, target: Path) -> None:
    """Copy a remote file to ``target``, which appears when it is complete and is as old as the remote one."""
    partial = target.with_name(f"{target.name}.tmp")
    system.get_file(path, str(partial))
    changed = _changed(system, path)
    if changed is not None:
        os.utime(partial, (changed, changed))
    os.replace(partial, target)


def _changed(system: Any, path: str) -> float | None:
    """When a remote file was written last, in seconds since 1970; None if the storage does not record it."""
    try:
        moment = system.modified(path)
    except NotImplementedError:
        return None
    if not isinstance(moment, datetime):
        return None
    return (moment if moment.tzinfo else moment.replace(tzinfo=timezone.utc)).timestamp()


def _files(folder: Path) -> Iterator[Path]:
    """The files to copy; scores come before the checkpoint that refers to them."""
    files = [
        path
        for path in folder.rglob("*")
        if path.is_file() and not any(x in path.relative_to(folder).as_posix() for x in _LEFT_OUT)
    ]
    return iter(sorted(files, key=lambda path: (path.suffix == ".pt", path)))


def superseded(there: Iterable[str], here: Iterable[str]) -> list[str]:
    """Of the checkpoint files in the remote folder, those of step checkpoints that a newer checkpoint has replaced.

    They are not in the local folder any more, where a newer checkpoint is that was copied, too. So a folder that is
    empty, because the run is about to fetch a checkpoint, makes none obsolete. A .pt comes before its scores, so that
    none is ever without them.
    """
    there, here = set(there), set(here)
    newest = max((_moment(name) for name in there & here if name.endswith(".pt")), default=())
    old = [name for name in there - here if "_step_" in name and () < _moment(name) < newest]
    return sorted(old, key=lambda name: (not name.endswith(".pt"), name))


def _moment(name: str) -> tuple[int, ...]:
    """(complete epochs, steps after them) of a checkpoint's file; empty for other files."""
    match = _CHECKPOINT.fullmatch(name)
    return () if match is None else (int(match[1]), int(match[2] or 0))


class _Copier(Protocol):
    """A way to a remote folder."""

    def copy(self) -> None:
        """Copy what is new or changed."""

    def checkpoints(self) -> list[str]:
        """Names of the files in the remote folder of checkpoints."""

    def delete(self, name: str) -> None:
        """Delete one of them."""

    def has(self, name: str) -> bool:
        """Whether the remote folder has this file."""

    def fetch(self, name: str) -> None:
        """Copy a file of the remote folder to the run folder."""


class _FsspecCopier:
    """Copies what is new or changed since the last call, file by file, through fsspec."""

    def __init__(self, folder: Path, url: str) -> None:
        self.folder = folder
        self.system, self.root = remote_filesystem(url)
        self.copied: dict[Path, tuple[int, int]] = {}  # size and time of change when last copied

    def copy(self) -> None:
        for path in _files(self.folder):
            try:
                facts = path.stat()
                state = (facts.st_size, facts.st_mtime_ns)
                if self.copied.get(path) != state:
                    self._copy(path, facts)
                    self.copied[path] = state
            except FileNotFoundError:
                if path.exists():  # else it was deleted meanwhile, as old checkpoints are
                    raise

    def _copy(self, path: Path, facts: os.stat_result) -> None:
        target = self._there(path.relative_to(self.folder).as_posix())
        # A checkpoint that an earlier process of this run has copied; other files may change and keep their size.
        is_checkpoint = path.parent.name == "checkpoints" and path.suffix in (".pt", ".safetensors")
        if path not in self.copied and is_checkpoint and self._is_there(target, facts):
            return
        self.system.makedirs(posixpath.dirname(target), exist_ok=True)
        self.system.put_file(str(path), target)

    def _is_there(self, target: str, facts: os.stat_result) -> bool:
        """Whether there is a file of this size that was not written before this one.

        The size alone says nothing: all checkpoints of a model have the same.
        """
        try:
            if int(self.system.size(target)) != facts.st_size:
                return False
            changed = _changed(self.system, target)
        except FileNotFoundError:
            return False
        return changed is not None and changed + _CLOCK > facts.st_mtime

    def _there(self, name: str) -> str:
        return posixpath.join(self.root, name)

    def has(self, name: str) -> bool:
        return bool(self.system.exists(self._there(name)))

    def fetch(self, name: str) -> None:
        _get(self.system, self._there(name), self.folder / name)

    def checkpoints(self) -> list[str]:
        folder = self._there("checkpoints")
        self.system.invalidate_cache(folder)
        try:
            return [posixpath.basename(path) for path in self.system.ls(folder, detail=False)]
        except FileNotFoundError:
            return []

    def delete(self, name: str) -> None:
        self.system.rm_file(self._there(f"checkpoints/{name}"))


class _S3Copier:
    """Copies with ``aws s3 sync``, which is much faster than fsspec and takes credentials as aws does."""

    def __init__(self, folder: Path, url: str) -> None:
        self.folder = folder
        self.url = url

    def copy(self) -> None:
        left_out = [word for part in _LEFT_OUT for word in ("--exclude", f"*{part}*")]
        for _ in range(_TRIES):
            before = list(_files(self.folder))
            done = _aws("sync", str(self.folder), self.url, *left_out)
            if done.returncode == 0 or all(path.exists() for path in before):
                break
        _check(done)

    def checkpoints(self) -> list[str]:
        return self._list("checkpoints/")

    def _list(self, prefix: str) -> list[str]:
        """Names of what begins with a prefix."""
        done = _aws("ls", f"{self.url}/{prefix}")
        if done.returncode == 1 and not done.stderr.strip():  # there is nothing
            return []
        _check(done)
        return [line.split()[-1] for line in done.stdout.splitlines() if line.strip()]

    def has(self, name: str) -> bool:
        return posixpath.basename(name) in self._list(name)

    def fetch(self, name: str) -> None:
        target = self.folder / name
        partial = target.with_name(f"{target.name}.tmp")
        _check(_aws("cp", f"{self.url}/{name}", str(partial)))
        os.replace(partial, target)

    def delete(self, name: str) -> None:
        _check(_aws("rm", f"{self.url}/checkpoints/{name}"))


def _aws(*words: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(["aws", "s3", *words], capture_output=True, text=True, errors="replace", check=False)


def _check(done: subprocess.CompletedProcess[str]) -> None:
    if done.returncode != 0:
        command = " ".join(done.args[:3])
        raise OSError(f"{command} ended with status {done.returncode}: {done.stderr.strip()}")


def _make_copier(folder: Path, url: str, protocol: str) -> _Copier:
    return _S3Copier(folder, url) if protocol == "s3" else _FsspecCopier(folder, url)


def fetch_logs(folder: Path, url: str, protocol: str, names: Sequence[str], goes_on: bool) -> bool:
    """Bring what a run has logged on another machine into its folder, which has no log yet; whether there was any.

    Else the first copy of the new, empty folder would take the place of what is there.

    Args:
        names: files of the folder; the run has logged something if the first exists.
        goes_on: whether this run continues the one in the remote folder.

    Raises:
        SetupError: if there is such a run and this one does not continue it, or it cannot be fetched.
    """
    try:
        copier = _make_copier(folder, url, protocol)
        if not copier.has(names[0]):
            return False
        if goes_on:
            for name in names:
                if copier.has(name):
                    copier.fetch(name)
    except SetupError:
        raise
    except Exception as error:  # every fsspec file system raises its own errors
        raise SetupError(f"--remote-sync {url}: cannot fetch what the run has logged there: {error}") from error
    if not goes_on:
        raise SetupError(
            f"the run folder {url} exists already: give another --name, or --resume latest to continue that run"
        )
    return True


class RemoteSync:
    """Copies a run folder to ``url`` every ``frequency`` seconds, in a thread of this process. For rank 0.

    Files that are being written and ``epoch_latest`` are left out, as in OpenCLIP. Step checkpoints that a newer
    checkpoint has replaced are deleted remotely, too; nothing else is.
    """

    def __init__(self, folder: Path, url: str, protocol: str, frequency: float) -> None:
        self.url = url
        self.frequency = frequency
        self.folder = folder
        self._copier = _make_copier(folder, url, protocol)
        self._failure: str | None = None
        self._ended = threading.Event()
        # A daemon thread does not keep a run that fails from ending.
        self._thread = threading.Thread(target=self._run, name="remote-sync", daemon=True)

    @property
    def failed(self) -> str | None:
        """What was wrong with the last copy, for the training process; None if it succeeded."""
        return self._failure

    def start(self) -> None:
        """Copy once, then begin copying in the background.

        Raises:
            SetupError: if the first copy fails.
        """
        try:
            self._copier.copy()
        except Exception as error:  # every fsspec file system raises its own errors
            raise SetupError(f"--remote-sync {self.url}: the first copy failed: {error}") from error
        log.info("Copying the run folder to %s every %g s", self.url, self.frequency)
        self._thread.start()

    def _run(self) -> None:
        while not self._ended.wait(self.frequency):
            self._try()

    def _try(self) -> None:
        try:
            self._copier.copy()
        except Exception as error:  # a storage that is away for a while need not end the training
            self._failure = f"copying the run folder to {self.url} failed: {error}"
            log.error("%s. It will be tried again", self._failure)
            return
        self._failure = None
        self._tidy()

    def _tidy(self) -> None:
        """Delete remote step checkpoints that are obsolete after a good copy."""
        here = [path.name for path in (self.folder / "checkpoints").glob("*")]
        try:
            for name in superseded(self._copier.checkpoints(), here):
                self._copier.delete(name)
        except Exception as error:
            log.warning("Deleting old step checkpoints from %s failed, will be tried again: %s", self.url, error)

    def finish(self) -> bool:
        """End the copying in the background and copy what is left; whether that was good. A failure is logged."""
        self._ended.set()
        self._thread.join()
        self._try()
        if self._failure is not None:
            log.error("The last copy of the run folder to %s failed: copy it by hand", self.url)
        return self._failure is None


class NoSync:
    """Stands for :class:`RemoteSync` where nothing is copied."""

    failed = None

    def start(self) -> None:
        """Do nothing."""

    def finish(self) -> bool:
        """Do nothing; that was good."""
        return True
