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

from dissect_clip.config.options import StrategyOptions
from dissect_clip.config.run_plan import RunPlan
from dissect_clip.errors import SetupError
from dissect_clip.selection.mixins import (
    LearnsFromTraining,
    ReusesScores,
    SurveysAll,
    UsesDecoys,
    UsesReference,
    VariesNeeds,
    WeightsSamples,
    needs_in,
)
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


OWN_PLAN = (LearnsFromTraining, WeightsSamples, SurveysAll, UsesDecoys, ReusesScores)
"""Mixins of strategies whose choice is a plan, which the sum of ranks would break."""


class Combination(VariesNeeds):
    """the weighted sum of the ranks of several strategies, each from 0 to 1

    The rate is that of the first strategy.

    Args:
        members: the strategies by name, each with its weight above 0.

    Raises:
        SetupError: if a strategy's choice is a plan for the whole run, as it has one of the mixins ``OWN_PLAN``.
    """

    def __init__(self, run: RunPlan, members: Mapping[str, tuple[Strategy, float]]) -> None:
        super().__init__(StrategyOptions(), run)
        for name, (strategy, _) in members.items():
            if isinstance(strategy, OWN_PLAN):
                raise SetupError(f"--select-strategy {run.select_strategy}: {name} cannot be combined with others")
        self.members = [strategy for strategy, _ in members.values()]
        self.shares = [weight for _, weight in members.values()]
        self.needs = functools.reduce(operator.or_, (strategy.needs for strategy in self.members), Needs.NOTHING)
        self.remembers = tuple(
            f"{name}_{column}" for name, (strategy, _) in members.items() for column in strategy.remembers
        )

    def rate(self, epoch: int) -> float:
        return self.members[0].rate(epoch)

    def needs_in(self, epoch: int) -> Needs:
        return functools.reduce(operator.or_, (needs_in(strategy, epoch) for strategy in self.members), Needs.NOTHING)

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


def reference_user(strategy: Strategy) -> UsesReference | None:
    """The strategy itself, or the first of a combination, that compares with a reference model; None without any."""
    members = strategy.members if isinstance(strategy, Combination) else [strategy]
    return next((member for member in members if isinstance(member, UsesReference)), None)
