"""The training loss of open_clip, and the same loss sample by sample for the strategies.

Shapes: N pairs of this rank, G pairs of all ranks, D features.
"""

from __future__ import annotations

from argparse import Namespace

import open_clip
import torch
from open_clip.loss import SigLipLoss, gather_features
from torch import Tensor, nn
from torch.nn import functional as F

from dissect_clip.config.settings import Config
from dissect_clip.distributed.world import World


def build_loss(config: Config, world: World) -> nn.Module:
    """open_clip's loss module for these settings: CLIP, SigLIP, CoCa or distillation."""
    loss: nn.Module = open_clip.create_loss(
        Namespace(
            model=config.model.model,
            distill=config.model.distill,
            siglip=config.model.siglip,
            loss_dist_impl=config.model.loss_dist_impl,
            local_loss=config.training.local_loss,
            gather_with_grad=config.training.gather_with_grad,
            coca_caption_loss_weight=config.model.coca_caption_loss_weight,
            coca_contrastive_loss_weight=config.model.coca_contrastive_loss_weight,
            rank=world.rank,
            world_size=world.size,
            horovod=False,
        )
    )
    return loss


def infonce_by_sample(
    image: Tensor, text: Tensor, all_image: Tensor, all_text: Tensor, offset: int, logit_scale: Tensor
) -> Tensor:
    """Symmetric InfoNCE of each pair [N] in nats, against the pairs of all ranks (Radford et al., 2021, figure 3).

    ``image``, ``text`` [N, D] are rows ``offset`` to ``offset + N`` of ``all_image``, ``all_text`` [G, D]. The mean
    over all ranks is the CLIP loss of the global batch.
    """
    target = torch.arange(len(image), device=image.device) + offset
    image_to_text = F.cross_entropy(logit_scale * image @ all_text.T, target, reduction="none")
    text_to_image = F.cross_entropy(logit_scale * text @ all_image.T, target, reduction="none")
    return (image_to_text + text_to_image) / 2


def sigmoid_by_sample(
    image: Tensor, text: Tensor, all_image: Tensor, all_text: Tensor, offset: int, logit_scale: Tensor, bias: Tensor
) -> Tensor:
    """Sigmoid loss of each pair [N] in nats, the mean of its row and its column (Zhai et al., 2023, equation 1).

    Arguments as in :func:`infonce_by_sample`. The mean over all ranks is the SigLIP loss of the global batch.
    """
    sign = -torch.ones(len(image), len(all_text), device=image.device)
    sign.diagonal(offset).fill_(1)  # an indexed write of a number would have the host wait for the device
    row = -F.logsigmoid(sign * (logit_scale * image @ all_text.T + bias)).sum(dim=1)
    column = -F.logsigmoid(sign * (logit_scale * text @ all_image.T + bias)).sum(dim=1)
    return (row + column) / 2


def weighted_loss(
    loss: nn.Module,
    world: World,
    weight: Tensor,
    *,
    image_features: Tensor,
    text_features: Tensor,
    logit_scale: Tensor,
    logit_bias: Tensor | None = None,
) -> dict[str, Tensor]:
    """The mean over pairs of ``weight`` times the loss of each, by the name that open_clip's loss has.

    ``weight`` [N] float32 are those of this rank's pairs. For open_clip's ClipLoss and SigLipLoss, whose gradients
    these are where all weights are 1, and whose mean over the ranks. Collective: features are gathered as ClipLoss does
    it, for SigLIP with their gradients; weights are where the rows of the loss are those of all ranks.
    """
    if isinstance(loss, SigLipLoss):
        assert logit_bias is not None, "models for SigLIP are built with a bias"
        all_image, all_text = image_features, text_features
        if world.size > 1:
            all_image, all_text = gather_features(
                image_features, text_features, gather_with_grad=True, rank=world.rank, world_size=world.size
            )
        offset = world.rank * len(weight)
        by_pair = sigmoid_by_sample(image_features, text_features, all_image, all_text, offset, logit_scale, logit_bias)
        return {"contrastive_loss": (weight * by_pair).mean()}
    assert isinstance(loss, open_clip.ClipLoss), "the strategy is refused with other losses"
    by_image, by_text = loss.get_logits(image_features, text_features, logit_scale, logit_bias)
    target = loss.get_ground_truth(by_image.device, len(by_image))
    if len(by_image) > len(weight):
        weight = world.all_gather(weight)
    by_pair = F.cross_entropy(by_image, target, reduction="none") + F.cross_entropy(by_text, target, reduction="none")
    return {"contrastive_loss": (weight * by_pair).mean() / 2}


def loss_against_all(
    world: World,
    others: Tensor,
    *,
    image_features: Tensor,
    text_features: Tensor,
    logit_scale: Tensor,
    logit_bias: Tensor | None = None,
) -> dict[str, Tensor]:
    """Symmetric InfoNCE of this rank's pairs against all pairs of all ranks, by the name that open_clip's loss has.

    ``others`` [M, 2 D] are image and text features of M pairs of this rank that are not trained on; M is equal on all
    ranks. The gradient flows through a pair's own features, as the anchor of its row and of its column, and never
    through what it is held against: the others do not move away, and all features would come to lie on one point. A
    bias of the logits is the same for all of a row. Collective: one all_gather of all features.
    """
    chosen = torch.cat([image_features, text_features], dim=1).detach()
    every = world.all_gather(torch.cat([chosen, others.to(chosen.dtype)]))
    all_image, all_text = every.split(image_features.shape[1], dim=1)  # type: ignore[no-untyped-call]
    offset = world.rank * (len(chosen) + len(others))
    by_pair = infonce_by_sample(image_features, text_features, all_image, all_text, offset, logit_scale)
    loss = by_pair.mean()
    # A bias has no gradient here, but DDP waits for one.
    return {"contrastive_loss": loss if logit_bias is None else loss + 0 * logit_bias.sum()}


class SampleLoss:
    """The contrastive part of the training loss, by sample.

    ``sample_loss(image [N, D], text [N, D], logit_scale, logit_bias) -> [N]`` in nats. Collective: one all_gather of
    the features.
    """

    def __init__(self, world: World, siglip: bool) -> None:
        self.world = world
        self.siglip = siglip

    def __call__(self, image: Tensor, text: Tensor, logit_scale: Tensor, logit_bias: Tensor | None) -> Tensor:
        both = self.world.all_gather(torch.cat([image, text], dim=1))
        all_image, all_text = both.split(image.shape[1], dim=1)  # type: ignore[no-untyped-call]
        offset = self.world.rank * len(image)
        if self.siglip:
            assert logit_bias is not None, "models for SigLIP are built with a bias"
            return sigmoid_by_sample(image, text, all_image, all_text, offset, logit_scale, logit_bias)
        return infonce_by_sample(image, text, all_image, all_text, offset, logit_scale)
