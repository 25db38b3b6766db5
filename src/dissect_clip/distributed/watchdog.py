"""The ranks of a run keep an eye on each other, and agree on when to save and when to stop.

The training itself only writes down where it is (:meth:`Watchdog.begin_phase`), which costs an attribute. Beside it run
two threads. One, the link, carries heartbeats to rank 0 and rank 0's diagnosis to the others, once a second through the
store of the process group. The other examines what the link has received, and ends the process when the run
cannot go on; it has to be another one because a store whose host is frozen blocks the link for ever.

Rank 0 alone reads all beats: W ranks mean W writes and W reads a second. The others read rank 0's only.
"""

from __future__ import annotations

import contextlib
import dataclasses
import faulthandler
import json
import logging
import math
import multiprocessing
import os
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import Literal, NoReturn

from dissect_clip.distributed.health import (
    SILENCE_AFTER_LOSS,
    Heartbeat,
    Phase,
    RunFailure,
    State,
    find_dead,
    find_failed,
    find_stalled,
    silence_limit,
)
from dissect_clip.distributed.torch_compat import Store
from dissect_clip.errors import SetupError

INTERVAL = 1.0
"""Seconds between two beats, and about between two looks at whether to save or stop."""

_HASTE = 0.1  # seconds between two beats when something is about to end
_TOGETHER = 1.5  # seconds in which ranks that fail of the same cause do so
_LAST_WORDS = 10.0  # seconds in which a verdict must have come, and been told
_LAST_WORK = 10.0  # seconds for what a rank is about to finish; torchrun kills ranks 30 s after the first has died
_MAX_GAP = 100  # steps between two looks at whether to save or stop
_KEPT_ORDERS = 1000
_CLOSED = "closed"

# Into the log file only: what is said there is printed, too, and the console shows no other library's information.
_file_log = logging.getLogger("watch")


@dataclass(frozen=True, slots=True)
class StepDecision:
    """What all ranks do now, at the same step."""

    save: bool
    """Write a checkpoint."""
    stop: str | None
    """The signal that asked for an end of the run, by name; save, then end."""


class _Link(threading.Thread):
    """Carries beats and the verdict. A store may block it for ever, so nothing may wait for it without a limit."""

    def __init__(
        self, store: Store, rank: int, size: int, say: Callable[[], Heartbeat], heard: Callable[[], None]
    ) -> None:
        super().__init__(name="watch-link", daemon=True)
        self.beats: Mapping[int, bytes] = {}
        """The newest of each other rank, on rank 0; elsewhere of rank 0."""
        self.verdict = ""
        """On rank 0: to be published. Elsewhere: as published."""
        self.broken: str | None = None
        """Why the store cannot be reached any more."""
        self.rounds = 0
        self.told = ""
        """What the others can know by now: this rank's state, and of rank 0 the verdict."""
        self.ended = False
        self.interval = INTERVAL
        self._store, self._rank = store, rank
        self._say, self._heard = say, heard
        self._others = [other for other in range(size) if other != rank] if rank == 0 else [0]
        self._soon = threading.Event()

    def meet(self, timeout: float, size: int) -> None:
        """Wait until every rank is here.

        Raises:
            SetupError: one is not, after ``timeout`` seconds.
        """
        self._store.set(f"beat/{self._rank}", self._say().to_json())
        everyone = range(size)
        try:
            if self._rank == 0:
                self._store.wait([f"beat/{rank}" for rank in everyone], timedelta(seconds=timeout))
                self._store.set("verdict", "")
            else:
                self._store.wait(["verdict"], timedelta(seconds=timeout))
        except RuntimeError as error:
            missing = [str(rank) for rank in everyone if not self._store.check([f"beat/{rank}"])]
            raise SetupError(
                f"ranks {', '.join(missing)} of {size} have not started after {timeout:g} s (--rank-timeout): look at "
                "their standard error"
            ) from error

    def hurry(self) -> None:
        """Say and hear at once, and often from now on."""
        self.interval = _HASTE
        self._soon.set()

    def run(self) -> None:
        """See :class:`threading.Thread`."""
        try:
            while not self.ended:
                self._round()
                self.rounds += 1
                self._heard()
                self._soon.wait(self.interval)
                self._soon.clear()
        except Exception as error:  # every kind of store has errors of its own
            self.broken = str(error).partition("\n")[0]
        self._heard()

    def _round(self) -> None:
        beat = self._say()
        self._store.set(f"beat/{self._rank}", beat.to_json())
        keys = [f"beat/{rank}" for rank in self._others]
        if self._rank == 0:
            verdict = self.verdict
            if verdict:
                self._store.set("verdict", verdict)
            self.told = verdict
            self.beats = dict(zip(self._others, self._store.multi_get(keys), strict=True))
        else:
            self.told = beat.state
            main, told = self._store.multi_get([*keys, "verdict"])
            self.verdict = told.decode()
            self.beats = {0: main}


