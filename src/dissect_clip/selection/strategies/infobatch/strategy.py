"""InfoBatch: leave out a random part of what is learned already, and weight the rest so that the gradient stays.

Qin et al., "InfoBatch: Lossless Training Speed Up by Unbiased Dynamic Data Pruning", ICLR 2024. A sample whose loss was
below the mean, when it was last trained on, is left out with probability r; those that stay are weighted with
1 / (1 - r). The last epochs train on everything.

Shapes: N pairs of this rank, K kept, A of the N at or above the mean or never seen, B = N - A below it; a of the A and
b of the B are kept.

Here K is fixed: a + b = K. Within a batch both parts are drawn uniformly, so that given the batch a sample's chance to
be kept is exactly a / A or b / B. Its weight is the inverse of it times K / N: the weights of a batch have the mean 1,
and the expectation of the weighted mean over the K is the mean over the N. (The paper leaves K / N out. There an epoch
gets shorter, and the larger steps make up for it; here an epoch has as many steps as ever.) This holds for losses that
do not depend on what else is chosen. InfoNCE's do, by their negatives.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence

import torch
from torch import Tensor

from dissect_clip.config.run_plan import RunPlan
from dissect_clip.seeding import Stream, derive_seed
from dissect_clip.selection.mixins import LearnsFromTraining, SurveysAll, WeightsSamples
from dissect_clip.selection.schedule import select_rate
from dissect_clip.selection.strategies.infobatch.options import FULL_LAST, InfoBatchOptions
from dissect_clip.selection.strategy import Candidates, kept, required

PRUNE_RATIO = 0.5
"""The paper's r: how much seldomer than another a sample below the mean is kept, at most."""


def share_below(above: Tensor, below: Tensor, k: int, ratio: float) -> Tensor:
    """b, how many of ``k`` kept samples are to be of those ``below``; scalars, int64. No device sync.

    What ``k`` leaves room for beside all ``above``, as in the paper. Where that is less than a chance of
    ``1 - ratio`` times that of the others, all are thinned out by the same factor, with this ratio between them: else
    samples above the mean could fill the batch, and those below would be in no expectation. Each part that has samples
    has a chance, if ``k`` is at least 2.
    """
    wanted = (k * (1 - ratio) * below / ((1 - ratio) * below + above)).round().long()
    wanted = torch.minimum(wanted.clamp(min=1), (k - above.clamp(max=1)).clamp(min=0))
    return torch.minimum(torch.maximum(wanted, k - above), below)


class InfoBatch(LearnsFromTraining, WeightsSamples, SurveysAll):
    """InfoBatch: a random part of what had a loss below the mean, weighted for the rest; without a scoring pass"""

    Options = InfoBatchOptions
    options: InfoBatchOptions
    remembers = ("loss",)
    survey_names = ("mean", "below")

    def __init__(self, options: InfoBatchOptions, run: RunPlan) -> None:
        super().__init__(options, run)
        self.mean = 0.0  # of all remembered losses, in nats, when the epoch began; no loss is below 0
        self.below = 0.0  # share of them that are below it
        ratio = options.infobatch_prune_ratio
        self.ratio = PRUNE_RATIO if ratio is None else ratio

    @property
    def weights_losses(self) -> bool:
        return self.options.select_rescale == "on"

    def _is_full(self, epoch: int) -> bool:
        return epoch >= self.run.epochs - self.run.full_epochs(FULL_LAST)

    def rate(self, epoch: int) -> float:
        if self.options.infobatch_prune_ratio is None:
            return select_rate(self.run, epoch, full_last=FULL_LAST)
        return 1.0 if self._is_full(epoch) else 1 - self.ratio * self.below

    @property
    def rate_summary(self) -> str:
        if self.options.infobatch_prune_ratio is None:
            return super().rate_summary
        return f"all but {self.ratio:g} of what is below the mean loss"

    def may_select(self, epoch: int) -> bool:
        return self.rate(epoch) < 1 if self.options.infobatch_prune_ratio is None else not self._is_full(epoch)

    def survey(self, memory: Tensor, epoch: int) -> Sequence[float]:
        loss = memory[:, 0]
        mean = loss.nanmean().nan_to_num(0)
        # Of those with a loss: samples that never come, as those that --train-keep leaves out, are in no batch.
        numbers: list[float] = torch.stack([mean, (loss < mean).sum() / (~loss.isnan()).sum().clamp(min=1)]).tolist()
        return numbers

    def with_survey(self, survey: Sequence[float]) -> InfoBatch:
        changed = copy.copy(self)
        changed.mean, changed.below = survey
        return changed

    def _parts(self, candidates: Candidates, k: int) -> tuple[Tensor, Tensor, Tensor]:
        """Whether each sample is below the mean, [N] bool; [2] how many are not and are, and how many of each stay."""
        below = candidates.memory[:, 0] < self.mean  # False for NaN
        if k == 1:  # no room for both parts: all are one
            below = torch.zeros_like(below)
        size = torch.stack([(~below).sum(), below.sum()])
        of_below = share_below(size[0], size[1], k, self.ratio)
        return below, size, torch.stack([k - of_below, of_below])

    def rank(self, candidates: Candidates) -> Tensor:
        """1 for the samples that are drawn, 0 for the others."""
        total = len(candidates.memory)
        below, _, stay = self._parts(candidates, kept(self.rate(candidates.epoch), total))
        # A stream of its own, from the seed alone: drawing moves no state, so that the rank is a function.
        generator = torch.Generator(below.device)
        generator.manual_seed(derive_seed(candidates.generator.initial_seed(), Stream.SELECT))
        drawn = torch.randperm(total, generator=generator, device=below.device)
        place = torch.where(below[drawn], below[drawn].cumsum(0), (~below[drawn]).cumsum(0))  # 1 is first of its part
        rank = torch.empty(total, device=below.device)
        rank[drawn] = (place <= stay[below[drawn].long()]).float()
        return rank

    def weights(self, candidates: Candidates, index: Tensor) -> Tensor | None:
        if not self.weights_losses:
            return None
        below, size, stay = self._parts(candidates, len(index))
        part = below[index].long()
        return size[part] / stay[part] * (len(index) / len(below))

    def remember(self, candidates: Candidates) -> Tensor:
        return required(candidates.loss)[:, None]
