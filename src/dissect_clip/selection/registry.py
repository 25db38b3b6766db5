"""The strategies by name.

A new strategy is a class in a small file of ``strategies`` and one line in ``STRATEGIES``: the choices and help of
``--select-strategy``, the contract tests and the checkpoint's columns follow from it.
"""

from __future__ import annotations

from collections.abc import Callable

from dissect_clip.config.settings import Config, parse_strategy
from dissect_clip.selection.strategies.baselines import BigLoss, ClipScore, Random, SmallLoss
from dissect_clip.selection.strategies.clean_posterior.strategy import CleanPosterior
from dissect_clip.selection.strategies.combination import Combination
from dissect_clip.selection.strategies.differential import MomentumDifferential, WarmupDifferential
from dissect_clip.selection.strategies.divbs import DivBS
from dissect_clip.selection.strategies.infobatch import InfoBatch
from dissect_clip.selection.strategies.learnability import Jest, Learnability
from dissect_clip.selection.strategies.negcliploss import NegCLIPLoss
from dissect_clip.selection.strategies.scan import Scan
from dissect_clip.selection.strategy import Strategy

STRATEGIES: dict[str, Callable[[Config], Strategy]] = {
    "small_loss": SmallLoss,
    "big_loss": BigLoss,
    "clipscore": ClipScore,
    "random": Random,
    "historical_base_sampling": MomentumDifferential,
    "warmup_base_sampling": WarmupDifferential,
    "divbs": DivBS,
    "learnability": Learnability,
    "jest": Jest,
    "negcliploss": NegCLIPLoss,
    "infobatch": InfoBatch,
    "scan": Scan,
    "clean_posterior": CleanPosterior,
}


def summaries() -> dict[str, str]:
    """Each strategy's name and its line for ``--help``."""
    return {name: (factory.__doc__ or "").strip().splitlines()[0] for name, factory in STRATEGIES.items()}


def build_strategy(config: Config) -> Strategy:
    """The strategy that ``--select-strategy`` names, or several as one.

    Raises:
        SetupError: if a strategy cannot be combined with others.
        ValueError: if there is no strategy of such a name.
    """
    members = parse_strategy(config.selection.select_strategy)
    unknown = [name for name in members if name not in STRATEGIES]
    if unknown:
        raise ValueError(f"there is no strategy {unknown[0]!r}: choose from {', '.join(STRATEGIES)}")
    if len(members) == 1:
        return STRATEGIES[config.selection.select_strategy](config)
    return Combination(config, {name: (STRATEGIES[name](config), weight) for name, weight in members.items()})