class _Agreement:
    """Rank 0's orders, followed by all ranks at the same poll.

    Rank 0 writes an order at one poll, and all follow it at the next, so that nobody waits for it. It also says after
    how many polls the next order comes, about a second later.
    """

    def __init__(self, store: Store, rank: int) -> None:
        self._store, self._rank = store, rank
        self._due = False
        self._polls = 0
        self._orders = 0  # that were written
        self._next = 0  # the poll at which the next is written
        self._waiting = False  # an order was written and not yet followed
        self._written: tuple[bool, str | None, int] = (False, None, 1)
        self._time = time.monotonic()

    def poll(self, save_due: bool, stop: str | None) -> StepDecision:
        """See :meth:`Watchdog.poll`; ``stop`` counts on rank 0."""
        orders = self._follow() if self._waiting else StepDecision(False, None)
        self._due = (self._due or save_due) and not orders.save
        if self._polls == self._next:
            self._write(stop)
        self._polls += 1
        return orders

    def _write(self, stop: str | None) -> None:
        if self._rank == 0:
            now = time.monotonic()
            # The last order's gap is the number of polls since then.
            gap = round(self._written[2] * INTERVAL / max(now - self._time, 1e-6))
            self._written, self._time = (self._due, stop, min(max(gap, 1), _MAX_GAP)), now
            self._store.set(f"order/{self._orders}", json.dumps(self._written))
            if self._orders >= _KEPT_ORDERS:
                self._store.delete_key(f"order/{self._orders - _KEPT_ORDERS}")
        self._waiting = True

    def _follow(self) -> StepDecision:
        save, stop, gap = self._written if self._rank == 0 else json.loads(self._store.get(f"order/{self._orders}"))
        self._orders += 1
        self._waiting = False
        self._next += gap
        return StepDecision(save, stop)


