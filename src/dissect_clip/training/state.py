"""The parts of a checkpoint that belong to training: optimizer, gradient scaler, progress and settings."""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Mapping
from typing import Any

import torch

from dissect_clip.config.settings import Config
from dissect_clip.data import TrainData
from dissect_clip.distributed.world import World
from dissect_clip.run.stateful import Stateful, malformed
from dissect_clip.training.step import Counters

log = logging.getLogger(__name__)


class OptimizerState(Stateful):
    """The optimizer's own state dict."""

    def __init__(self, optimizer: torch.optim.Optimizer) -> None:
        self.optimizer = optimizer

    def state_dict(self) -> dict[str, Any]:
        """See torch."""
        return self.optimizer.state_dict()

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take over a saved state, but not whether its kernel was fused: OpenCLIP's checkpoints say no."""
        if "fused" in self.optimizer.defaults:
            fused = self.optimizer.defaults["fused"]
            state = {**state, "param_groups": [{**group, "fused": fused} for group in state["param_groups"]]}
        self.optimizer.load_state_dict(dict(state))

    def misfits(self, state: Mapping[str, Any] | None) -> list[str]:
        """The groups have to hold as many parameters as now."""
        if state is None:  # weights only: the optimizer starts from nothing
            return []
        try:
            saved = [len(group["params"]) for group in state["param_groups"]]
        except (KeyError, TypeError):
            return ["its optimizer has no groups of parameters, so it is damaged"]
        now = [len(group["params"]) for group in self.optimizer.param_groups]
        if saved != now:
            return [f"its optimizer has groups of {saved} parameters, this run's of {now}: see --opt and --lock-image"]
        return []


class ScalerState(Stateful):
    """The state of a gradient scaler; a checkpoint without one leaves it as it is."""

    def __init__(self, scaler: torch.amp.GradScaler) -> None:
        self.scaler = scaler

    def state_dict(self) -> dict[str, Any]:
        """See torch. A device sync."""
        return self.scaler.state_dict()

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take over a saved state."""
        self.scaler.load_state_dict(dict(state))

    def misfits(self, state: Mapping[str, Any] | None) -> list[str]:
        """Any scaler's state fits."""
        return []


_PROGRESS: dict[str, Any] = {
    "epoch": int,
    "epoch_step": int,
    "step": int | None,
    "batch": int,
    "seen": int,
    "trained": int,
    "scored": int,
    "seconds": dict[str, float],
}


class ProgressState(Stateful):
    """The counters of a run.

    With another batch size or number of ranks the steps are counted so that epochs end where they would have.

    Args:
        data: has to be restored before.
    """

    def __init__(self, counters: Counters, data: TrainData, accum_freq: int, steps_per_epoch: int) -> None:
        self.counters = counters
        self.data = data
        self.accum_freq = accum_freq
        self.steps_per_epoch = steps_per_epoch

    def state_dict(self) -> dict[str, Any]:
        """The counters by name; ``seconds`` are those of rank 0."""
        return {**dataclasses.asdict(self.counters), "steps_per_epoch": self.steps_per_epoch}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue counting; of weights or a checkpoint of OpenCLIP only the epoch is known."""
        counters = self.counters
        counters.epoch, counters.epoch_step = state["epoch"], state["epoch_step"]
        counters.step = counters.epoch * self.steps_per_epoch
        if counters.epoch_step > 0:
            counters.step += self.steps_per_epoch - self.data.remaining_batches // self.accum_freq
        counters.batch = counters.step * self.accum_freq
        counters.seen, counters.trained, counters.scored = state["seen"], state["trained"], state["scored"]
        counters.seconds |= state["seconds"]
        if state["step"] not in (None, counters.step):
            log.warning("This is step %d of the run, which the checkpoint counts as %d", counters.step, state["step"])

    def misfits(self, state: Mapping[str, Any] | None) -> list[str]:
        """Any progress fits; every file that was read has one."""
        return ["it does not say how far training was"] if state is None else malformed("progress", state, _PROGRESS)


_SETTINGS: dict[str, Any] = {
    "seed": int,
    "select_rate": float,
    "world_size": int,
    "batch_size": int | None,
    "accum_freq": int | None,
    "workers": int | None,
    "score_refresh": float | None,
    "select_before_load": bool | None,
}
"""None stands for what a file does not say, or for a flag that was not given."""


class RunSettings(Stateful):
    """The settings that decide how a run continues; others than the checkpoint's are allowed and named in the log."""

    def __init__(self, config: Config, world: World) -> None:
        self.now = {
            "seed": config.training.seed,
            "select_rate": config.selection.select_rate,
            "world_size": world.size,
            "batch_size": config.training.batch_size,
            "accum_freq": config.training.accum_freq,
            "workers": config.data.workers,
            "score_refresh": config.selection.score_refresh,
            "select_before_load": config.selection.select_before_load,
        }

    def state_dict(self) -> dict[str, Any]:
        """The settings by name."""
        return self.now

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Name what differs in the log."""
        changed = self.changed(state)
        if changed:
            log.warning("This run has other settings than its checkpoint: %s", "; ".join(changed))

    def changed(self, state: Mapping[str, Any]) -> list[str]:
        """What differs, a phrase for each setting."""
        return [
            f"{name} is {value}, was {state[name]}"
            for name, value in self.now.items()
            if state[name] not in (None, value)
        ]

    def misfits(self, state: Mapping[str, Any] | None) -> list[str]:
        """Any settings fit."""
        return [] if state is None else malformed("settings", state, _SETTINGS)
