"""Online sample selection: the strategies by name, and how a selector is put together.

A new strategy is a class in a small file of this package and one line in ``STRATEGIES``: the choices and help of
``--select-strategy``, the contract tests and the checkpoint's columns follow from it.
"""

from __future__ import annotations

from collections.abc import Callable

from dissect_clip.config import Config
from dissect_clip.dist import World
from dissect_clip.selection.base import Candidates, Needs, Selection, Strategy
from dissect_clip.selection.baselines import BigLoss, ClipScore, Random, SmallLoss
from dissect_clip.selection.differential import MomentumDifferential, WarmupDifferential
from dissect_clip.selection.selector import SampleLoss, Selector
from dissect_clip.selection.store import ScoreStore

__all__ = [
    "STRATEGIES", "Candidates", "Needs", "ScoreStore", "Selection", "Selector", "Strategy", "build_selector",
    "summaries",
]  # fmt: skip

STRATEGIES: dict[str, Callable[[Config], Strategy]] = {
    "small_loss": SmallLoss,
    "big_loss": BigLoss,
    "clipscore": ClipScore,
    "random": Random,
    "historical_base_sampling": MomentumDifferential,
    "warmup_base_sampling": WarmupDifferential,
}


def summaries() -> dict[str, str]:
    """Each strategy's name and its line for ``--help``."""
    return {name: (factory.__doc__ or "").strip().splitlines()[0] for name, factory in STRATEGIES.items()}


def build_selector(config: Config, num_samples: int, sample_loss: SampleLoss, world: World) -> Selector | None:
    """The selector that the settings ask for, with an empty store; None without ``--select``."""
    if not config.select:
        return None
    strategy = STRATEGIES[config.select_strategy](config)
    store = ScoreStore(num_samples, strategy.remembers, world)
    return Selector(strategy, store, sample_loss, world, config.seed, always_score=config.record)
