"""Retrieval and classification in numbers: from similarities to ranks, from ranks to what is reported.

Shapes: Q queries, N candidates, B pairs, M images, T captions, C classes, D features. Ranks count from 0.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

RECALL_AT = (1, 5, 10)


@contextmanager
def full_float32() -> Iterator[None]:
    """Multiply float32 matrices in float32: TF32 keeps 10 bits, which reorders close candidates."""
    before = torch.get_float32_matmul_precision()
    if before == "highest":  # setting it again would make torch.compile compile the whole model again
        yield
        return
    torch.set_float32_matmul_precision("highest")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)


def similarity(query: Tensor, candidate: Tensor) -> Tensor:
    """Inner products of [Q, D] and [N, D] -> [Q, N], float32; equal candidates get equal similarities."""
    with full_float32():
        if len(query) == 1:
            # Matrix-vector kernels round each output in their own way, so that equal candidates would not tie.
            return (query.expand(2, -1) @ candidate.T)[:1]
        return query @ candidate.T


def best_rank(similarity: Tensor, own: Tensor) -> Tensor:
    """Where each query's best placed own candidate stands.

    Candidates are ordered by falling similarity; among equals the earlier one stands ahead, as in a stable sort. A
    model that maps everything to one point is thus ranked by position, not first everywhere.

    Args:
        similarity: [Q, N], finite.
        own: [Q, N] bool, which candidates belong to the query; at least one in every row.

    Returns:
        [Q] int64, 0 <= rank < N.
    """
    best, first = similarity.masked_fill(~own, -torch.inf).max(dim=1, keepdim=True)  # the first of equal maxima
    earlier = torch.arange(similarity.shape[1], device=similarity.device) < first
    ahead = (similarity > best) | ((similarity == best) & earlier)
    return ahead.sum(dim=1)


def rank_metrics(rank: Tensor, name: str) -> dict[str, float]:
    """Mean rank, median rank (rounded down) and recall at 1, 5 and 10 of ranks [Q], Q >= 1.

    The reported ranks count from 1; recalls are fractions in [0, 1]. Formulas and names are OpenCLIP's.
    """
    ordered = rank.sort().values
    middle = int(ordered[(len(rank) - 1) // 2] + ordered[len(rank) // 2]) // 2
    metrics = {f"{name}_mean_rank": rank.double().mean().item() + 1, f"{name}_median_rank": middle + 1.0}
    for k in RECALL_AT:
        metrics[f"{name}_R@{k}"] = (rank < k).double().mean().item()
    return metrics


def retrieval_metrics(image_to_text: Tensor, text_to_image: Tensor) -> dict[str, float]:
    """What is reported on a retrieval set.

    Args:
        image_to_text: [M] int64, the rank of the best placed of each image's own captions among all captions.
        text_to_image: [T] int64, the rank of each caption's image among all images.

    Returns:
        :func:`rank_metrics` both ways; ``rsum``, the sum of the six recalls in percent, in [0, 600]; ``num_samples``,
        the images; ``num_captions``.
    """
    metrics = rank_metrics(image_to_text, "image_to_text") | rank_metrics(text_to_image, "text_to_image")
    rsum = 100 * sum(value for name, value in metrics.items() if "_R@" in name)
    return metrics | {"rsum": rsum, "num_samples": len(image_to_text), "num_captions": len(text_to_image)}


def contrastive_loss(image_features: Tensor, text_features: Tensor, logit_scale: Tensor) -> Tensor:
    """Symmetric InfoNCE of B pairs, [B, D] each, in nats: the mean of the two cross entropies."""
    logits = logit_scale * similarity(image_features, text_features)
    target = torch.arange(len(logits), device=logits.device)
    return (F.cross_entropy(logits, target) + F.cross_entropy(logits.T, target)) / 2


@dataclass(frozen=True, slots=True)
class Accuracy:
    """How well images were classified; shares are in [0, 1]."""

    top1: float
    top5: float  # 1 with fewer than five classes
    mean_per_class_recall: float  # over the classes that there are images of
    num_images: int


def class_counts(rank: Tensor, label: Tensor, num_classes: int) -> Tensor:
    """Images, hits at 1 and hits at 5 of each class, [C, 3] int64, from the rank of the right class, [M] int64.

    Counts of parts of a set add up to those of the set. ``label`` [M] int64 is in 0 <= label < C.
    """
    hits = torch.stack([torch.ones_like(rank), rank < 1, rank < 5], dim=1)
    return hits.new_zeros(num_classes, 3).index_add_(0, label, hits)


def accuracy(counts: Tensor) -> Accuracy:
    """Shares of :func:`class_counts`, at least one image.

    The mean recall of the classes is ``balanced_accuracy_score`` of scikit-learn, as CLIP_benchmark reports it.
    """
    images, top1, top5 = counts.double().unbind(dim=1)
    total = images.sum()
    recall = (top1 / images)[images > 0].mean()
    return Accuracy((top1.sum() / total).item(), (top5.sum() / total).item(), recall.item(), int(total))


def average_precision(scores: Tensor, truth: Tensor) -> Tensor:
    """Of each class, the mean precision at the places of its own images in the order of falling scores; [C] float64.

    0 for a class without images. Equal scores keep the order of the images. The formula is CLIP_benchmark's, of which
    ``mean_average_precision`` is the mean over the classes.

    Args:
        scores: [M, C].
        truth: [M, C] bool, whether the class is in the image.
    """
    order = scores.argsort(dim=0, descending=True, stable=True)
    own = truth.gather(0, order).double()
    precision = own.cumsum(dim=0) / torch.arange(1, len(own) + 1, device=own.device)[:, None]
    return (precision * own).sum(dim=0) / own.sum(dim=0).clamp(min=1)