class Watchdog:
    """This process's part in the watch. Idle until it is started, and of use to a single process all the same.

    Args:
        timeout: seconds without progress of any rank after which the run is ended.
    """

    def __init__(self, rank: int = 0, size: int = 1, timeout: float = math.inf) -> None:
        self.before_exit: Callable[[float], object] = lambda seconds: None
        """Waits up to so many seconds for what must not be cut off; called before the process is ended."""
        self._rank, self._size, self._timeout = rank, size, timeout
        self._leaving = False
        self._mark: tuple[Phase, int] = ("setup", 0)
        self._waits = self._patient = False
        self._stop: str | None = None
        self._state: tuple[State, str, int] = ("runs", "", 0)
        self._idle = 0.0
        self._link: _Link | None = None
        self._agreement: _Agreement | None = None
        self._thread: threading.Thread | None = None

    # ---- for the training

    def begin_phase(self, phase: Phase, step: int) -> None:
        """Note that this rank begins ``phase``, with ``step`` optimizer steps done. Not collective; costs nothing."""
        self._mark = (phase, step)

    def report_progress(self) -> None:
        """Note that this rank has got on with its phase, in the middle of long work. Not collective; costs nothing."""
        phase, step = self._mark
        self._mark = (phase, step)  # a new object: that it is another one is what counts

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
        """Within the block this rank may take its time: what it does, as copying to remote storage, has limits itself.

        That it gives signs of life is watched all the same.
        """
        self._patient = True
        try:
            yield
        finally:
            self._patient = False

    def request_stop(self, signal_name: str) -> None:
        """Ask for the end of the run; the first that asks is named. Not collective; safe in a signal handler."""
        self._stop = self._stop or signal_name

    def poll(self, save_due: bool) -> StepDecision:
        """What all ranks are to do after this optimizer step. To be called by every rank once for each step.

        ``save_due`` counts on rank 0; a stop that any rank asked for counts. Equal on all ranks, which is why orders
        come a second or so late in a run of several processes. No device sync.
        """
        if self._agreement is None:
            return StepDecision(save_due, self._stop)
        with self.wait_for_ranks():
            return self._agreement.poll(save_due, self._stop)

    # ---- beginning and end

    def start(self, beats: Store | None = None, orders: Store | None = None) -> None:
        """Begin to watch. Collective where there are several ranks, which then give two connections to one store.

        Raises:
            SetupError: a rank has not started within the timeout.
        """
        self._number = self._rounds = 0
        if beats is not None and orders is not None:
            self._link = _Link(beats, self._rank, self._size, self._beat, self._nudge)
            self._link.meet(self._timeout, self._size)
            self._agreement = _Agreement(orders, self._rank)
        self._ears, self._nudger = socket.socketpair()
        self._ears.settimeout(INTERVAL)
        self._nudger.setblocking(False)
        self._seen = self._mark
        self._heard: dict[int, bytes] = {}
        self._beats: dict[int, Heartbeat] = {}
        self._silent: dict[int, float] = {}
        self._unanswered = self._failing = self._closing = 0.0
        if self._link is not None:
            self._link.start()
        self._thread = threading.Thread(target=self._run, name="watch", daemon=True)
        self._thread.start()

    @property
    def wake_fd(self) -> int:
        """For :func:`signal.set_wakeup_fd`: Python runs no handler while a collective blocks the main thread.

        -1, which is none, where the watch was not started.
        """
        return -1 if self._thread is None else self._nudger.fileno()

    def close(self) -> None:
        """All is done. Collective: returns when every rank is here, so that none is killed for one that ends first."""
        if self._thread is None:
            return
        self._state = ("done", "", 0)
        if self._link is not None:
            self._link.hurry()
        self._nudge()
        self._thread.join()
        self._ears.close()
        self._nudger.close()
        self._thread = None

    def report_lost_peers(self, error: BaseException) -> None:
        """A collective of this rank failed. Ends the process if it can be told why; returns after a while if not."""
        self._end_with("lost", str(error), 0)

    def abort(self, words: str, status: int) -> None:
        """This rank cannot go on: say so, tell the others, and end the process with ``status``.

        Returns in a single process.
        """
        if self._link is not None:
            self._end_with("failed", words, status)
        self._say(words)  # of several, rank 0 has not said it
        if self._link is not None:
            self._leave(status)

    def _end_with(self, state: Literal["lost", "failed"], words: str, status: int) -> None:
        if self._link is not None and self._thread is not None:
            self._state = (state, words[:4000], status)
            self._link.hurry()
            self._nudge()
            self._thread.join(_LAST_WORDS)
            if self._leaving:
                self._thread.join(_LAST_WORK)

    # ---- the thread that watches

    def _beat(self) -> Heartbeat:
        self._number += 1
        phase, step = self._mark
        state, words, status = self._state
        return Heartbeat(
            self._number, phase, step, self._idle, self._waits, socket.gethostname(), os.getpid(), state, words, status,
            self._stop,
        )  # fmt: skip

    def _nudge(self) -> None:
        with contextlib.suppress(OSError):  # full: it is awake already; closed: it is needed no more
            self._nudger.send(b"\0")

    def _sleep(self) -> bytes:
        """Until something is heard or a second has passed; returns the numbers of signals, and zeros."""
        try:
            return self._ears.recv(4096)
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
            got_on = self._patient or self._mark is not self._seen
            self._idle = 0.0 if got_on else self._idle + passed
            self._seen = self._mark
            if self._link is None:
                verdict = find_stalled({0: self._beat()}, self._timeout)
            else:
                self._hear(self._link, passed)
                verdict = self._judge(self._link, passed) if self._rank == 0 else self._obey(self._link)
            if verdict is not None:
                self._end(verdict)
            if self._is_over(passed):
                return

    def _hear(self, link: _Link, passed: float) -> None:
        for rank, raw in link.beats.items():
            if raw != self._heard.get(rank):
                self._heard[rank] = raw
                self._beats[rank] = Heartbeat.from_json(raw)
                self._silent[rank] = 0.0
            else:
                self._silent[rank] += passed
        self._unanswered = 0.0 if link.rounds != self._rounds else self._unanswered + passed
        self._rounds = link.rounds
        self._beats[self._rank] = self._beat()
        self._silent[self._rank] = 0.0

    def _judge(self, link: _Link, passed: float) -> RunFailure | None:
        """On rank 0."""
        for beat in self._beats.values():
            if beat.stop is not None:
                self.request_stop(beat.stop)
        limit = silence_limit(self._beats, self._timeout)
        if link.broken is not None or self._unanswered > limit:
            reason = link.broken or f"it has not answered for {self._unanswered:.0f} s"
            return RunFailure(f"the store that the ranks met at, held by torchrun, is gone: {reason}", 1, (), "died")
        failed = find_failed(self._beats, self._size)
        if failed is not None:
            link.hurry()
            self._failing += passed
            return failed if len(failed.ranks) == self._size or self._failing > _TOGETHER else None
        return find_dead(self._beats, self._silent, self._timeout) or find_stalled(self._beats, self._timeout)

    def _obey(self, link: _Link) -> RunFailure | None:
        """On the other ranks."""
        if link.verdict and link.verdict != _CLOSED:
            return RunFailure.from_json(link.verdict)
        if link.broken is None:
            return find_dead(self._beats, self._silent, self._timeout)
        verdict = find_dead(self._beats, self._silent, SILENCE_AFTER_LOSS)
        if verdict is None:
            return None
        gone = f"The store that the ranks met at is gone ({link.broken}), held by rank 0 or torchrun"
        return dataclasses.replace(verdict, message=f"{verdict.message}. {gone}")

    def _is_over(self, passed: float) -> bool:
        """Whether this rank is done, and may go: all are done, and on rank 0, all know."""
        link = self._link
        if self._state[0] not in ("done", "gone"):
            return False
        if link is None or link.broken is not None:
            return True
        if self._rank != 0:
            if link.verdict == _CLOSED:
                self._state = ("gone", "", 0)
            link.ended = link.told == "gone"
        elif len(self._beats) == self._size and all(beat.state in ("done", "gone") for beat in self._beats.values()):
            link.verdict = _CLOSED
            self._closing += passed
            waits = any(beat.state != "gone" for rank, beat in self._beats.items() if rank != 0)
            link.ended = not waits or self._closing > _LAST_WORDS
        return link.ended

    # ---- the end of a run that cannot go on

    def _say(self, message: str) -> None:
        prefix = "error" if self._rank == 0 else f"error on rank {self._rank}"
        print(f"{prefix}: {message}", file=sys.stderr, flush=True)
        _file_log.info("%s: %s", prefix, message)

    def _end(self, verdict: RunFailure) -> NoReturn:
        """Rank 0 speaks for all; where it cannot, every rank for itself."""
        limit = threading.Timer(_LAST_WORDS + _LAST_WORK, os._exit, [verdict.status])
        limit.daemon = True
        limit.start()  # whatever blocks below
        link = self._link
        told = link is not None and self._rank != 0 and link.verdict != ""
        if not told:
            self._say(verdict.message)
        if verdict.how == "stalled" and self._rank in verdict.ranks:
            faulthandler.dump_traceback()
        if link is not None and link.broken is None and (told or self._rank == 0):
            self._tell(link, verdict)
        self._leave(verdict.status)

    def _tell(self, link: _Link, verdict: RunFailure) -> None:
        """Rank 0 stays until the others know, since the store may be in its process; the others say that they do."""
        self._state = ("gone", "", 0)
        if self._rank == 0:
            link.verdict = verdict.to_json()
        link.hurry()
        deadline = time.monotonic() + _LAST_WORDS / 2
        while time.monotonic() < deadline and link.broken is None and not self._is_told(link, verdict):
            self._sleep()

    def _is_told(self, link: _Link, verdict: RunFailure) -> bool:
        if self._rank != 0:
            return link.told == "gone"
        here = set(link.beats) - (set(verdict.ranks) if verdict.how == "died" else set())
        return link.told == link.verdict and all(Heartbeat.from_json(link.beats[rank]).state == "gone" for rank in here)

    def _leave(self, status: int) -> NoReturn:
        """Now: a normal exit would wait for loader processes, and a group of processes for its dead."""
        self._leaving = True
        for child in multiprocessing.active_children():
            child.kill()
        with contextlib.suppress(Exception):  # whatever it is, the run ends
            self.before_exit(_LAST_WORK)
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)
