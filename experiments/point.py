"""Where a cell stands in a grid."""

from __future__ import annotations

import re
from dataclasses import dataclass


@dataclass(frozen=True)
class Point:
    """Where a cell stands in the grid."""

    data: str
    noise: float
    method: str
    rate: float | None  # None trains on all data
    seed: int

    def __str__(self) -> str:
        rate = "" if self.rate is None else f" at {100 * self.rate:g} %"
        noise = f" with {100 * self.noise:g} % wrong captions" if self.noise else ""
        return f"{self.method}{rate} on {self.data}{noise}, seed {self.seed}"

    @property
    def name(self) -> str:
        """Of its files."""
        noise = f"-noise{self.noise:g}" if self.noise else ""
        rate = "" if self.rate is None else f"-{self.rate:g}"
        return re.sub(r"[^\w.]+", "-", f"{self.data}{noise}-{self.method}{rate}-seed{self.seed}")
