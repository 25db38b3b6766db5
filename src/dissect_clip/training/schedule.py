"""The learning rate as a pure function of the optimizer step.

The formulas are those of OpenCLIP 3.3.0's schedules.
"""

from __future__ import annotations

import math
from collections.abc import Callable

from dissect_clip.config.settings import Config

Schedule = Callable[[int], float]


def learning_rate(config: Config, base: float, steps_per_epoch: int) -> Schedule:
    """optimizer step (0-based) -> learning rate.

    All schedules rise linearly over ``--warmup`` steps. Then cosine falls to 0 at the last step, const stays, and
    const-cooldown stays until ``--epochs-cooldown`` before the end, then falls polynomially to ``--lr-cooldown-end``.
    """
    total = steps_per_epoch * config.training.epochs
    cooldown_start = total - steps_per_epoch * (config.training.epochs_cooldown or 0)

    def at(step: int) -> float:
        if step < config.training.warmup:
            return base * (step + 1) / config.training.warmup
        if config.training.lr_scheduler == "cosine":
            done = (step - config.training.warmup) / max(1, total - config.training.warmup)
            return 0.5 * (1 + math.cos(math.pi * done)) * base
        if config.training.lr_scheduler == "const-cooldown" and step >= cooldown_start:
            left = 1 - (step - cooldown_start) / (total - cooldown_start)
            return config.training.lr_cooldown_end + float(left**config.training.lr_cooldown_power) * (
                base - config.training.lr_cooldown_end
            )
        return base

    return at
