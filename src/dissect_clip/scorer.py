"""The scoring pass: features of a batch without gradients.

Shapes: N pairs, D features.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.nn.modules.batchnorm import _BatchNorm

from dissect_clip.batch import Batch
from dissect_clip.model import Autocast, OpenClip


@dataclass(frozen=True, slots=True)
class Encoded:
    """The features of a batch."""

    image_features: Tensor  # [N, D] float32, unit norm
    text_features: Tensor  # [N, D] float32, unit norm
    logit_scale: Tensor  # scalar, the factor itself and not its logarithm
    logit_bias: Tensor | None  # scalar, SigLIP only


class Scorer:
    """The scoring pass: one forward without gradients through the unwrapped module.

    In the training run's autocast and, by default, in eval mode. BatchNorm statistics and the generators that
    training draws from stay untouched in both modes.
    """

    def __init__(self, module: OpenClip, autocast: Autocast, mode: str, compiled: bool) -> None:
        self.module = module
        self.autocast = autocast
        self.mode = mode
        self.batch_norms = [part for part in module.modules() if isinstance(part, _BatchNorm)]
        self.forward: Callable[[Tensor, Tensor], tuple[Tensor, Tensor]] = (
            torch.compile(self._features) if compiled else self._features
        )

    def _features(self, image: Tensor, text: Tensor) -> tuple[Tensor, Tensor]:
        return self.module.encode_image(image, normalize=False), self.module.encode_text(text, normalize=False)

    @contextmanager
    def _eval_mode(self) -> Iterator[None]:
        self.module.eval()
        try:
            yield
        finally:
            self.module.train()

    @contextmanager
    def _train_mode(self) -> Iterator[None]:
        for norm in self.batch_norms:
            norm.track_running_stats = False  # normalise with the batch's statistics, and leave the running ones
        devices = [self.module.logit_scale.device] if self.module.logit_scale.device.type == "cuda" else []
        try:
            with torch.random.fork_rng(devices=devices):  # else dropout here would change dropout in training
                yield
        finally:
            for norm in self.batch_norms:
                norm.track_running_stats = True

    def __call__(self, batch: Batch) -> Encoded:
        mode = self._eval_mode() if self.mode == "eval" else self._train_mode()
        with torch.no_grad(), mode, self.autocast():
            image, text = self.forward(batch.image, batch.text)
            scale, bias = self.module.logit_scale.exp(), self.module.logit_bias
        # Normalised outside of autocast: in bf16 the rounding would move scores by as much again as the model's does.
        image, text = F.normalize(image.float(), dim=-1), F.normalize(text.float(), dim=-1)
        return Encoded(image, text, scale.float(), None if bias is None else bias.float())
