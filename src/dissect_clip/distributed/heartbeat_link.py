"""The thread that carries heartbeats to rank 0, and rank 0's diagnosis to the others.

Rank 0 alone reads all heartbeats: W ranks mean W writes and W reads a second. The others read rank 0's only.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping
from datetime import timedelta

from dissect_clip.distributed.health import Heartbeat
from dissect_clip.distributed.torch_compat import Store
from dissect_clip.errors import SetupError

INTERVAL = 1.0
"""Seconds between two heartbeats."""
_SHORT_INTERVAL = 0.1
"""Seconds between two when something is about to end."""


class HeartbeatLink(threading.Thread):
    """Sends and receives once a second. A store may block it forever, so nothing may wait for it without a limit."""

    def __init__(
        self, store: Store, rank: int, size: int, heartbeat: Callable[[], Heartbeat], notify: Callable[[], None]
    ) -> None:
        """``heartbeat`` gives this rank's; ``notify`` is called after every round."""
        super().__init__(name="watch-link", daemon=True)
        self.heartbeats: Mapping[int, bytes] = {}
        """The newest of each other rank, on rank 0; elsewhere of rank 0."""
        self.diagnosis = ""
        """On rank 0: to be published. Elsewhere: as published."""
        self.broken: str | None = None
        """Why the store cannot be reached any more."""
        self.rounds = 0
        self.sent = ""
        """What the others can know by now: this rank's state, and of rank 0 the diagnosis."""
        self.ended = False
        self.interval = INTERVAL
        self._store, self._rank = store, rank
        self._heartbeat, self._notify = heartbeat, notify
        self._others = [other for other in range(size) if other != rank] if rank == 0 else [0]
        self._soon = threading.Event()

    def meet(self, timeout: float, size: int) -> None:
        """Wait until every rank has sent a heartbeat.

        Raises:
            SetupError: one has not, after ``timeout`` seconds.
        """
        self._store.set(f"beat/{self._rank}", self._heartbeat().to_json())
        try:
            if self._rank == 0:
                self._store.wait([f"beat/{rank}" for rank in range(size)], timedelta(seconds=timeout))
                self._store.set("verdict", "")
            else:
                self._store.wait(["verdict"], timedelta(seconds=timeout))
        except RuntimeError as error:
            missing = [str(rank) for rank in range(size) if not self._store.check([f"beat/{rank}"])]
            raise SetupError(
                f"ranks {', '.join(missing)} of {size} have not started after {timeout:g} s (--rank-timeout): look at "
                "their standard error"
            ) from error

    def hurry(self) -> None:
        """Send and receive now, and often from now on."""
        self.interval = _SHORT_INTERVAL
        self._soon.set()

    def run(self) -> None:
        """See :class:`threading.Thread`."""
        try:
            while not self.ended:
                self._exchange()
                self.rounds += 1
                self._notify()
                self._soon.wait(self.interval)
                self._soon.clear()
        except Exception as error:  # every kind of store raises its own errors
            self.broken = str(error).partition("\n")[0]
        self._notify()

    def _exchange(self) -> None:
        heartbeat = self._heartbeat()
        self._store.set(f"beat/{self._rank}", heartbeat.to_json())
        keys = [f"beat/{rank}" for rank in self._others]
        if self._rank == 0:
            diagnosis = self.diagnosis
            if diagnosis:
                self._store.set("verdict", diagnosis)
            self.sent = diagnosis
            self.heartbeats = dict(zip(self._others, self._store.multi_get(keys), strict=True))
        else:
            self.sent = heartbeat.state
            main, diagnosis_bytes = self._store.multi_get([*keys, "verdict"])
            self.diagnosis = diagnosis_bytes.decode()
            self.heartbeats = {0: main}
