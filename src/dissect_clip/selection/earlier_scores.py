"""Scores that are used again: what is known of a sample from earlier steps, in a form that does not grow old.

Shapes: N pairs of this rank, F of them scored again, K kept, C columns of the strategy, R columns for the scores.

All scores drift while the model learns, so those taken at different times say little beside each other. Here each is
kept as a z-score: how many standard deviations the pair lies above the mismatched pairs of the same batch under the
same weights. The training pass gives it for the kept samples at no cost; only ``--score-refresh`` of the others, the
ones whose scores are the oldest, get a forward pass of their own.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from dissect_clip.errors import SetupError
from dissect_clip.selection.mixins import ReusesScores, with_survey
from dissect_clip.selection.strategy import REUSABLE, Candidates, Needs, Strategy, kept
from dissect_clip.selection.top_k import top_k

_WHEN = "last_batch"
_MEASURED = {"last_score": Needs.SCORE, "last_loss": Needs.LOSS}
"""Columns for what is measured of a pair, in this order, and who needs them."""


def _standardise(own: Tensor, others: Tensor, weight: Tensor, dim: tuple[int, ...]) -> Tensor:
    """``own`` in standard deviations above the mean of ``others``, both weighted over ``dim``."""
    count = weight.sum(dim, keepdim=True)
    mean = (others * weight).sum(dim, keepdim=True) / count
    deviation = ((others - mean).square() * weight).sum(dim, keepdim=True).div(count).sqrt()
    return (own - mean.flatten()) / deviation.flatten()


def pair_z(image: Tensor, text: Tensor, needs: Needs) -> Tensor:
    """Scores [N, R] of the pairs of ``image`` and ``text`` [N, D], unit norm: z-scores against the mismatched pairs.

    For ``SCORE`` the cosine is held against that of all mismatched pairs. For ``LOSS`` against those with the same
    image and those with the same text, and the mean of both is taken. In the InfoNCE of its row a mismatched pair in
    the place of the true one would change the cosine alone, so this is minus the z-score of the pair's loss.

    NaN for a pair whose features are not finite, which counts for no other; not finite for fewer than two pairs.
    """
    finite = (image.isfinite().all(dim=1) & text.isfinite().all(dim=1))[:, None]
    image, text = image.float().where(finite, 0), text.float().where(finite, 0)
    cosine = image @ text.T
    own = cosine.diagonal()
    weight = (finite & finite.T).float().fill_diagonal_(0)
    columns = []
    if Needs.SCORE in needs:
        columns.append(_standardise(own, cosine, weight, (0, 1)))
    if Needs.LOSS in needs:
        columns.append((_standardise(own, cosine, weight, (0,)) + _standardise(own, cosine, weight, (1,))) / 2)
    return torch.stack(columns, dim=1).where(finite, torch.nan)


@dataclass(frozen=True)
class EarlierScores:
    """What is known of samples before they are scored, as rows of the store. Picklable; a pure function of numbers.

    A row holds the strategy's own columns, then the last z-scores, then the batch of the run they were taken in.

    Raises:
        SetupError: if the strategy looks at more than scores.
    """

    strategy: Strategy
    refresh: float  # share of a batch that is scored again, below 1

    def __post_init__(self) -> None:
        if self.strategy.needs & ~REUSABLE:
            raise SetupError(
                f"--score-refresh {self.refresh:g} ranks by scores of earlier steps, but "
                "--select-strategy "
                f"{self.strategy.run.select_strategy} looks at more than scores, at features or at a reference model: "
                "leave "
                "--score-refresh and --select-preset out"
            )

    def with_survey(self, survey: Sequence[float]) -> EarlierScores:
        """The same with a strategy that has the numbers of a survey."""
        return replace(self, strategy=with_survey(self.strategy, survey)) if survey else self

    @property
    def measured(self) -> tuple[str, ...]:
        """Names of the R columns with scores."""
        return tuple(name for name, part in _MEASURED.items() if part in self.strategy.needs)

    @property
    def columns(self) -> tuple[str, ...]:
        """Names of all columns; without scores the strategy's own."""
        return (*self.strategy.remembers, *self.measured, *((_WHEN,) if self.measured else ()))

    def kept(self, epoch: int, size: int) -> int:
        """K, how many of ``size`` samples are trained on."""
        return kept(self.strategy.rate(epoch), size)

    def fresh(self, epoch: int, size: int) -> int:
        """F, how many of ``size`` samples get a forward pass: none where all are kept, all in the first epoch.

        Except for strategies that need no scores at first.
        """
        if not self.measured or self.kept(epoch, size) == size:
            return 0
        if epoch == 0 and not isinstance(self.strategy, ReusesScores):
            return size
        # A z-score needs another pair beside it, and that of a loss two: all are of one image, or of one caption.
        fewest = 3 if Needs.LOSS in self.strategy.needs else 2
        return min(size, max(fewest, round(self.refresh * size))) if self.refresh > 0 else 0

    def candidates(self, rows: Tensor, epoch: int, generator: torch.Generator) -> Candidates:
        """Samples by what their rows [N, C + R + 1] tell."""
        own = len(self.strategy.remembers)
        known = dict(zip(self.measured, rows[:, own:].unbind(dim=1), strict=False))
        loss = known.get("last_loss")
        return Candidates(
            epoch=epoch,
            generator=generator,
            memory=rows[:, :own],
            reused=known.get("last_score"),
            loss=None if loss is None else -loss,
        )

    def stalest(self, rows: Tensor, count: int, generator: torch.Generator) -> Tensor:
        """Places [count] of the samples whose scores are the oldest, rising; those never scored come first."""
        return top_k(-rows[:, -1].nan_to_num(-1), count, generator)

    def rank(self, candidates: Candidates) -> Tensor:
        """The strategy's rank [N]; samples that it cannot tell anything about are at the mean of the others."""
        rank = self.strategy.rank(candidates).float()
        known = rank.isfinite()
        mean = rank.where(known, 0).sum() / known.sum().clamp(min=1)
        return rank.where(known, mean)

    def updated(self, rows: Tensor, z: Tensor, step: int) -> Tensor:
        """Rows [N, C + R + 1] with the z-scores [N, R] of batch ``step``; rows whose z-scores are not finite stay."""
        own = rows.shape[1] - z.shape[1] - 1
        new = torch.cat([rows[:, :own], z, torch.full_like(rows[:, -1:], step)], dim=1)
        return new.where(z.isfinite().all(dim=1, keepdim=True), rows)
