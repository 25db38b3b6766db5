"""The select rate as a pure function of the epoch."""

from __future__ import annotations

import math

from dissect_clip.config.run_plan import RunPlan


def select_rate(run: RunPlan, epoch: int, first: int = 0, full_last: float = 0.0) -> float:
    """The share of every batch kept in an epoch (0-based), in (0, 1], by ``--select-rate-schedule``.

    It moves from ``--select-rate-start`` in epoch ``first`` to ``--select-rate`` in the last epoch that selects,
    linearly or along half a cosine wave. The last epochs have rate 1: ``--select-full-last`` of all, by default
    ``full_last``. If only one epoch selects, it has the final rate.
    """
    end = run.epochs - run.full_epochs(full_last)
    if epoch >= end:
        return 1.0 if end < run.epochs else run.select_rate
    if run.select_rate_schedule == "constant":
        return run.select_rate
    way = max(0, epoch - first) / (end - 1 - first) if end - 1 > first else 1.0
    if run.select_rate_schedule == "cosine":
        way = (1 - math.cos(math.pi * way)) / 2
    return (1 - way) * run.select_rate_start + way * run.select_rate
