"""The learning rate as a pure function of the optimizer step, and the select rate as one of the epoch.

The learning rate's formulas are those of OpenCLIP 3.3.0's schedules.
"""

from __future__ import annotations

import math
from collections.abc import Callable

from dissect_clip.config import Config, full_epochs

Schedule = Callable[[int], float]


def learning_rate(config: Config, base: float, steps_per_epoch: int) -> Schedule:
    """optimizer step (0-based) -> learning rate.

    All schedules rise linearly over ``--warmup`` steps. Then cosine falls to 0 at the last step, const stays, and
    const-cooldown stays until ``--epochs-cooldown`` before the end, then falls polynomially to ``--lr-cooldown-end``.
    """
    total = steps_per_epoch * config.epochs
    cooldown_start = total - steps_per_epoch * (config.epochs_cooldown or 0)

    def at(step: int) -> float:
        if step < config.warmup:
            return base * (step + 1) / config.warmup
        if config.lr_scheduler == "cosine":
            done = (step - config.warmup) / max(1, total - config.warmup)
            return 0.5 * (1 + math.cos(math.pi * done)) * base
        if config.lr_scheduler == "const-cooldown" and step >= cooldown_start:
            left = 1 - (step - cooldown_start) / (total - cooldown_start)
            return config.lr_cooldown_end + float(left**config.lr_cooldown_power) * (base - config.lr_cooldown_end)
        return base

    return at


def select_rate(config: Config, epoch: int, first: int, full_last: float) -> float:
    """The share of every batch kept in an epoch (0-based), in (0, 1], by ``--select-rate-schedule``.

    From ``--select-rate-start`` in epoch ``first`` to ``--select-rate`` in the last epoch before the ``full_last`` of
    all, in a line or in half a wave of the cosine; 1 in those. Where only one epoch selects, it has the end's rate.
    """
    end = config.epochs - full_epochs(full_last, config.epochs)
    if epoch >= end:
        return 1.0 if end < config.epochs else config.select_rate
    if config.select_rate_schedule == "constant":
        return config.select_rate
    way = max(0, epoch - first) / (end - 1 - first) if end - 1 > first else 1.0
    if config.select_rate_schedule == "cosine":
        way = (1 - math.cos(math.pi * way)) / 2
    return (1 - way) * config.select_rate_start + way * config.select_rate
