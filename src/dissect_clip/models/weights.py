"""The weights of the model in training as a part of a checkpoint."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from dissect_clip.models.parallel import RunningBuffers
from dissect_clip.run.stateful import Stateful, listed


def without_prefix(state_dict: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """A model's state without the prefixes of DistributedDataParallel and torch.compile."""
    return {re.sub(r"^(module\.|_orig_mod\.)+", "", name): value for name, value in state_dict.items()}


class ModelWeights(Stateful):
    """The model's own state dict, so that whatever loads OpenCLIP's checkpoints loads ours.

    Args:
        buffers: of a model in training, which remember their last good values.
        name: of ``--model``, for messages.
    """

    def __init__(self, module: nn.Module, name: str, buffers: RunningBuffers | None = None) -> None:
        self.module = module
        self.name = name
        self.buffers = buffers

    def state_dict(self) -> dict[str, Tensor]:
        """Names without the prefixes of wrappers."""
        return without_prefix(self.module.state_dict())

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take over saved weights."""
        self.module.load_state_dict(state)
        if self.buffers is not None:
            self.buffers.snapshot()

    def misfits(self, state: Mapping[str, Any] | None) -> list[str]:
        """Names and shapes of the weights have to be the same."""
        saved, own = state or {}, self.state_dict()
        reshaped = [
            f"{name} ({list(saved[name].shape)} instead of {list(value.shape)})"
            for name, value in own.items()
            if name in saved and saved[name].shape != value.shape
        ]
        kinds = {
            "lacks": [name for name in own if name not in saved],
            "has besides": [name for name in saved if name not in own],
            "has in another shape": reshaped,
        }
        found = [f"it {kind} {listed(names)}" for kind, names in kinds.items() if names]
        return [f"it is not of --model {self.name}: {'; '.join(found)}"] if found else []
