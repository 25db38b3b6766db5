"""Options of InfoBatch."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from dissect_clip.config.fields import Range, setting
from dissect_clip.config.options import StrategyOptions
from dissect_clip.config.run_plan import RunPlan
from dissect_clip.config.settings import SelectionSettings

FULL_LAST = 0.125
"""Share of the epochs, the last ones, that train on everything by default: the paper prunes in the first 0.875."""


@dataclass(frozen=True, kw_only=True)
class InfoBatchOptions(StrategyOptions):
    """How much InfoBatch leaves out, and whether it weights the rest."""

    infobatch_prune_ratio: float | None = setting(
        None,
        "share of the samples below the mean loss that is left out; replaces --select-rate",
        within=Range(above=0, at_most=0.99),
    )
    select_rescale: str = setting(
        "on",
        "multiply the loss of each selected sample by the inverse of its probability of being selected",
        choices=("on", "off"),
    )

    def contradictions(self, run: RunPlan) -> Iterator[str]:
        if self.infobatch_prune_ratio is None:
            return
        usual = SelectionSettings()
        changed = {
            "--select-rate": run.select_rate != usual.select_rate,
            "--select-rate-schedule": run.select_rate_schedule != usual.select_rate_schedule,
        }
        for flag, is_given in changed.items():
            if is_given:
                yield f"{flag} has no meaning with --infobatch-prune-ratio, which sets the rate: leave one of them out"
