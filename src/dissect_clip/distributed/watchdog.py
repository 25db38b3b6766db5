"""The ranks of a run watch each other, and the run ends with a reason when it cannot continue.

The training itself only writes down where it is (:meth:`Watchdog.begin_phase`), which costs an attribute. Two threads
run beside it. The link (:mod:`dissect_clip.distributed.heartbeat_link`) exchanges heartbeats and rank 0's diagnosis.
The other examines what the link has received, and ends the process when the run cannot continue. It is another thread
because a store whose host is frozen blocks the link forever.
"""

from __future__ import annotations

import contextlib
import dataclasses
import faulthandler
import logging
import math
import multiprocessing
import os
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Literal, NoReturn

from dissect_clip.distributed.agreement import RankAgreement, StepDecision
from dissect_clip.distributed.health import (
    SILENCE_AFTER_LOSS,
    Heartbeat,
    Phase,
    RankState,
    RunFailure,
    find_dead,
    find_failed,
    find_stalled,
    silence_limit,
)
from dissect_clip.distributed.heartbeat_link import INTERVAL, HeartbeatLink
from dissect_clip.distributed.torch_compat import Store

_SAME_CAUSE = 1.5  # seconds in which ranks that fail of the same cause do so
_LAST_MESSAGES = 10.0  # seconds in which a diagnosis must have come, and been sent
_LAST_WORK = 10.0  # seconds for what a rank is about to finish; torchrun kills ranks 30 s after the first has died
_CLOSED = "closed"

# Into the log file only: its messages are printed, too, and the console shows no other library's information.
_file_log = logging.getLogger("watch")


