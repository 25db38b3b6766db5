"""Several strategies as one: the weighted sum of their ranks.

Shapes: N pairs of this rank, C columns of all strategies, side by side.
"""

from __future__ import annotations

import dataclasses
import functools
import operator
from collections.abc import Mapping

import torch
from torch import Tensor

from dissect_clip.config.settings import Config
from dissect_clip.errors import SetupError
from dissect_clip.selection.strategy import Candidates, Needs, Strategy


def positions(rank: Tensor) -> Tensor:
    """Where each of ``rank`` [N] stands among all: [N] float32, 0 for the smallest, 1 for the largest.

    Those that are tied share the mean of their places, and NaN stands in the middle; so a rank that says nothing adds
    the same to all.
    """
    rank = torch.where(rank.isnan(), rank.nanmedian().nan_to_num(), rank).float()
    ordered = rank.sort().values
    first = torch.searchsorted(ordered, rank)
    last = torch.searchsorted(ordered, rank, right=True) - 1
    return (first + last) / (2 * max(1, len(rank) - 1))


class Combination(Strategy):
    """the weighted sum of the ranks of several strategies, each from 0 to 1

    The rate is that of the first strategy.

    Args:
        members: the strategies by name, each with its weight above 0.

    Raises:
        SetupError: if a strategy weights samples or learns from the training pass by itself: its choice is a plan of
            its own.
    """

    def __init__(self, config: Config, members: Mapping[str, tuple[Strategy, float]]) -> None:
        super().__init__(config)
        for name, (strategy, _) in members.items():
            if strategy.learns or strategy.weighs or strategy.reuses:
                raise SetupError(
                    f"--select-strategy {config.selection.select_strategy}: {name} cannot be combined with others"
                )
        self.members = [strategy for strategy, _ in members.values()]
        self.shares = [weight for _, weight in members.values()]
        self.needs = functools.reduce(operator.or_, (strategy.needs for strategy in self.members), Needs.NOTHING)
        self.remembers = tuple(
            f"{name}_{column}" for name, (strategy, _) in members.items() for column in strategy.remembers
        )

    def rate(self, epoch: int) -> float:
        return self.members[0].rate(epoch)

    def looks_at(self, epoch: int) -> Needs:
        return functools.reduce(operator.or_, (strategy.looks_at(epoch) for strategy in self.members), Needs.NOTHING)

    def _views(self, candidates: Candidates) -> list[Candidates]:
        """The candidates as each strategy is to see them, with its own columns."""
        parts = candidates.memory.split([len(strategy.remembers) for strategy in self.members], dim=1)  # type: ignore[no-untyped-call]
        return [dataclasses.replace(candidates, memory=memory) for memory in parts]

    def rank(self, candidates: Candidates) -> Tensor:
        views = zip(self.members, self.shares, self._views(candidates), strict=True)
        return torch.stack([weight * positions(member.rank(view)) for member, weight, view in views]).sum(dim=0)

    def remember(self, candidates: Candidates) -> Tensor | None:
        """The columns of those that do not remember in this epoch stay as they are."""
        views = self._views(candidates)
        values = [member.remember(view) for member, view in zip(self.members, views, strict=True)]
        if all(value is None for value in values):
            return None
        return torch.cat(
            [view.memory if value is None else value for value, view in zip(values, views, strict=True)], dim=1
        )
