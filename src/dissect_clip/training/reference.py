"""The reference model of the strategies that need one: read from a file, or the run's own, frozen after its warm-up."""

from __future__ import annotations

import copy
import hashlib
import logging
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from dissect_clip.config.settings import Config
from dissect_clip.data.batch import Batch
from dissect_clip.distributed.world import World
from dissect_clip.models.build import build_reference_model
from dissect_clip.models.precision import Autocast
from dissect_clip.run.stateful import Stateful, is_of, malformed
from dissect_clip.selection.strategies.options import ReferenceOptions
from dissect_clip.training.scoring import Encoded, Scorer, build_scorer

log = logging.getLogger(__name__)

_KINDS = {"digest": str | None, "weights": dict | None, "epochs_begun": int}


class Reference(Stateful):
    """A frozen model that scores pairs beside the one in training: in eval mode and without gradients.

    Args:
        scorer: its scoring pass.
        after: complete epochs after which it takes the weights of the model in training; None where it has its own.
    """

    def __init__(self, scorer: Scorer, after: int | None) -> None:
        self.scorer = scorer
        self.after = after
        self.ready = after is None
        self.digest = digest(scorer.module) if after is None else None
        """Of weights that were read from a file."""
        self.epochs_begun = 0

    def __call__(self, batch: Batch) -> Encoded:
        """The features of a batch. The model's weights have to be ``ready``."""
        assert self.ready, "the strategy asks for a reference before its warm-up has ended"
        return self.scorer(batch)

    def begin(self, epoch: int, module: nn.Module) -> None:
        """Take the weights of ``module`` if the warm-up has ended with the epoch before this one (0-based)."""
        self.epochs_begun = epoch + 1
        if self.after is not None and not self.ready and epoch >= self.after:
            self.scorer.module.load_state_dict(module.state_dict())
            self.ready = True
            log.info("The model after %d epochs is the reference from now on", epoch)

    def state_dict(self) -> dict[str, Any]:
        """``digest`` of the weights of a file, or ``weights``, the run's own once there are any."""
        own = self.after is not None and self.ready
        weights = self.scorer.module.state_dict() if own else None
        return {"digest": self.digest, "weights": weights, "epochs_begun": self.epochs_begun}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take over the run's own weights, if they are in use where the checkpoint was saved."""
        self.epochs_begun = state["epochs_begun"]
        if state["weights"] is not None and self._in_use(state):
            self.scorer.module.load_state_dict(state["weights"])
            self.ready = True
        if self.after is None and state["digest"] != self.digest:
            log.warning("The reference model is another than the checkpoint's: --select-reference has other weights")

    def _in_use(self, state: Mapping[str, Any]) -> bool:
        """Whether this run's own weights have been its reference since before the checkpoint was saved."""
        begun: int = state["epochs_begun"]
        return self.after is not None and begun > self.after

    def misfits(self, state: Mapping[str, Any] | None) -> list[str]:
        """The run's own weights have to be there once they are in use."""
        if state is None:  # a checkpoint without selection, which says so itself
            return []
        if wrong := malformed("reference model", state, _KINDS):
            return wrong
        weights = state["weights"]
        if weights is not None and not is_of(weights, dict[str, Tensor]):
            return ["its reference model holds something other than tensors, so it is damaged"]
        if not self._in_use(state):
            return []
        if weights is None:
            return [
                f"it has no reference model, which the run has after --warmup-point {self.after} epochs without "
                "--select-reference"
            ]
        shapes = {name: value.shape for name, value in self.scorer.module.state_dict().items()}
        same = {name: value.shape for name, value in weights.items()} == shapes
        return [] if same else ["its reference model is of another --model"]


def digest(module: nn.Module) -> str:
    """SHA-256 of a module's weights and their names, in hexadecimal. A device sync."""
    hashed = hashlib.sha256()
    for name, value in sorted(module.state_dict().items()):
        hashed.update(name.encode())
        hashed.update(value.cpu().contiguous().reshape(-1).view(torch.uint8).numpy())
    return hashed.hexdigest()


def build_reference(
    config: Config,
    options: ReferenceOptions,
    world: World,
    module: nn.Module,
    autocast: Autocast,
    tokenizer: Callable[[list[str]], Tensor],
) -> Reference:
    """The reference model by a strategy's ``options``, scored as ``module`` is but always in eval mode.

    Raises:
        SetupError: if it cannot be built or does not take what ``module`` takes.
    """
    weights = options.select_reference
    if weights is None:
        model = copy.deepcopy(module)
    else:
        model = build_reference_model(config, weights, options.select_reference_model, world, module, tokenizer)
    model.requires_grad_(False)
    scorer = build_scorer(config, model, autocast, tokenizer, reference=True)
    return Reference(scorer, options.warmup_epochs if weights is None else None)
