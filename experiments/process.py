"""A child process that is asked to stop when this process is."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TextIO

_POLL = 0.5  # seconds between two looks at the process


def supervise(command: Sequence[str], log: TextIO, cwd: Path | None, watch: Callable[[], None]) -> tuple[int, bool]:
    """Run a process; its exit status, and whether a signal to this process requested its end.

    The process has a separate session: Ctrl-C reaches this process only, and is passed on once. Its output goes to
    ``log``, which it holds open, and so locked, even where this process is killed.
    """
    # With other programs on the cores, threads that spin while they wait are many times slower.
    environment = {"OMP_WAIT_POLICY": "PASSIVE", **os.environ}
    asked: list[int] = []
    # Before the process starts, so that no signal is lost.
    before = {
        n: signal.signal(n, lambda n, _: asked.append(n)) for n in (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)
    }
    try:
        with subprocess.Popen(
            command, stdout=log, stderr=subprocess.STDOUT, stdin=subprocess.DEVNULL, cwd=cwd, env=environment,
            start_new_session=True,
        ) as process:  # fmt: skip
            try:
                return _wait(process, asked, watch), bool(asked)
            except BaseException:
                _kill(process)
                raise
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _wait(process: subprocess.Popen[bytes], asked: Sequence[int], watch: Callable[[], None]) -> int:
    """Wait for the end; the first signal is passed on as SIGTERM, a second Ctrl-C kills."""
    passed_on = False
    while True:
        if asked and not passed_on:
            process.terminate()
            passed_on = True
        elif asked.count(signal.SIGINT) > 1:
            _kill(process)
        with contextlib.suppress(subprocess.TimeoutExpired):
            return process.wait(_POLL)
        watch()


def _kill(process: subprocess.Popen[bytes]) -> None:
    """End a process and the others of its session."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
