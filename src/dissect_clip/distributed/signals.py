"""Signals that ask a run to end: noted at once, followed after the current step."""

from __future__ import annotations

import os
import signal
import sys
import threading
import time
from types import FrameType, TracebackType
from typing import Any

from dissect_clip.distributed.watchdog import Watchdog

STOPPING = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)
"""Handled while training. Schedulers send the first two, the third is Ctrl-C."""

_SAME_KEY = 2.0
"""Seconds within which two SIGINT are one: torchrun passes on what the terminal has sent to its processes as well."""


class Signals:
    """While it is open, the first of these signals asks for a stop after the current step; a context manager.

    A second SIGINT raises KeyboardInterrupt at once. For the main thread; handlers are put back at the end.
    """

    def __init__(self, watchdog: Watchdog, is_main: bool) -> None:
        self._watchdog = watchdog
        self._is_main = is_main
        self._interrupted: float | None = None
        self._before: dict[signal.Signals, Any] = {}
        self._fd_before = -1

    def __enter__(self) -> Signals:
        self._before = {number: signal.signal(number, self._handle) for number in STOPPING}
        self._fd_before = signal.set_wakeup_fd(self._watchdog.wake_fd, warn_on_full_buffer=False)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        signal.set_wakeup_fd(self._fd_before)
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _handle(self, number: int, frame: FrameType | None) -> None:
        self._watchdog.request_stop(signal.Signals(number).name)
        if number == signal.SIGINT:
            now = time.monotonic()
            if self._interrupted is None:
                self._interrupted = now
                if self._is_main:
                    # Not print: it may be what was interrupted, and cannot be entered twice.
                    os.write(2, b"\nsaving and stopping after this step; press Ctrl-C again to stop at once\n")
            elif now - self._interrupted > _SAME_KEY:
                raise KeyboardInterrupt


def leave_to_the_parent(worker: int) -> None:
    """For a loader worker, as ``worker_init_fn``: it continues, and the training process decides when to end.

    Schedulers send a signal to all processes of a job. A worker that died of it would end the run before it is saved.
    Of SIGTERM only the parent's counts, which ends its workers that way.
    """
    signal.set_wakeup_fd(-1)  # the training process's
    for number in (signal.SIGUSR1, signal.SIGINT):
        signal.signal(number, _ignore)
    if sys.platform == "linux":  # elsewhere the sender of a signal is unknown
        signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGTERM])
        threading.Thread(target=_end_with, args=(os.getppid(),), name="sigterm", daemon=True).start()


def _ignore(number: int, frame: FrameType | None) -> None:
    # A handler, not SIG_IGN: programs that a worker starts would inherit that.
    pass


def _end_with(parent: int) -> None:
    while signal.sigwaitinfo([signal.SIGTERM]).si_pid != parent:
        pass
    os._exit(0)  # as torch's own handler: with another status the loader would report an error
