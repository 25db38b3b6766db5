"""The choice before loading: loader workers are told which samples of a batch are worth decoding.

Shapes: N samples that a worker has read but not decoded, M to decode, C columns of the store.

Within an epoch every sample comes once, so what is known of it does not change between the start of the epoch and its
own turn: a copy of the store made at the start serves all workers, and the choice does not depend on how far ahead they
work.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from dissect_clip.selection.earlier_scores import EarlierScores
from dissect_clip.selection.mixins import survey_names


@dataclass(frozen=True, slots=True)
class LoadOrder:
    """What to decode of N samples."""

    order: Tensor  # [N] int64, places: first those to score anew, then the others, the best first
    count: int  # M, how many of them are wanted


class Preselector:
    """Chooses by the store's rows as they were at the start of the epoch, in memory that all workers share. Picklable.

    4 bytes a sample and column in main memory, once for each rank.
    """

    def __init__(self, earlier: EarlierScores, num_samples: int) -> None:
        self.earlier = earlier
        self.rows = torch.full((num_samples, len(earlier.columns)), torch.nan)
        self.survey = torch.zeros(len(survey_names(earlier.strategy)), dtype=torch.float64)
        for shared in (self.rows, self.survey):
            shared.share_memory_()  # type: ignore[no-untyped-call]

    def publish(self, scores: Tensor, survey: Sequence[float] = ()) -> None:
        """Take the store's rows and the strategy's survey of them over, before the workers begin an epoch.

        Waits for the device.
        """
        self.rows.copy_(scores)
        self.survey.copy_(torch.tensor(survey, dtype=torch.float64))

    def __call__(self, ids: Tensor, once: Tensor, epoch: int, seed: int) -> LoadOrder:
        """What to decode of the samples ``ids`` [N]; only where ``once`` [N] bool is True are their rows looked at.

        The others are there twice in this epoch: by now they may be known better, or not yet, depending on how far
        ahead this worker is and on where a run was stopped and went on. They count as samples that nothing is known
        about.
        """
        size = len(ids)
        earlier = self.earlier.with_survey(self.survey.tolist())
        generator = torch.Generator().manual_seed(seed)
        rows = self.rows[ids].where(once[:, None], torch.nan)
        fresh = earlier.fresh(epoch, size)
        count = min(size, fresh + earlier.kept(epoch, size))
        if count == size:
            return LoadOrder(torch.arange(size), count)
        candidates = earlier.candidates(rows, epoch, generator)
        rank = earlier.rank(candidates)
        to_score = earlier.stalest(rows, fresh, generator) if fresh > 0 else ids[:0]
        rank[to_score] = torch.inf  # they stand ahead, and top_k would take what is not finite last
        shuffled = torch.randperm(size, generator=generator)
        order = shuffled[rank[shuffled].argsort(descending=True, stable=True)]
        return LoadOrder(order, count)
