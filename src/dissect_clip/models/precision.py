"""The precision of a run: its autocast context."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any

import torch
from open_clip_train.precision import get_autocast

Autocast = Callable[[], AbstractContextManager[Any]]


def autocast_for(precision: str, device: torch.device) -> Autocast:
    """The autocast context of ``--precision``. On a CPU ``amp`` is bf16: fp16 needs a gradient scaler, absent there."""
    if precision == "amp" and device.type == "cpu":
        precision = "amp_bf16"
    autocast: Autocast = get_autocast(precision, device_type=device.type)
    return autocast
