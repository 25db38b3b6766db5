"""Options of negCLIPLoss."""

from __future__ import annotations

from dataclasses import dataclass

from dissect_clip.config.fields import COUNT, POSITIVE, setting
from dissect_clip.config.options import StrategyOptions


@dataclass(frozen=True, kw_only=True)
class NegCLIPLossOptions(StrategyOptions):
    """What the normaliser of negCLIPLoss is averaged over."""

    negcliploss_batches: int = setting(
        10, "number of random partitions of the batch that the normaliser is averaged over", within=COUNT
    )
    negcliploss_batch_size: int | None = setting(
        None, "pairs in each part of a partition (default: the number that is trained on)", within=COUNT
    )
    negcliploss_temperature: float | None = setting(
        None, "temperature of the normaliser (default: the learned temperature of the model)", within=POSITIVE
    )
