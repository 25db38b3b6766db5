"""What a strategy is: a pure function from what is known about a batch to an order of its samples.

Shapes: N pairs of this rank, K kept, C columns that the strategy remembers, D features, R of the reference model.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from enum import Flag, auto
from typing import TypeVar

import torch
from torch import Tensor

from dissect_clip.config.settings import Config
from dissect_clip.selection.schedule import select_rate

T = TypeVar("T")


class Needs(Flag):
    """What a strategy looks at, and so what the scoring pass computes. NOTHING means there is no scoring pass.

    SCORE is how well a pair matches, and may come from an earlier step where the run says so; SIMILARITY is the cosine
    of this step. REFERENCE is the same of a second, frozen model: its loss with LOSS, its features with FEATURES.
    CLIPSCORE is CLIPScore as it was at an earlier step, where scores are used again.
    """

    NOTHING = 0
    SIMILARITY = auto()
    LOSS = auto()
    FEATURES = auto()
    SCORE = auto()
    REFERENCE = auto()
    CLIPSCORE = auto()


REUSABLE = Needs.SCORE | Needs.LOSS | Needs.CLIPSCORE
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
    last_clip_score: Tensor | None = None  # [N] float32, 0 to 100, when last computed; NaN = never
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

    A strategy is pure: no model, no file, no collective, no state that changes. Its first docstring line is its line
    in ``--help``.
    """

    needs: Needs = Needs.NOTHING
    remembers: tuple[str, ...] = ()

    learns: bool = False
    """Whether ``remember`` is asked about the training pass, with the losses of the samples that it took."""

    full_last: float = 0.0
    """The default of --select-full-last."""

    surveys: tuple[str, ...] = ()
    """Names of the numbers that :meth:`survey` gives."""

    reports: tuple[str, ...] = ()
    """Names of the P columns of the record that :meth:`report` gives."""

    file: str = ""
    """Name of the file of the run folder that :meth:`verdict` goes into at the end, a Parquet file; none without."""

    reuses: bool = False
    """Whether it goes by scores of earlier steps whatever ``--score-refresh`` is, and can do without any at first."""

    decoy_ids: Tensor | None = None
    """[P] int64, rising: the samples with wrong captions, as the run has drawn them."""

    def __init__(self, config: Config) -> None:
        self.config = config

    @property
    def decoys(self) -> float:
        """The share of the samples that get a wrong caption on purpose; see its ``decoys`` module."""
        return 0.0

    def has_decoys(self, epoch: int) -> bool:
        """Whether these samples have their wrong captions in this epoch (0-based)."""
        return False

    @property
    def depends_on(self) -> str:
        """Flags, with their values, without which what is remembered means something else; empty without any."""
        return ""

    @property
    def survey_of(self) -> str:
        """Flags, with their values, that say what the numbers of :meth:`survey` mean; empty without any."""
        return ""

    @property
    def weighs(self) -> bool:
        """Whether ``weights`` may give any."""
        return False

    def learns_in(self, epoch: int) -> bool:
        """Whether it wants the losses of the training pass in this epoch, if it learns at all."""
        return True

    @property
    def first_epoch(self) -> int:
        """The first epoch in which --select-rate and its schedule count, after a warm-up."""
        return 0

    @property
    def full_share(self) -> float:
        """The share of the epochs, the last ones, that train on everything."""
        chosen = self.config.selection.select_full_last
        return self.full_last if chosen is None else chosen

    def rate(self, epoch: int) -> float:
        """The share of every batch kept in this epoch (0-based), in (0, 1]."""
        return select_rate(self.config, epoch, self.first_epoch, self.full_share)

    @property
    def keeping(self) -> str:
        """The share of every batch that is kept over the epochs, for the log."""
        rates = sorted({self.rate(epoch) for epoch in range(self.config.training.epochs)})
        return " to ".join(f"{rate:g}" for rate in rates if rate in (rates[0], rates[-1])) or "nothing"

    def may_select(self, epoch: int) -> bool:
        """Whether this epoch may leave samples out, as far as that is known before it."""
        return self.rate(epoch) < 1

    def looks_at(self, epoch: int) -> Needs:
        """The part of ``needs`` that is used in this epoch (0-based)."""
        return self.needs

    def rank(self, candidates: Candidates) -> Tensor:
        """[N] float, the largest are trained on. Ties are broken at random, NaN is chosen last."""
        raise NotImplementedError

    def remember(self, candidates: Candidates) -> Tensor | None:
        """[N, C] float32 to store after ranking, or None to leave the store as it is in this epoch."""
        return None

    def weights(self, candidates: Candidates, index: Tensor) -> Tensor | None:
        """[K] float32, what the losses of the samples at ``index`` [K] are multiplied by; None where all are 1.

        Of the samples that ``rank`` has chosen; not asked where all are kept.
        """
        return None

    def survey(self, memory: Tensor, epoch: int) -> Sequence[float]:
        """S numbers that hold for the whole store [num_samples, C], taken on rank 0 before an epoch."""
        raise NotImplementedError

    def informed(self, survey: Sequence[float]) -> Strategy:
        """This strategy, as it is once it knows the numbers of :meth:`survey`."""
        return self

    @property
    def finding(self) -> str:
        """What the last survey has found, for the log; empty where there is nothing to say."""
        return ""

    def report(self, candidates: Candidates) -> Tensor:
        """[N, P] float32 for the record, by the same candidates that ``rank`` sees; NaN where there is nothing."""
        raise NotImplementedError

    def verdict(self, memory: Tensor, ids: Tensor, num_samples: int, epoch: int) -> Mapping[str, Tensor]:
        """Columns by name [M] of ``file``, by the rows ``memory`` [M, C] of the samples ``ids`` [M], before an epoch.

        NaN where there is nothing. Whole numbers where the name ends in ``visits`` or ``epoch``, truth values where it
        begins with ``is_``.
        """
        raise NotImplementedError


class WarmingUp(Strategy):
    """Base of the strategies that sample uniformly, at a rate of its own, for ``--warmup-point`` epochs."""

    @property
    def first_epoch(self) -> int:
        return self.config.selection.warmup_epochs

    def warms_up(self, epoch: int) -> bool:
        """Whether this epoch (0-based) is one of those."""
        return epoch < self.first_epoch

    def rate(self, epoch: int) -> float:
        warmup_rate = self.config.selection.warmup_select_rate
        return warmup_rate if self.warms_up(epoch) and warmup_rate is not None else super().rate(epoch)


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
