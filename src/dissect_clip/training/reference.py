"""The reference model of the strategies that need one: read from a file, or the run's own, frozen after its warm-up."""

from __future__ import annotations

import copy
import hashlib
import logging
from collections.abc import Callable

import torch
from torch import Tensor, nn

from dissect_clip.config.settings import Config
from dissect_clip.data.batch import Batch
from dissect_clip.distributed.world import World
from dissect_clip.models.build import build_reference_model
from dissect_clip.models.precision import Autocast
from dissect_clip.selection.strategies.options import ReferenceOptions
from dissect_clip.training.scoring import Encoded, Scorer, build_scorer

log = logging.getLogger(__name__)


class Reference:
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

    def __call__(self, batch: Batch) -> Encoded:
        """The features of a batch. The model's weights have to be ``ready``."""
        assert self.ready, "the strategy asks for a reference before its warm-up has ended"
        return self.scorer(batch)

    def begin(self, epoch: int, module: nn.Module) -> None:
        """Take the weights of ``module`` if the warm-up has ended with the epoch before this one (0-based)."""
        if self.after is not None and not self.ready and epoch >= self.after:
            self.scorer.module.load_state_dict(module.state_dict())
            self.ready = True
            log.info("The model after %d epochs is the reference from now on", epoch)

    def saved(self) -> tuple[str | None, dict[str, Tensor] | None]:
        """What a checkpoint holds: the digest of a file's weights, or the run's own weights once there are any."""
        own = self.after is not None and self.ready
        return self.digest, self.scorer.module.state_dict() if own else None

    def load(self, weights: dict[str, Tensor]) -> None:
        """Take over what a checkpoint held."""
        self.scorer.module.load_state_dict(weights)
        self.ready = True


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
