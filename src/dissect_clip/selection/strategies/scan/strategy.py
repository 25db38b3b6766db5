"""SCAN: in cycles, leave out more and more of what has the smallest and what has the largest losses.

Guo and Kankanhalli, "SCAN: Bootstrapping Contrastive Pre-training for Data Efficiency", arXiv 2411.09126. After a
warm-up on everything come cycles of 1 + T epochs. The first, the *preparation*, trains on everything and takes the
losses of this training pass: in every batch the samples with the smallest losses are candidates as *redundant*, those
with the largest as *ill-matched*. In epoch t = 1 .. T after it, the *mutation*, a share of
``(1 + cos(pi (T - t) / T)) / 2`` of the candidates, drawn anew, is left out: with T = 3 a quarter, three quarters, all.

Read here as follows.

- The candidates are 1 - ``--select-rate`` of the data, ``--scan-redundant`` of them redundant. The paper has 0.3 of
  each kind, as ``--select-rate 0.4``.
- The warm-up has a fixed length. The paper's ends once the mean loss falls by less than a threshold, after two epochs
  at the earliest.
- A sample's loss is the symmetric one. The paper takes the candidates that the image's and the caption's loss agree
  on, and fills up at random.
- What is remembered is the loss's place among those of its batch and GPU, which does not grow old while the model
  learns within the epoch. Candidates are found by it in the batch that is chosen from, so that K is the same in every
  batch.

Shapes: N pairs of this rank, K kept.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from dissect_clip.selection.mixins import LearnsFromTraining
from dissect_clip.selection.schedule import select_rate
from dissect_clip.selection.strategies.scan.options import ScanOptions
from dissect_clip.selection.strategy import Candidates, kept, required


def places(values: Tensor) -> Tensor:
    """The place of each of ``values`` [N] among all, [N] float32: 0 for the smallest, 1 for the largest."""
    return values.argsort(stable=True).argsort().float() / max(1, len(values) - 1)


class Scan(LearnsFromTraining):
    """SCAN: in cycles, ever less of what had the smallest or largest losses in its batch; without a scoring pass"""

    Options = ScanOptions
    options: ScanOptions
    remembers = ("loss_place",)

    def _scheduled_rate(self, epoch: int) -> float:
        """The share of every batch that is kept when all candidates are left out."""
        return select_rate(self.run, epoch, first=self.options.scan_warmup)

    def _share(self, epoch: int) -> float:
        """The share of the candidates that this epoch leaves out."""
        if epoch < self.options.scan_warmup:
            return 0.0
        period = self.options.scan_period
        place = (epoch - self.options.scan_warmup) % (period + 1)
        return (1 + math.cos(math.pi * (period - place) / period)) / 2 if place > 0 else 0.0

    def rate(self, epoch: int) -> float:
        share = self._share(epoch)
        return 1 - share + share * self._scheduled_rate(epoch)

    def learns_in(self, epoch: int) -> bool:
        """In preparations, while every sample is trained on."""
        return epoch >= self.options.scan_warmup and self._share(epoch) == 0

    def rank(self, candidates: Candidates) -> Tensor:
        """0 for candidates, 1 for the others; so it is drawn among the candidates which of them are left out."""
        place = candidates.memory[:, 0]
        total = len(place)
        count = total - kept(self._scheduled_rate(candidates.epoch), total)
        redundant = round(self.options.scan_redundant * count)
        order = place.nan_to_num(0.5).argsort(stable=True)
        rank = torch.ones(total, device=place.device)
        rank.index_fill_(0, order[:redundant], 0)
        rank.index_fill_(0, order[total - (count - redundant) :], 0)
        return rank.where(place.isfinite(), 1)  # nothing speaks against what was never seen

    def remember(self, candidates: Candidates) -> Tensor:
        return places(required(candidates.loss))[:, None]
