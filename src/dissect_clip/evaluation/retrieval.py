"""Retrieval between images and captions, exact, chunked and spread over the ranks.

Every rank encodes its share of the set; the features are gathered once and put into the order of the dataset. Ranking
is cut into chunks of queries that depend on the data alone, and each rank takes some of the chunks: results do not
depend on the number of ranks, and memory is O(chunk x N), never N x N.

Shapes: M images, T captions, L tokens, D features, Q queries, N candidates.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from dissect_clip.data.batch import RetrievalBatch
from dissect_clip.distributed.world import World
from dissect_clip.errors import TrainingError
from dissect_clip.evaluation.common import NOT_FINITE, Encoder, progress, share
from dissect_clip.evaluation.metrics import best_rank, contrastive_loss, retrieval_metrics, similarity

CHUNK = 256  # queries ranked at a time: about 3 KB of memory for every candidate


class RetrievalSet(Protocol):
    """A validation set of images with captions."""

    @property
    def name(self) -> str: ...
    @property
    def loader(self) -> Iterable[RetrievalBatch]: ...  # this rank's share; any size, also none


@dataclass(frozen=True, slots=True)
class RetrievalFeatures:
    """Features of a retrieval set or of one rank's share of it."""

    order: Tensor  # [M] int64, the images' place in the dataset
    captions: Tensor  # [M] int64, captions of each image
    image: Tensor  # [M, D] float32
    text: Tensor  # [T, D] float32, captions of one image together, in the order of the images
    generative_loss: Tensor | None  # [M] float32, nats a token of the first caption; CoCa only

    @property
    def first_caption(self) -> Tensor:
        """[M] int64, where each image's first caption stands."""
        return self.captions.cumsum(0) - self.captions


def evaluate_retrieval(encoder: Encoder, data: RetrievalSet, *, world: World, batch_size: int) -> dict[str, float]:
    """Retrieval metrics, ``clip_val_loss``, and ``val_generative_loss`` for CoCa. Collective; equal on all ranks.

    ``clip_val_loss`` is the symmetric InfoNCE of consecutive batches of ``batch_size`` images with their first
    captions, in the order of the dataset, averaged over the images.

    Raises:
        TrainingError: the set is empty, or features are not finite.
    """
    encoded = in_order(gather(encode(encoder, data, world), world))
    _check(encoded, data.name)
    image_group = torch.arange(len(encoded.image), device=world.device)
    text_group = image_group.repeat_interleave(encoded.captions)
    metrics = retrieval_metrics(
        image_to_text=rank_all(encoded.image, encoded.text, image_group, text_group, world),
        text_to_image=rank_all(encoded.text, encoded.image, text_group, image_group, world),
    )
    logit_scale = encoder.model.logit_scale.float().exp().mean()
    metrics["clip_val_loss"] = validation_loss(encoded, logit_scale, batch_size, world)
    if encoded.generative_loss is not None:
        metrics["val_generative_loss"] = encoded.generative_loss.double().mean().item()
    return metrics


def encode(encoder: Encoder, data: RetrievalSet, world: World) -> RetrievalFeatures:
    """Features of this rank's share, on its device; D is 0 where the share is empty. Not collective."""
    parts = [
        encode_batch(encoder, batch.to(world.device, encoder.input_dtype))
        for batch in progress(data.loader, world, f"retrieval on {data.name}")
    ]
    if not parts:
        nothing, no_features = torch.zeros(0, dtype=torch.int64), torch.zeros(0, 0)
        parts = [RetrievalFeatures(nothing, nothing, no_features, no_features, None)]
    losses = [part.generative_loss for part in parts if part.generative_loss is not None]
    return RetrievalFeatures(
        order=torch.cat([part.order for part in parts]).to(world.device),
        captions=torch.cat([part.captions for part in parts]).to(world.device),
        image=torch.cat([part.image for part in parts]).to(world.device),
        text=torch.cat([part.text for part in parts]).to(world.device),
        generative_loss=torch.cat(losses) if losses else None,
    )


def encode_batch(encoder: Encoder, batch: RetrievalBatch) -> RetrievalFeatures:
    """Features of one batch; first captions go through the model with their images, for CoCa's captioning loss."""
    first_caption = batch.captions.cumsum(0) - batch.captions
    further = torch.ones(len(batch.text), dtype=torch.bool).index_fill(0, first_caption, False).nonzero()[:, 0]
    output = encoder.pairs(batch.image, batch.text[first_caption])
    image, first_text = output["image_features"].float(), output["text_features"].float()
    text = first_text.new_empty(len(batch.text), first_text.shape[1])
    text[first_caption] = first_text
    for start in range(0, len(further), len(batch.image)):  # no more captions at a time than images
        index = further[start : start + len(batch.image)]
        text[index] = encoder.texts(batch.text[index])
    loss = generative_loss(output["logits"], output["labels"]) if "logits" in output else None
    return RetrievalFeatures(batch.order, batch.captions, image, text, loss)


