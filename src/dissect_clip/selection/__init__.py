"""Online sample selection: the strategies by name, and how a selector is put together.

A new strategy is a class in a small file of this package and one line in ``STRATEGIES``: the choices and help of
``--select-strategy``, the contract tests and the checkpoint's columns follow from it.
"""

from __future__ import annotations

from collections.abc import Callable

from dissect_clip.config import Config
from dissect_clip.dist import World
from dissect_clip.errors import SetupError
from dissect_clip.selection.base import REUSABLE, Candidates, Needs, Selection, Strategy
from dissect_clip.selection.baselines import BigLoss, ClipScore, Random, SmallLoss
from dissect_clip.selection.chooser import Chooser
from dissect_clip.selection.differential import MomentumDifferential, WarmupDifferential
from dissect_clip.selection.divbs import DivBS
from dissect_clip.selection.learnability import Jest, Learnability
from dissect_clip.selection.negcliploss import NegCLIPLoss
from dissect_clip.selection.reuse import Known, ReusingSelector
from dissect_clip.selection.selector import SampleLoss, Selector
from dissect_clip.selection.store import ScoreStore

__all__ = [
    "STRATEGIES", "Candidates", "Chooser", "Needs", "ScoreStore", "Selection", "Selector", "Strategy", "build_chooser",
    "build_selector", "summaries",
]  # fmt: skip

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
}


def summaries() -> dict[str, str]:
    """Each strategy's name and its line for ``--help``."""
    return {name: (factory.__doc__ or "").strip().splitlines()[0] for name, factory in STRATEGIES.items()}


def build_selector(config: Config, num_samples: int, sample_loss: SampleLoss, world: World) -> Selector | None:
    """The selector that the settings ask for, with an empty store; None without ``--select``.

    Raises:
        SetupError: if the strategy cannot do with scores of earlier steps, or before loading, where it is asked to.
    """
    if not config.select:
        return None
    strategy = STRATEGIES[config.select_strategy](config)
    if config.select_before_load and strategy.needs & ~REUSABLE:
        raise SetupError(
            f"--select-before-load chooses before samples are decoded, but --select-strategy {config.select_strategy} "
            "looks at their features or at a reference model: leave it out, with --score-refresh and --select-preset"
        )
    if strategy.needs is Needs.NOTHING or config.score_refresh in (None, 1):
        store = ScoreStore(num_samples, strategy.remembers, world)
        return Selector(
            strategy, store, sample_loss, world, config.seed, config.record, keep_locked=config.score_keep_locked
        )
    assert config.score_refresh is not None
    known = Known(strategy, config.score_refresh)
    return ReusingSelector(known, ScoreStore(num_samples, known.columns, world), sample_loss, world, config.seed)


def build_chooser(config: Config, selector: Selector | None) -> Chooser | None:
    """What tells the loader which samples to decode; None without ``--select-before-load``.

    Raises:
        SetupError: if every sample is to be scored, and so has to be loaded.
    """
    if selector is None or not config.select_before_load:
        return None
    if isinstance(selector, ReusingSelector):
        return Chooser(selector.known, len(selector.store.scores))
    if selector.strategy.needs is Needs.NOTHING:
        return Chooser(Known(selector.strategy, 0.0), len(selector.store.scores))
    raise SetupError(
        f"--select-before-load does not load what it does not choose, but --select-strategy {config.select_strategy} "
        "scores every sample: add --score-refresh 0, or a small share such as 0.1"
    )
