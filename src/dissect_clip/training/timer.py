"""Where the seconds of training go, by phase, without waiting for the device."""

from __future__ import annotations

import time
from typing import Any

import torch

PHASES = ("load", "score", "train", "optimizer")
"""Waiting for and moving the batch; the scoring pass, ranking and the store; forward and backward; the update."""


class PhaseClock:
    """Adds up seconds by phase. On a GPU it records events and reads them only in :meth:`totals`."""

    def __init__(self, device: torch.device) -> None:
        self.on_gpu = device.type == "cuda"
        self._seconds = dict.fromkeys(PHASES, 0.0)
        self._pending: list[tuple[str, Any, Any]] = []
        self._mark = self._now()

    def _now(self) -> Any:
        if not self.on_gpu:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
        event.record()
        return event

    def start(self) -> None:
        """Begin to count from here; what went before belongs to no phase."""
        self._mark = self._now()

    def lap(self, phase: str) -> None:
        """All since the last mark was ``phase``."""
        now = self._now()
        if self.on_gpu:
            self._pending.append((phase, self._mark, now))
        else:
            self._seconds[phase] += now - self._mark
        self._mark = now

    def totals(self) -> dict[str, float]:
        """Seconds of each phase since the clock was made. Waits for the device on a GPU: for log time only."""
        if self._pending:
            self._pending[-1][2].synchronize()
        for phase, begin, end in self._pending:
            self._seconds[phase] += begin.elapsed_time(end) / 1000
        self._pending.clear()
        return dict(self._seconds)
