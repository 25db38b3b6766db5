"""Online sample selection: the strategies by name, and how a selector is put together.

A new strategy is a class in a small file of this package and one line in ``STRATEGIES``: the choices and help of
``--select-strategy``, the contract tests and the checkpoint's columns follow from it.
"""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor

from dissect_clip.config.settings import Config, parse_strategy
from dissect_clip.distributed.world import World
from dissect_clip.errors import SetupError
from dissect_clip.selection.chooser import Chooser
from dissect_clip.selection.reuse import Known, ReusingSelector
from dissect_clip.selection.selector import SampleLoss, Selector
from dissect_clip.selection.store import ScoreStore
from dissect_clip.selection.strategies.baselines import BigLoss, ClipScore, Random, SmallLoss
from dissect_clip.selection.strategies.clean_posterior.decoys import Decoys, decoy_ids
from dissect_clip.selection.strategies.clean_posterior.strategy import CleanPosterior
from dissect_clip.selection.strategies.combination import Combination
from dissect_clip.selection.strategies.differential import MomentumDifferential, WarmupDifferential
from dissect_clip.selection.strategies.divbs import DivBS
from dissect_clip.selection.strategies.infobatch import InfoBatch
from dissect_clip.selection.strategies.learnability import Jest, Learnability
from dissect_clip.selection.strategies.negcliploss import NegCLIPLoss
from dissect_clip.selection.strategies.scan import Scan
from dissect_clip.selection.strategy import REUSABLE, Candidates, Needs, Selection, Strategy

__all__ = [
    "STRATEGIES", "Candidates", "Chooser", "Decoys", "Needs", "ScoreStore", "Selection", "Selector", "Strategy",
    "build_chooser", "build_decoys", "build_selector", "build_strategy", "summaries",
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
    """
    members = parse_strategy(config.selection.select_strategy)
    if len(members) == 1:
        return STRATEGIES[config.selection.select_strategy](config)
    return Combination(config, {name: (STRATEGIES[name](config), weight) for name, weight in members.items()})


def _check_loss(config: Config, strategy: Strategy) -> None:
    """Raises SetupError if the strategy weights samples, and the loss of the run cannot be weighted."""
    for kind, is_used in (
        ("a CoCa model", "coca" in config.model.model.lower()),
        ("--distill-model", config.model.distill),
    ):
        if strategy.weighs and is_used:
            raise SetupError(
                f"--select-strategy {config.selection.select_strategy} weights the contrastive loss of each pair, "
                "which does not "
                f"go with the other losses of {kind}: choose another strategy, or give --select-rescale off"
            )


def build_selector(config: Config, num_samples: int, sample_loss: SampleLoss, world: World) -> Selector | None:
    """The selector that the settings ask for, with an empty store; None without ``--select``.

    Raises:
        SetupError: if the strategy cannot do with scores of earlier steps, or before loading, where it is asked to, or
            with the loss of the run, or in a combination.
    """
    if not config.selection.select:
        return None
    strategy = build_strategy(config)
    _check_loss(config, strategy)
    if config.selection.select_before_load and strategy.needs & ~REUSABLE:
        raise SetupError(
            "--select-before-load chooses before samples are decoded, but --select-strategy "
            f"{config.selection.select_strategy} "
            "looks at their features or at a reference model: leave it out, with --score-refresh and --select-preset"
        )
    if strategy.needs is Needs.NOTHING or (config.selection.score_refresh in (None, 1) and not strategy.reuses):
        store = ScoreStore(num_samples, strategy.remembers, world)
        return Selector(
            strategy,
            store,
            sample_loss,
            world,
            config.training.seed,
            config.selection.record,
            keep_locked=config.selection.score_keep_locked,
            keep_others=config.selection.select_negatives == "all",
        )
    known = Known(strategy, 1.0 if config.selection.score_refresh is None else config.selection.score_refresh)
    return ReusingSelector(
        known, ScoreStore(num_samples, known.columns, world), sample_loss, world, config.training.seed
    )


def build_chooser(config: Config, selector: Selector | None) -> Chooser | None:
    """What tells the loader which samples to decode; None without ``--select-before-load``.

    Raises:
        SetupError: if every sample is to be scored, and so has to be loaded, or all are needed to weight some.
    """
    if selector is None or not config.selection.select_before_load:
        return None
    strategy = selector.strategy
    if strategy.weighs:
        raise SetupError(
            f"--select-before-load, also as a part of --select-preset fast, does not go with --select-strategy "
            f"{config.selection.select_strategy}, which weighs what it keeps against what it leaves out: leave it "
            "out, or give "
            "--select-rescale off"
        )
    if isinstance(selector, ReusingSelector):
        return Chooser(selector.known, len(selector.store.scores))
    if selector.strategy.needs is Needs.NOTHING:
        return Chooser(Known(selector.strategy, 0.0), len(selector.store.scores))
    raise SetupError(
        "--select-before-load does not load what it does not choose, but --select-strategy "
        f"{config.selection.select_strategy} "
        "scores every sample: add --score-refresh 0, or a small share such as 0.1"
    )


def build_decoys(
    config: Config, selector: Selector, world: World, subset_size: int, subset_ids: Callable[[Tensor], Tensor]
) -> Decoys | None:
    """The decoys that the strategy asks for, none of them with a caption yet; None without any.

    They are drawn among the ``subset_size`` samples that are trained on,
    whose ids [n] ``subset_ids`` gives by numbers [n].
    """
    strategy = selector.strategy
    if strategy.decoys == 0:
        return None
    strategy.decoy_ids = subset_ids(decoy_ids(subset_size, strategy.decoys, config.training.seed))
    return Decoys(strategy.decoy_ids, world) if len(strategy.decoy_ids) > 0 else None