class Watchdog:
    """This process's part in the watch over the ranks. Idle until it is started; also for a single process.

    Args:
        timeout: seconds without progress of any rank after which the run is ended.
    """

    def __init__(self, rank: int = 0, size: int = 1, timeout: float = math.inf) -> None:
        self.before_exit: Callable[[float], object] = lambda seconds: None
        """Waits up to that many seconds for what must not be cut off; called before the process is ended."""
        self._rank, self._size, self._timeout = rank, size, timeout
        self._is_leaving = False
        self._mark: tuple[Phase, int] = ("setup", 0)
        self._waits = self._is_timeout_suspended = False
        self._stop: str | None = None
        self._state: tuple[RankState, str, int] = ("runs", "", 0)
        self._idle = 0.0
        self._link: HeartbeatLink | None = None
        self._agreement: RankAgreement | None = None
        self._thread: threading.Thread | None = None

    # ---- for the training

    def begin_phase(self, phase: Phase, step: int) -> None:
        """Note that this rank begins ``phase``, with ``step`` optimizer steps done. Not collective; costs nothing."""
        self._mark = (phase, step)

    def report_progress(self) -> None:
        """Note progress inside a phase, in the middle of long work. Not collective; costs nothing."""
        phase, step = self._mark
        self._mark = (phase, step)  # a new object: its identity is what counts

    @contextmanager
    def wait_for_ranks(self) -> Iterator[None]:
        """Within the block this rank waits for others, and so is not the one that holds them up."""
        self._waits = True
        try:
            yield
        finally:
            self._waits = False

    @contextmanager
    def suspend_timeout(self) -> Iterator[None]:
        """Within the block ``--rank-timeout`` does not count: the work, as a remote copy, has its own limits.

        Heartbeats are expected all the same.
        """
        self._is_timeout_suspended = True
        try:
            yield
        finally:
            self._is_timeout_suspended = False

    def request_stop(self, signal_name: str) -> None:
        """Ask for the end of the run; the first signal is the one named. Not collective; safe in a signal handler."""
        self._stop = self._stop or signal_name

    def poll(self, save_due: bool) -> StepDecision:
        """What all ranks do after this optimizer step. To be called by every rank once for each step.

        ``save_due`` counts on rank 0; a stop counts from any rank. Equal on all ranks, for which decisions come about a
        second late in a run of several processes. No device sync.
        """
        if self._agreement is None:
            return StepDecision(save_due, self._stop)
        with self.wait_for_ranks():
            return self._agreement.poll(save_due, self._stop)

    # ---- beginning and end

    def start(self, heartbeats: Store | None = None, decisions: Store | None = None) -> None:
        """Start watching. Collective for several ranks, which then give two connections to one store.

        Raises:
            SetupError: a rank has not started within the timeout.
        """
        self._number = self._rounds = 0
        if heartbeats is not None and decisions is not None:
            self._link = HeartbeatLink(heartbeats, self._rank, self._size, self._heartbeat, self._wake)
            self._link.meet(self._timeout, self._size)
            self._agreement = RankAgreement(decisions, self._rank)
        self._wake_receiver, self._wake_sender = socket.socketpair()
        self._wake_receiver.settimeout(INTERVAL)
        self._wake_sender.setblocking(False)
        self._last_mark = self._mark
        self._raw: dict[int, bytes] = {}
        self._heartbeats: dict[int, Heartbeat] = {}
        self._silence: dict[int, float] = {}
        self._store_silence = self._time_failing = self._time_closing = 0.0
        if self._link is not None:
            self._link.start()
        self._thread = threading.Thread(target=self._run, name="watch", daemon=True)
        self._thread.start()

    @property
    def wake_fd(self) -> int:
        """For :func:`signal.set_wakeup_fd`: Python runs no handler while a collective blocks the main thread.

        -1, which is none, if the watchdog was not started.
        """
        return -1 if self._thread is None else self._wake_sender.fileno()

    def close(self) -> None:
        """End the watch of a run that is done. Collective: returns when every rank has called it, so none is killed."""
        if self._thread is None:
            return
        self._state = ("done", "", 0)
        if self._link is not None:
            self._link.hurry()
        self._wake()
        self._thread.join()
        self._wake_receiver.close()
        self._wake_sender.close()
        self._thread = None

    def report_lost_peers(self, error: BaseException) -> None:
        """Report that a collective of this rank failed. Ends the process if the cause is found; else returns later."""
        self._end_with("lost", str(error), 0)

    def abort(self, message: str, status: int) -> None:
        """Print why this rank cannot continue, inform the others, and end the process with ``status``.

        Returns in a single process.
        """
        if self._link is not None:
            self._end_with("failed", message, status)
        self._print(message)  # of several ranks, rank 0 has not printed it
        if self._link is not None:
            self._leave(status)

    def _end_with(self, state: Literal["lost", "failed"], message: str, status: int) -> None:
        if self._link is not None and self._thread is not None:
            self._state = (state, message[:4000], status)
            self._link.hurry()
            self._wake()
            self._thread.join(_LAST_MESSAGES)
            if self._is_leaving:
                self._thread.join(_LAST_WORK)

    # ---- the thread that watches

    def _heartbeat(self) -> Heartbeat:
        self._number += 1
        phase, step = self._mark
        state, message, status = self._state
        return Heartbeat(
            self._number, phase, step, self._idle, self._waits, socket.gethostname(), os.getpid(), state, message,
            status, self._stop,
        )  # fmt: skip

    def _wake(self) -> None:
        with contextlib.suppress(OSError):  # full: the thread is awake already; closed: it is not needed any more
            self._wake_sender.send(b"\0")

    def _sleep(self) -> bytes:
        """Until something is received or a second has passed; returns the numbers of signals, and zeros."""
        try:
            return self._wake_receiver.recv(4096)
        except TimeoutError:
            return b""

    def _run(self) -> None:
        last = time.monotonic()
        while True:
            if signal.SIGTERM in self._sleep():
                self.request_stop(signal.SIGTERM.name)
            now = time.monotonic()
            # Time in which this process was itself stopped, as schedulers do to make room, says nothing of others.
            passed, last = min(now - last, 2 * INTERVAL), now
            has_progressed = self._is_timeout_suspended or self._mark is not self._last_mark
            self._idle = 0.0 if has_progressed else self._idle + passed
            self._last_mark = self._mark
            if self._link is None:
                failure = find_stalled({0: self._heartbeat()}, self._timeout)
            else:
                self._receive(self._link, passed)
                find = self._find_failure if self._rank == 0 else self._receive_failure
                failure = find(self._link, passed)
            if failure is not None:
                self._end(failure)
            if self._is_over(passed):
                return

    def _receive(self, link: HeartbeatLink, passed: float) -> None:
        for rank, raw in link.heartbeats.items():
            if raw != self._raw.get(rank):
                self._raw[rank] = raw
                self._heartbeats[rank] = Heartbeat.from_json(raw)
                self._silence[rank] = 0.0
            else:
                self._silence[rank] += passed
        self._store_silence = 0.0 if link.rounds != self._rounds else self._store_silence + passed
        self._rounds = link.rounds
        self._heartbeats[self._rank] = self._heartbeat()
        self._silence[self._rank] = 0.0

    def _find_failure(self, link: HeartbeatLink, passed: float) -> RunFailure | None:
        """On rank 0, from the heartbeats of all ranks."""
        for heartbeat in self._heartbeats.values():
            if heartbeat.stop is not None:
                self.request_stop(heartbeat.stop)
        limit = silence_limit(self._heartbeats, self._timeout)
        if link.broken is not None or self._store_silence > limit:
            reason = link.broken or f"it has not answered for {self._store_silence:.0f} s"
            return RunFailure(f"the store of the process group, held by torchrun, is gone: {reason}", 1, (), "died")
        failed = find_failed(self._heartbeats, self._size)
        if failed is not None:
            link.hurry()
            self._time_failing += passed
            return failed if len(failed.ranks) == self._size or self._time_failing > _SAME_CAUSE else None
        return find_dead(self._heartbeats, self._silence, self._timeout) or find_stalled(
            self._heartbeats, self._timeout
        )

    def _receive_failure(self, link: HeartbeatLink, passed: float) -> RunFailure | None:
        """On the other ranks, from rank 0, or because rank 0 is gone."""
        if link.diagnosis and link.diagnosis != _CLOSED:
            return RunFailure.from_json(link.diagnosis)
        if link.broken is None:
            return find_dead(self._heartbeats, self._silence, self._timeout)
        failure = find_dead(self._heartbeats, self._silence, SILENCE_AFTER_LOSS)
        if failure is None:
            return None
        gone = f"The store of the process group is gone ({link.broken}), held by rank 0 or torchrun"
        return dataclasses.replace(failure, message=f"{failure.message}. {gone}")

    def _is_over(self, passed: float) -> bool:
        """Whether this rank is done and may leave: all are done, and, on rank 0, all know it."""
        link = self._link
        if self._state[0] not in ("done", "gone"):
            return False
        if link is None or link.broken is not None:
            return True
        if self._rank != 0:
            if link.diagnosis == _CLOSED:
                self._state = ("gone", "", 0)
            link.ended = link.sent == "gone"
        elif len(self._heartbeats) == self._size and all(
            heartbeat.state in ("done", "gone") for heartbeat in self._heartbeats.values()
        ):
            link.diagnosis = _CLOSED
            self._time_closing += passed
            waits = any(heartbeat.state != "gone" for rank, heartbeat in self._heartbeats.items() if rank != 0)
            link.ended = not waits or self._time_closing > _LAST_MESSAGES
        return link.ended

    # ---- the end of a run that cannot continue

    def _print(self, message: str) -> None:
        prefix = "error" if self._rank == 0 else f"error on rank {self._rank}"
        print(f"{prefix}: {message}", file=sys.stderr, flush=True)
        _file_log.info("%s: %s", prefix, message)

    def _end(self, failure: RunFailure) -> NoReturn:
        """Rank 0 prints the message for all; if it cannot, every rank prints its own."""
        limit = threading.Timer(_LAST_MESSAGES + _LAST_WORK, os._exit, [failure.status])
        limit.daemon = True
        limit.start()  # whatever blocks below
        link = self._link
        is_from_main = link is not None and self._rank != 0 and link.diagnosis != ""
        if not is_from_main:
            self._print(failure.message)
        if failure.kind == "stalled" and self._rank in failure.ranks:
            faulthandler.dump_traceback()
        if link is not None and link.broken is None and (is_from_main or self._rank == 0):
            self._inform_others(link, failure)
        self._leave(failure.status)

    def _inform_others(self, link: HeartbeatLink, failure: RunFailure) -> None:
        """Rank 0 stays until the others know, since the store may be in its process; the others confirm it."""
        self._state = ("gone", "", 0)
        if self._rank == 0:
            link.diagnosis = failure.to_json()
        link.hurry()
        deadline = time.monotonic() + _LAST_MESSAGES / 2
        while time.monotonic() < deadline and link.broken is None and not self._others_know(link, failure):
            self._sleep()

    def _others_know(self, link: HeartbeatLink, failure: RunFailure) -> bool:
        if self._rank != 0:
            return link.sent == "gone"
        here = set(link.heartbeats) - (set(failure.ranks) if failure.kind == "died" else set())
        has_sent = link.sent == link.diagnosis
        return has_sent and all(Heartbeat.from_json(link.heartbeats[rank]).state == "gone" for rank in here)

    def _leave(self, status: int) -> NoReturn:
        """End the process now: a normal exit would wait for loader processes, and NCCL for dead ranks."""
        self._is_leaving = True
        for child in multiprocessing.active_children():
            child.kill()
        with contextlib.suppress(Exception):  # whatever it is, the run ends
            self.before_exit(_LAST_WORK)
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)