def generative_loss(logits: Tensor, labels: Tensor) -> Tensor:
    """Mean cross entropy of each caption's next tokens, [M, L, vocabulary] and [M, L] -> [M] float32, in nats.

    Padding counts, as in OpenCLIP's evaluation. One caption at a time: the logits in float32 are large.
    """
    pairs = zip(logits, labels, strict=True)
    return torch.stack([F.cross_entropy(token_logits.float(), token) for token_logits, token in pairs])


def gather(encoded: RetrievalFeatures, world: World) -> RetrievalFeatures:
    """All ranks' features, rank by rank. Collective."""
    has_loss = encoded.generative_loss is not None
    # A rank without images knows neither D nor whether there is a captioning loss.
    shape = torch.tensor([encoded.image.shape[1], int(has_loss)], device=world.device)
    width, any_loss = world.max(shape).tolist()
    image = encoded.image if len(encoded.image) else encoded.image.new_zeros(0, width)
    text = encoded.text if len(encoded.text) else encoded.text.new_zeros(0, width)
    loss = encoded.generative_loss if encoded.generative_loss is not None else image.new_zeros(0)
    return RetrievalFeatures(
        order=world.all_gather_uneven(encoded.order),
        captions=world.all_gather_uneven(encoded.captions),
        image=world.all_gather_uneven(image),
        text=world.all_gather_uneven(text),
        generative_loss=world.all_gather_uneven(loss) if any_loss else None,
    )


def in_order(encoded: RetrievalFeatures) -> RetrievalFeatures:
    """The same features in the order of the dataset, each image's captions with it."""
    by_place = encoded.order.argsort()
    place = torch.empty_like(by_place)
    place[by_place] = torch.arange(len(by_place), device=by_place.device)
    text_order = place.repeat_interleave(encoded.captions).argsort(stable=True)
    loss = encoded.generative_loss
    return RetrievalFeatures(
        order=encoded.order[by_place],
        captions=encoded.captions[by_place],
        image=encoded.image[by_place],
        text=encoded.text[text_order],
        generative_loss=None if loss is None else loss[by_place],
    )


def rank_all(
    query: Tensor,
    candidate: Tensor,
    query_group: Tensor,
    candidate_group: Tensor,
    world: World,
    chunk: int = CHUNK,
) -> Tensor:
    """The rank of each query's best placed own candidate. Collective; arguments and result equal on all ranks.

    Args:
        query: [Q, D] float32.
        candidate: [N, D] float32.
        query_group: [Q] int64; a query's own candidates are those of the same group.
        candidate_group: [N] int64.
        chunk: queries ranked at a time.

    Returns:
        [Q] int64, counted from 0.
    """
    queries, groups = torch.split(query, chunk), torch.split(query_group, chunk)
    ranks = [
        best_rank(similarity(queries[i], candidate), groups[i][:, None] == candidate_group)
        for i in progress(share(len(queries), world), world, "ranking")
    ]
    return world.all_gather_uneven(torch.cat([query_group.new_zeros(0), *ranks]))


def validation_loss(encoded: RetrievalFeatures, logit_scale: Tensor, batch_size: int, world: World) -> float:
    """Symmetric InfoNCE of consecutive batches, weighted by their sizes, in nats. Collective."""
    images = torch.split(encoded.image, batch_size)
    texts = torch.split(encoded.text[encoded.first_caption], batch_size)
    losses = [contrastive_loss(images[i], texts[i], logit_scale) * len(images[i]) for i in share(len(images), world)]
    every = world.all_gather_uneven(torch.stack(losses) if losses else logit_scale.new_zeros(0))
    return every.double().sum().item() / len(encoded.image)


def _check(encoded: RetrievalFeatures, name: str) -> None:
    if not len(encoded.image):
        raise TrainingError(f"evaluation on {name}: not one image could be read, look at the data")
    images = int((~encoded.image.isfinite().all(dim=1)).sum())
    captions = int((~encoded.text.isfinite().all(dim=1)).sum())
    if images or captions:
        raise TrainingError(
            f"evaluation on {name}: features of {images} of {len(encoded.image)} images and {captions} of "
            f"{len(encoded.text)} captions are NaN or infinite. {NOT_FINITE}"
        )
