"""What a strategy may know of the run: its length, its select rate and its seed."""

from __future__ import annotations

from dataclasses import dataclass
from fractions import Fraction


def full_epochs(share: float, epochs: int) -> int:
    """How many of the last of ``epochs`` train on everything: ``share`` of them, rounded."""
    return round(Fraction(share) * epochs)  # of any size


@dataclass(frozen=True, kw_only=True, slots=True)
class RunPlan:
    """The facts about a run that strategies are constructed from. Fields are named like their flags. Picklable."""

    epochs: int
    select_rate: float  # share of every batch that is kept, in (0, 1]
    select_rate_schedule: str = "constant"  # or linear, cosine
    select_rate_start: float = 1.0  # share of every batch that the two schedules begin with
    select_full_last: float | None = None  # share of the epochs on everything; None leaves it to the strategy
    select_strategy: str = ""  # as the user wrote it, for messages
    sets_rate: bool = True  # False for a member of a combination after the first, whose rate does not count
    seed: int = 0
    siglip: bool = False  # the loss is SigLIP's, not InfoNCE
    record: bool = False  # the run writes a record of every sample

    def full_epochs(self, default: float = 0.0) -> int:
        """How many of the last epochs train on everything; ``default`` is the strategy's share of the epochs."""
        share = default if self.select_full_last is None else self.select_full_last
        return full_epochs(share, self.epochs)
