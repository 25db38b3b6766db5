"""Options of DISSect-Momentum."""

from __future__ import annotations

from dataclasses import dataclass

from dissect_clip.config.fields import Range, setting
from dissect_clip.config.options import StrategyOptions


@dataclass(frozen=True, kw_only=True)
class MomentumOptions(StrategyOptions):
    """How slowly the remembered score of a sample follows its current score."""

    select_momentum: float = setting(
        0.9,
        "weight of the remembered score in the moving average of a sample's scores",
        within=Range(at_least=0, at_most=1),
        ignored_by_others=True,
    )
