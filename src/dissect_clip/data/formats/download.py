"""Remote shards: the commands that fetch them, and an end to waiting for one that stalls."""

from __future__ import annotations

import io
import os
import select
import signal
import subprocess

from webdataset.gopen import Pipe, gopen
from webdataset.utils import enforce_security

from dissect_clip.config.settings import DataSettings

_BUFFER = 1 << 20
_GRACE = 5.0
"""Seconds that a command whose output is no longer read has to end by itself."""


def _start(url: str) -> Pipe:
    """The command that writes what is at the URL, as webdataset has it."""
    if url.startswith("pipe:") and not enforce_security:
        # As webdataset does, but in a separate session, so that all processes of a shell command can be ended.
        return Pipe(url[5:], mode="rb", shell=True, ignore_status=[141], bufsize=0, start_new_session=True)
    try:
        return gopen(url, "rb", bufsize=0)
    except ValueError as error:
        raise OSError(f"{error}; give a command that writes the file, as pipe:aws s3 cp s3://... -") from error


def _end(process: subprocess.Popen[bytes]) -> None:
    if os.getpgid(process.pid) == process.pid:
        os.killpg(process.pid, signal.SIGKILL)
    else:
        process.kill()
    process.wait()


class _Download(io.RawIOBase):
    """What a command writes."""

    def __init__(self, pipe: Pipe, timeout: float) -> None:
        self._pipe = pipe
        self._process: subprocess.Popen[bytes] = pipe.proc
        self._timeout = timeout
        self._poll = select.poll()
        self._poll.register(self._pipe.stream, select.POLLIN)

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: memoryview) -> int:  # type: ignore[override]
        if not self._poll.poll(self._timeout * 1000):
            self._give_up()
        count = os.readv(self._pipe.stream.fileno(), [buffer])
        if count == 0:
            self._check_status()
        return count

    def _check_status(self) -> None:
        try:
            status = self._process.wait(self._timeout)
        except subprocess.TimeoutExpired:
            self._give_up()
        else:
            if status not in self._pipe.ignore_status:
                raise OSError(f"its command ended with exit {status}")

    def _give_up(self) -> None:
        _end(self._process)
        raise TimeoutError(f"nothing came for {self._timeout:g} seconds (--data-timeout)")

    def close(self) -> None:
        if not self.closed:
            super().close()
            self._pipe.stream.close()
            try:
                self._process.wait(_GRACE)
            except subprocess.TimeoutExpired:
                _end(self._process)


def open_stream(url: str, timeout: float = DataSettings.data_timeout) -> io.BufferedReader:
    """The file at a URL of any scheme but ``file``, as a stream to be closed; closing never waits long.

    Reading raises TimeoutError when nothing comes for ``timeout`` seconds, and OSError at the end of the output of a
    command that failed.

    Raises:
        OSError: the command cannot be started, or the scheme is not known.
    """
    return io.BufferedReader(_Download(_start(url), timeout), _BUFFER)
