"""What a strategy is: a pure function from what is known about a batch to an order of its samples.

Shapes: N pairs of this rank, K kept, C columns that the strategy remembers, D features.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import Flag, auto

import torch
from torch import Tensor

from dissect_clip.config import Config


class Needs(Flag):
    """What a strategy looks at, and so what the scoring pass computes. NOTHING means there is no scoring pass."""

    NOTHING = 0
    SIMILARITY = auto()
    LOSS = auto()
    FEATURES = auto()


@dataclass(frozen=True, slots=True)
class Candidates:
    """All that a strategy may look at; a part that it does not need is None."""

    epoch: int
    generator: torch.Generator  # on the candidates' device; seeded from (seed, step, rank)
    memory: Tensor  # [N, C] float32, the columns this strategy remembers; NaN = never seen
    similarity: Tensor | None = None  # [N] float32, cosine of image and text under the current model, in [-1, 1]
    loss: Tensor | None = None  # [N] float32, contrastive loss against the global batch, in nats
    image_features: Tensor | None = None  # [N, D] float32, unit norm
    text_features: Tensor | None = None  # [N, D] float32, unit norm


@dataclass(frozen=True, slots=True)
class Selection:
    """The samples of a batch that are trained on."""

    index: Tensor  # [K] int64, rising
    candidates: Candidates | None  # None where nothing was scored


class Strategy:
    """Base of all strategies: keeps ``--select-rate`` of every batch and remembers nothing.

    A strategy is pure: no model, no file, no collective, no state that changes. Its first docstring line is its line
    in ``--help``.
    """

    needs: Needs = Needs.NOTHING
    remembers: tuple[str, ...] = ()

    def __init__(self, config: Config) -> None:
        self.config = config

    def rate(self, epoch: int) -> float:
        """The share of every batch kept in this epoch (0-based), in (0, 1]."""
        return self.config.select_rate

    def rank(self, candidates: Candidates) -> Tensor:
        """[N] float, the largest are trained on. Ties are broken at random, NaN is chosen last."""
        raise NotImplementedError

    def remember(self, candidates: Candidates) -> Tensor | None:
        """[N, C] float32 to store after ranking, or None to leave the store as it is in this epoch."""
        return None


def required(part: Tensor | None) -> Tensor:
    """A part of the candidates that the strategy declared in ``needs``, and so is there."""
    assert part is not None, "the strategy uses a part of the candidates that its `needs` does not declare"
    return part


def clip_score(similarity: Tensor) -> Tensor:
    """CLIPScore, ``max(100 * cos, 0)`` in score points, [N] in 0..100 (Zhao et al., 2025, section 3)."""
    return (100 * similarity).clamp(min=0)
