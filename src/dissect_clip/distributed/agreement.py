"""What all ranks do at the same optimizer step, as rank 0 decides it: save, or stop."""

from __future__ import annotations

import json
import time
from dataclasses import dataclass

from dissect_clip.distributed.torch_compat import Store

INTERVAL = 1.0
"""Seconds between two decisions, about."""

_MAX_GAP = 100  # steps between two decisions
_STORED_DECISIONS = 1000


@dataclass(frozen=True, slots=True)
class StepDecision:
    """What all ranks do now, at the same step."""

    save: bool
    """Write a checkpoint."""
    stop: str | None
    """The signal that asked for the end of the run, by name; save, then end."""


class RankAgreement:
    """Rank 0's decisions, followed by all ranks at the same poll.

    Rank 0 writes a decision at one poll, and all ranks follow it at the next, so that none waits for it. A decision
    also says after how many polls the next one comes, about a second later.
    """

    def __init__(self, store: Store, rank: int) -> None:
        self._store, self._rank = store, rank
        self._save_due = False
        self._polls = 0
        self._decisions = 0  # that were followed
        self._next_poll = 0  # at which the next decision is written
        self._is_pending = False  # a decision was written and not yet followed
        self._last: tuple[bool, str | None, int] = (False, None, 1)
        self._time = time.monotonic()

    def poll(self, save_due: bool, stop: str | None) -> StepDecision:
        """See :meth:`Watchdog.poll`; both arguments count on rank 0."""
        decision = self._follow() if self._is_pending else StepDecision(False, None)
        self._save_due = (self._save_due or save_due) and not decision.save
        if self._polls == self._next_poll:
            if self._rank == 0:
                self._write(stop)
            self._is_pending = True
        self._polls += 1
        return decision

    def _write(self, stop: str | None) -> None:
        now = time.monotonic()
        # The last decision's gap is the number of polls since then.
        gap = round(self._last[2] * INTERVAL / max(now - self._time, 1e-6))
        self._last, self._time = (self._save_due, stop, min(max(gap, 1), _MAX_GAP)), now
        self._store.set(f"order/{self._decisions}", json.dumps(self._last))
        if self._decisions >= _STORED_DECISIONS:
            self._store.delete_key(f"order/{self._decisions - _STORED_DECISIONS}")

    def _follow(self) -> StepDecision:
        save, stop, gap = self._last if self._rank == 0 else json.loads(self._store.get(f"order/{self._decisions}"))
        self._decisions += 1
        self._is_pending = False
        self._next_poll += gap
        return StepDecision(save, stop)
