"""What a strategy is: a pure function from what is known about a batch to an order of its samples.

Shapes: N pairs of this rank, K kept, C columns that the strategy remembers, D features, R of the reference model.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import Flag, auto
from typing import ClassVar, TypeVar

import torch
from torch import Tensor

from dissect_clip.config.options import StrategyOptions
from dissect_clip.config.run_plan import RunPlan
from dissect_clip.selection.schedule import select_rate

T = TypeVar("T")


class Needs(Flag):
    """What a strategy uses, and so what the scoring pass computes. NOTHING means that there is no scoring pass.

    SCORE is how well a pair matches, and comes from an earlier step with ``--score-refresh`` below 1; SIMILARITY is the
    cosine of this step. REFERENCE is the same of a second, frozen model: its loss with LOSS, its features with
    FEATURES.
    """

    NOTHING = 0
    SIMILARITY = auto()
    LOSS = auto()
    FEATURES = auto()
    SCORE = auto()
    REFERENCE = auto()


REUSABLE = Needs.SCORE | Needs.LOSS
"""What may come from an earlier step (--score-refresh)."""


@dataclass(frozen=True, slots=True)
class Candidates:
    """All that a strategy may look at; a part that it does not need is None."""

    epoch: int
    generator: torch.Generator  # on the candidates' device; seeded from (seed, step, rank)
    memory: Tensor  # [N, C] float32, the columns this strategy remembers; NaN = never seen
    similarity: Tensor | None = None  # [N] float32, cosine of image and text under the current model, in [-1, 1]
    loss: Tensor | None = None  # [N] float32, contrastive loss against the global batch, in nats; reused: minus z
    image_features: Tensor | None = None  # [N, D] float32, unit norm
    text_features: Tensor | None = None  # [N, D] float32, unit norm
    reused: Tensor | None = None  # [N] float32, scores that need not be of this step, as z; NaN = never scored
    decoy: Tensor | None = None  # [N] bool, whose captions are wrong on purpose; None where none are in this epoch
    logit_scale: Tensor | None = None  # scalar float32, the factor of the cosines in the loss; where pairs were scored
    logit_bias: Tensor | None = None  # scalar float32, SigLIP only
    reference_loss: Tensor | None = None  # [N] float32, as ``loss``, under the reference model
    reference_image_features: Tensor | None = None  # [N, R] float32, unit norm, under the reference model
    reference_text_features: Tensor | None = None  # [N, R] float32, unit norm, under the reference model
    reference_logit_scale: Tensor | None = None  # scalar float32
    reference_logit_bias: Tensor | None = None  # scalar float32, SigLIP only

    @property
    def score(self) -> Tensor | None:
        """[N] float32, how well each pair matches, larger is better.

        CLIPScore, 0 to 100. With ``--score-refresh`` below 1 the z-score of the pair against mismatched pairs, when
        it was last computed, which may be some epochs ago; NaN if it never was.
        """
        if self.reused is not None or self.similarity is None:
            return self.reused
        return clip_score(self.similarity)


class Strategy:
    """Base of all strategies: keeps ``--select-rate`` of every batch and remembers nothing.

    A strategy has six members: ``needs``, ``remembers``, ``rank``, ``remember``, ``weights`` and ``rate``. It is pure:
    no model, no file, no collective, no state that changes. What more it wants of a run it says by a mixin of
    :mod:`dissect_clip.selection.mixins`. Its options are a dataclass, which it names in ``Options``; the first line of
    its docstring describes it in ``--help``.

    Args:
        options: an instance of ``Options``.
        run: the facts about the run that it may use.
    """

    Options: ClassVar[type[StrategyOptions]] = StrategyOptions

    needs: Needs = Needs.NOTHING
    """The parts of the candidates that it uses."""

    remembers: tuple[str, ...] = ()
    """Names of the C columns that the store keeps for it."""

    def __init__(self, options: StrategyOptions, run: RunPlan) -> None:
        self.options = options
        self.run = run

    def rate(self, epoch: int) -> float:
        """The share of every batch kept in this epoch (0-based), in (0, 1]."""
        return select_rate(self.run, epoch)

    def rank(self, candidates: Candidates) -> Tensor:
        """[N] float, the largest are trained on. Ties are broken at random, NaN is chosen last."""
        raise NotImplementedError

    def remember(self, candidates: Candidates) -> Tensor | None:
        """[N, C] float32 to store after ranking, or None to leave the store as it is in this epoch."""
        return None

    def weights(self, candidates: Candidates, index: Tensor) -> Tensor | None:
        """[K] float32, factors of the losses of the selected samples ``index`` [K]; None where all are 1.

        Not called when the whole batch is kept.
        """
        return None


def kept(rate: float, size: int) -> int:
    """K, how many of ``size`` samples a rate in (0, 1] keeps: rounded, at least 1."""
    return max(1, round(rate * size))


def in_order(chosen: Tensor, others: Tensor) -> Tensor:
    """A rank [N] of what was chosen one after the other: places ``chosen`` [K] int64, the first the highest.

    Below them the others, by ``others`` [N], of which the values of the chosen do not matter; all finite.
    """
    below = others.float() - others.max() - 1
    return below.scatter(0, chosen, torch.arange(len(chosen), 0, -1, device=below.device, dtype=below.dtype))


def required(part: T | None) -> T:
    """A part of the candidates that the strategy declared in ``needs``, and so is there."""
    assert part is not None, "the strategy uses a part of the candidates that its `needs` does not declare"
    return part


def clip_score(similarity: Tensor) -> Tensor:
    """CLIPScore, ``max(100 * cos, 0)`` in score points, [N] in 0..100 (Zhao et al., 2025, section 3)."""
    return (100 * similarity).clamp(min=0)
