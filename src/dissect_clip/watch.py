"""The ranks of a run keep an eye on each other, and agree on when to save and when to stop.

The training process only ever writes down where it is (:meth:`Watch.mark`), which costs an attribute. Everything else
happens beside it.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Literal

Phase = Literal["setup", "save", "evaluate", "load", "score", "train", "optimizer"]
"""What a rank is doing, in the order in which it happens at one number of steps done."""


@dataclass(frozen=True, slots=True)
class Orders:
    """What all ranks do now, at the same step."""

    save: bool
    """Write a checkpoint."""
    stop: str | None
    """The signal that asked for an end of the run, by name; save, then end."""


class Watch:
    """This process's part in the watch. Idle until it is started, and of use to a single process all the same."""

    def __init__(self) -> None:
        self._mark: tuple[Phase, int] = ("setup", 0)
        self._waits = False
        self._stop: str | None = None

    def mark(self, phase: Phase, step: int) -> None:
        """Note that this rank begins ``phase``, with ``step`` optimizer steps done. Not collective; costs nothing."""
        self._mark = (phase, step)

    def alive(self) -> None:
        """Note that this rank has got on with its phase, in the middle of long work. Not collective; costs nothing."""
        phase, step = self._mark
        self._mark = (phase, step)  # a new object: that it is another one is what counts

    @contextmanager
    def waiting(self) -> Iterator[None]:
        """Within the block this rank waits for others, and so is not the one that holds them up."""
        self._waits = True
        try:
            yield
        finally:
            self._waits = False

    def ask(self, signal_name: str) -> None:
        """Ask for the end of the run; the first that asks is named. Not collective; safe in a signal handler."""
        self._stop = self._stop or signal_name

    def poll(self, save_due: bool) -> Orders:
        """What all ranks are to do after this optimizer step. To be called by every rank once for each step.

        ``save_due`` counts on rank 0. Equal on all ranks; no device sync.
        """
        return Orders(save_due, self._stop)
