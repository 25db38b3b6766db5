"""The select rate as a pure function of the epoch."""

from __future__ import annotations

import math

from dissect_clip.config.settings import Config, full_epochs


def select_rate(config: Config, epoch: int, first: int, full_last: float) -> float:
    """The share of every batch kept in an epoch (0-based), in (0, 1], by ``--select-rate-schedule``.

    From ``--select-rate-start`` in epoch ``first`` to ``--select-rate`` in the last epoch before the ``full_last`` of
    all, in a line or in half a wave of the cosine; 1 in those. Where only one epoch selects, it has the end's rate.
    """
    end = config.training.epochs - full_epochs(full_last, config.training.epochs)
    if epoch >= end:
        return 1.0 if end < config.training.epochs else config.selection.select_rate
    if config.selection.select_rate_schedule == "constant":
        return config.selection.select_rate
    way = max(0, epoch - first) / (end - 1 - first) if end - 1 > first else 1.0
    if config.selection.select_rate_schedule == "cosine":
        way = (1 - math.cos(math.pi * way)) / 2
    return (1 - way) * config.selection.select_rate_start + way * config.selection.select_rate
