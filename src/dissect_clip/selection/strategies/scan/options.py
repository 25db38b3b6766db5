"""Options of SCAN."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from dissect_clip.config.fields import COUNT, NOT_NEGATIVE, Range, setting
from dissect_clip.config.options import StrategyOptions
from dissect_clip.config.run_plan import RunPlan


@dataclass(frozen=True, kw_only=True)
class ScanOptions(StrategyOptions):
    """The cycles of SCAN."""

    scan_warmup: int = setting(2, "epochs that train on everything before the first cycle", within=NOT_NEGATIVE)
    scan_period: int = setting(
        3,
        "epochs of a cycle that leave samples out, with --select-rate reached in the last; one epoch on everything, "
        "which finds the candidates, precedes them",
        within=COUNT,
    )
    scan_redundant: float = setting(
        0.5,
        "share of the candidates that are taken from the smallest losses; the others come from the largest",
        within=Range(at_least=0, at_most=1),
    )

    def contradictions(self, run: RunPlan) -> Iterator[str]:
        full = run.full_epochs()
        if 0 < run.epochs <= full + self.scan_warmup + 1:
            yield (
                f"--scan-warmup {self.scan_warmup} and the epoch that finds candidates leave no epoch of --epochs "
                f"{run.epochs} for selection: make it smaller, or train longer"
            )
