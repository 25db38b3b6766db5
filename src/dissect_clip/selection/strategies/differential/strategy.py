"""DISSect: rank by the differential, what a pair's CLIPScore was earlier minus what it is now.

Zhao et al., "Differential-informed Sample Selection Accelerates Multimodal Contrastive Learning", ICCV 2025. Pairs
that fit are learned early and score a little lower later (differential above 0); mismatched pairs score low early and
are memorised late (below 0). Keep the largest.
"""

from __future__ import annotations

import torch
from torch import Tensor

from dissect_clip.selection.mixins import WarmsUp
from dissect_clip.selection.strategies.differential.options import MomentumOptions
from dissect_clip.selection.strategies.options import DifferentialOptions
from dissect_clip.selection.strategy import Candidates, Needs, Strategy, required


def differential(history: Tensor, current: Tensor) -> Tensor:
    """``c_hist - c_curr`` [N] in score points; a sample without history (NaN) gets the mean of those that have one.

    Where no sample has a history all are 0, that is, tied.
    """
    delta = history - current
    return torch.where(delta.isnan(), delta.nanmean().nan_to_num(), delta)


class WarmupDifferential(WarmsUp):
    """DISSect-Warmup: uniform for --warmup-point epochs, then the largest differential from their last scores"""

    Options = DifferentialOptions
    needs = Needs.SCORE
    remembers = ("clip_score",)

    def rank(self, candidates: Candidates) -> Tensor:
        current = required(candidates.score)
        if self.warms_up(candidates.epoch):
            return torch.zeros_like(current)
        return differential(candidates.memory[:, 0], current)

    def remember(self, candidates: Candidates) -> Tensor | None:
        if not self.warms_up(candidates.epoch):
            return None
        return required(candidates.score)[:, None]


class MomentumDifferential(Strategy):
    """DISSect-Momentum: the largest differential from a moving average of each sample's scores"""

    Options = MomentumOptions
    options: MomentumOptions
    needs = Needs.SCORE
    remembers = ("clip_score",)

    def rank(self, candidates: Candidates) -> Tensor:
        return differential(candidates.memory[:, 0], required(candidates.score))

    def remember(self, candidates: Candidates) -> Tensor:
        current, history = required(candidates.score), candidates.memory[:, 0]
        average = torch.lerp(current, history, self.options.select_momentum)
        return torch.where(history.isnan(), current, average)[:, None]
