"""The baselines of the paper: a uniform choice, and thresholds on the current loss or score."""

from __future__ import annotations

from torch import Tensor

from dissect_clip.selection.strategy import Candidates, Needs, Strategy, required


class Random(Strategy):
    """a uniform choice, without a scoring pass"""

    def rank(self, candidates: Candidates) -> Tensor:
        return candidates.memory.new_zeros(len(candidates.memory))  # all tied, and ties are broken at random


class SmallLoss(Strategy):
    """smallest contrastive loss: pairs the model finds easy"""

    needs = Needs.LOSS

    def rank(self, candidates: Candidates) -> Tensor:
        return -required(candidates.loss)


class BigLoss(Strategy):
    """largest contrastive loss: pairs the model finds hard"""

    needs = Needs.LOSS

    def rank(self, candidates: Candidates) -> Tensor:
        return required(candidates.loss)


class ClipScore(Strategy):
    """largest CLIPScore under the current model"""

    needs = Needs.SCORE

    def rank(self, candidates: Candidates) -> Tensor:
        return required(candidates.score)
