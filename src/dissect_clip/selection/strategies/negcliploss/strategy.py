"""negCLIPLoss: CLIPScore minus what an image and a caption score with others, averaged over random sub-batches.

Wang et al., "CLIPLoss and Norm-Based Data Selection Methods for Multimodal Contrastive Learning", NeurIPS 2024, section
3.1. Over one batch, with the model's own temperature, it is minus temperature times the InfoNCE loss: the order of
``small_loss``. The mean over many random batches depends less on which pairs happen to stand beside a pair.

Shapes: N candidates of this rank, B to a sub-batch.
"""

from __future__ import annotations

import torch
from torch import Tensor

from dissect_clip.selection.strategies.negcliploss.options import NegCLIPLossOptions
from dissect_clip.selection.strategy import Candidates, Needs, Strategy, kept, required


def normaliser(cosine: Tensor, temperature: Tensor, part: Tensor) -> Tensor:
    """[N], the mean of an image's and its caption's log-sum-exp over those in the same ``part`` [N], as a cosine.

    ``cosine`` [N, N] is that of all images with all captions. The pair itself is one of its part.
    """
    logits = (cosine / temperature).where(part[:, None] == part, -torch.inf)
    return temperature * (logits.logsumexp(dim=1) + logits.logsumexp(dim=0)) / 2


class NegCLIPLoss(Strategy):
    """largest cosine minus its log-sum-exp over others, averaged over random sub-batches"""

    Options = NegCLIPLossOptions
    options: NegCLIPLossOptions
    needs = Needs.FEATURES

    def rank(self, candidates: Candidates) -> Tensor:
        cosine = required(candidates.image_features) @ required(candidates.text_features).T
        fixed = self.options.negcliploss_temperature
        temperature = required(candidates.logit_scale).reciprocal()
        if fixed is not None:
            temperature = torch.full_like(temperature, fixed)
        parts = [self._parts(candidates, len(cosine)) for _ in range(self.options.negcliploss_batches)]
        normalisers = torch.stack([normaliser(cosine, temperature, part) for part in parts])
        return cosine.diagonal() - normalisers.mean(dim=0)

    def _parts(self, candidates: Candidates, size: int) -> Tensor:
        """[N] int64, a random partition into sub-batches as even as can be."""
        wanted = self.options.negcliploss_batch_size or kept(self.rate(candidates.epoch), size)
        count = max(1, round(size / wanted))
        shuffled = torch.randperm(size, generator=candidates.generator, device=candidates.memory.device)
        return shuffled % count
