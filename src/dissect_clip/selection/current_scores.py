"""Scores of this step: what a training loop computed of a batch, checked, and as a strategy sees it.

Shapes: N pairs of this rank, F of them scored, D features.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from dissect_clip.models.loss import SampleLoss
from dissect_clip.selection.strategy import Candidates, Needs, required

_NORM_TOLERANCE = 0.02
"""How far the norm of a feature may be from 1: bfloat16 rounds by 0.004."""

_DIMENSIONS = {"image_features": 2, "text_features": 2, "similarity": 1, "loss": 1}


@dataclass(frozen=True, slots=True)
class PairScores:
    """What the caller computed of F pairs under one model; None for what was not computed."""

    image_features: Tensor | None = None  # [F, D]
    text_features: Tensor | None = None  # [F, D]
    logit_scale: Tensor | None = None
    logit_bias: Tensor | None = None
    similarity: Tensor | None = None  # [F]
    loss: Tensor | None = None  # [F]

    @classmethod
    def of(cls, *parts: Tensor | None) -> PairScores:
        """These, in the order of the fields, without their gradients."""
        return cls(*(None if part is None else part.detach() for part in parts))

    def at(self, rows: Tensor, size: int) -> PairScores:
        """The same of the rows that were asked for, if these are of all ``size`` rows of the batch."""
        if len(rows) == size:
            return self
        parts = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        whole = {name: part[rows] for name, part in parts.items() if part is not None and part.shape[:1] == (size,)}
        return dataclasses.replace(self, **whole)

    @property
    def has_features(self) -> bool:
        """Whether the features of both images and texts are there."""
        return self.image_features is not None and self.text_features is not None

    def cosine(self) -> Tensor | None:
        """[F] float32, the similarity by the features, or as it was given."""
        if self.image_features is None or self.text_features is None:
            return None if self.similarity is None else self.similarity.float()
        return (self.image_features.float() * self.text_features.float()).sum(dim=1)

    def missing(self, needs: Needs, prefix: str, *, with_logits: bool, siglip: bool) -> Iterator[str]:
        """What of ``needs`` is not there, by the names of arguments that begin with ``prefix``.

        ``with_logits``: whether losses and features are used with the logit scale, and with ``siglip`` with its bias.
        """
        both = f"{prefix}image_features and {prefix}text_features"
        by_score = needs & (Needs.SCORE | Needs.SIMILARITY)
        by_logits = with_logits and (Needs.FEATURES in needs or (Needs.LOSS in needs and self.loss is None))
        if Needs.FEATURES in needs and not self.has_features:
            yield both
        if by_score and not prefix and not self.has_features and self.similarity is None:
            yield f"{both}, or similarity"
        if Needs.LOSS in needs and self.loss is None and not self.has_features:
            yield f"{prefix}loss, or {both} and {prefix}logit_scale"
        if by_logits and self.logit_scale is None:
            yield f"{prefix}logit_scale"
        if by_logits and siglip and self.logit_bias is None:
            yield f"{prefix}logit_bias, with siglip=True"

    def check_shapes(self, prefix: str, rows: set[int]) -> None:
        """See that there are as many rows as one of ``rows``.

        Raises:
            ValueError: something has another number of rows, or of dimensions.
        """
        for name, dimensions in _DIMENSIONS.items():
            value = getattr(self, name)
            if value is not None and (value.dim() != dimensions or len(value) not in rows):
                allowed = " or ".join(map(str, sorted(rows)))
                raise ValueError(f"Selection.choose: {prefix}{name} is {list(value.shape)}, expected {allowed} rows")

    def check_unit_norm(self) -> None:
        """See that features have unit norm; rows of zeros, and rows that are not finite, do not count. A device sync.

        Raises:
            ValueError: they have not.
        """
        for name in ("image_features", "text_features"):
            part = getattr(self, name)
            if part is None:
                continue
            norm = part.float().norm(dim=1)
            if bool((((norm - 1).abs() > _NORM_TOLERANCE) & (norm > 0)).any()):
                raise ValueError(
                    f"Selection.choose: {name} must have unit norm, and have up to {norm.nan_to_num().max():.3g}: "
                    "give torch.nn.functional.normalize(features, dim=-1)"
                )


def current_candidates(
    unscored: Candidates, scores: PairScores, reference: PairScores, needs: Needs, pair_loss: SampleLoss
) -> tuple[Candidates, Tensor]:
    """Candidates with what the strategy needs of the scores of all N pairs, and which scores are finite, [N] bool.

    Collective as ``pair_loss``, if losses are needed and not given.
    """
    similarity = scores.cosine()
    memory = unscored.memory
    finite = torch.ones(len(memory), dtype=torch.bool, device=memory.device)
    if similarity is not None:
        if reference.has_features:
            similarity = similarity.where(required(reference.cosine()).isfinite(), torch.nan)
        finite = similarity.isfinite()
    image, text, loss = _needed(scores, finite, needs, pair_loss)
    candidates = dataclasses.replace(
        unscored,
        similarity=similarity,
        loss=loss,
        image_features=image,
        text_features=text,
        logit_scale=scores.logit_scale,
        logit_bias=scores.logit_bias,
    )
    if Needs.REFERENCE in needs:
        image, text, loss = _needed(reference, finite, needs, pair_loss)
        candidates = dataclasses.replace(
            candidates,
            reference_loss=loss,
            reference_image_features=image,
            reference_text_features=text,
            reference_logit_scale=reference.logit_scale,
            reference_logit_bias=reference.logit_bias,
        )
    for part in (candidates.loss, candidates.reference_loss):
        finite = finite if part is None else finite & part.isfinite()
    return candidates, finite


def _needed(
    scores: PairScores, finite: Tensor, needs: Needs, pair_loss: SampleLoss
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """Features of images and texts, and losses, as far as they are needed; of pairs that are ``finite`` [N].

    The features of the others are 0: they would make the losses of all others NaN.
    """
    image, text = (
        None if part is None else part.float().where(finite[:, None], 0)
        for part in (scores.image_features, scores.text_features)
    )
    loss = None
    if Needs.LOSS in needs:
        loss = None if scores.loss is None else scores.loss.float()
        if loss is None:
            loss = pair_loss(required(image), required(text), required(scores.logit_scale), scores.logit_bias)
    return (image, text, loss) if Needs.FEATURES in needs else (None, None, loss)
