"""What every image of a batch has to do with every caption: logits, losses and gradients as tables.

Shapes: N pairs of this rank, image by caption; D features.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from dissect_clip.selection.strategy import Candidates, required


def pair_logits(image: Tensor, text: Tensor, logit_scale: Tensor, logit_bias: Tensor | None) -> Tensor:
    """Logits [N, N] of ``image`` and ``text`` [N, D], unit norm, as open_clip's losses have them."""
    logits = logit_scale * image @ text.T
    return logits if logit_bias is None else logits + logit_bias


def learner_logits(candidates: Candidates) -> Tensor:
    """Logits [N, N] of the candidates under the model in training."""
    image, text = required(candidates.image_features), required(candidates.text_features)
    return pair_logits(image, text, required(candidates.logit_scale), candidates.logit_bias)


def reference_logits(candidates: Candidates) -> Tensor:
    """Logits [N, N] of the candidates under the reference model."""
    image, text = required(candidates.reference_image_features), required(candidates.reference_text_features)
    return pair_logits(image, text, required(candidates.reference_logit_scale), candidates.reference_logit_bias)


def sigmoid_losses(logits: Tensor) -> Tensor:
    """Sigmoid loss [N, N] in nats of every image with every caption (Zhai et al., 2023, equation 1); bias included."""
    return F.softplus(_sign_flipped(logits))


def loss_gradient(logits: Tensor, sigmoid: bool) -> Tensor:
    """The derivative [N, N] of N times the batch's loss with respect to its logits [N, N].

    InfoNCE (Radford et al., 2021, figure 3): mean of the softmax over rows and over columns, minus the identity.
    Sigmoid: the wrong share of each logistic decision, with its sign.
    """
    if sigmoid:
        return _sign_flipped(torch.sigmoid(_sign_flipped(logits)))
    return (logits.softmax(dim=1) + logits.softmax(dim=0)) / 2 - torch.eye(len(logits), device=logits.device)


def _sign_flipped(values: Tensor) -> Tensor:
    """A table [N, N] with the sign of its diagonal changed."""
    return values - 2 * values.diagonal().diag()
