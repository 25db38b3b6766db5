"""The strategies by name. Imports no torch: a strategy's module is imported when a run selects it.

A new strategy is one file or folder under ``strategies`` and one line here. Its flags, their ranges and their help
follow from its options, the contract tests and the reference pages from the line.
"""

from __future__ import annotations

from typing import Any

from dissect_clip.config.strategies import StrategyEntry, StrategyRegistry

_HERE = "dissect_clip.selection.strategies"


def _entry(place: str, summary: str, options: str | None = None, **facts: bool) -> StrategyEntry:
    return StrategyEntry(f"{_HERE}.{place}", summary, None if options is None else f"{_HERE}.{options}", **facts)


def describe(strategy: Any, target: str) -> StrategyEntry:
    """The entry of someone else's strategy, as its class and mixins declare it. Imports torch.

    Raises:
        ValueError: if it is no strategy, or its options are none.
    """
    from dissect_clip.config.options import StrategyOptions
    from dissect_clip.selection.mixins import ReusesScores
    from dissect_clip.selection.strategies.combination import OWN_PLAN
    from dissect_clip.selection.strategy import Strategy

    if not isinstance(strategy, type) or not issubclass(strategy, Strategy):
        raise ValueError(f"{target} is no subclass of dissect_clip.selection.Strategy")
    options = strategy.Options
    if not isinstance(options, type) or not issubclass(options, StrategyOptions):
        raise ValueError(f"the Options of {target} are no subclass of dissect_clip.config.options.StrategyOptions")
    summary = (strategy.__doc__ or "").strip().partition("\n")[0]
    return StrategyEntry(
        target,
        summary or f"a strategy of {target.partition(':')[0]}",
        f"{target}.Options",
        scores=bool(strategy.needs),
        combines=not issubclass(strategy, OWN_PLAN),
        reuses=issubclass(strategy, ReusesScores),
    )


STRATEGIES = StrategyRegistry(
    {
        "small_loss": _entry("baselines:SmallLoss", "smallest contrastive loss: pairs that the model finds easy"),
        "big_loss": _entry("baselines:BigLoss", "largest contrastive loss: pairs that the model finds hard"),
        "clipscore": _entry("baselines:ClipScore", "largest CLIPScore under the current model"),
        "random": _entry("baselines:Random", "uniform sampling, without a scoring pass", scores=False, combines=False),
        "historical_base_sampling": _entry(
            "differential.strategy:MomentumDifferential",
            "DISSect-Momentum: the largest differential from a moving average of each sample's scores",
            "differential.options:MomentumOptions",
        ),
        "warmup_base_sampling": _entry(
            "differential.strategy:WarmupDifferential",
            "DISSect-Warmup: uniform for --warmup-point epochs, then the largest differential from their last scores",
            "options:DifferentialOptions",
        ),
        "divbs": _entry("divbs:DivBS", "DivBS: pairs whose gradients span most of the batch's, shared directions once"),
        "learnability": _entry(
            "learnability.strategy:Learnability",
            "RHO-LOSS: largest loss minus the loss of a reference model",
            "options:ReferenceOptions",
        ),
        "jest": _entry(
            "learnability.strategy:Jest",
            "JEST: a sub-batch that is learnable as a whole, sampled in chunks by loss minus reference loss",
            "learnability.options:JestOptions",
        ),
        "negcliploss": _entry(
            "negcliploss.strategy:NegCLIPLoss",
            "negCLIPLoss: largest cosine minus its log-sum-exp over others, averaged over random sub-batches",
            "negcliploss.options:NegCLIPLossOptions",
        ),
        "infobatch": _entry(
            "infobatch.strategy:InfoBatch",
            "InfoBatch: leaves out a random part of the pairs below the mean loss, weights the rest; no scoring pass",
            "infobatch.options:InfoBatchOptions",
            scores=False,
            combines=False,
        ),
        "scan": _entry(
            "scan.strategy:Scan",
            "SCAN: in cycles, ever less of the smallest and largest losses of each batch; no scoring pass",
            "scan.options:ScanOptions",
            scores=False,
            combines=False,
        ),
        "clean_posterior": _entry(
            "clean_posterior.strategy:CleanPosterior",
            "samples by an estimated probability that the pair is clean, computed during training; no scoring pass",
            "clean_posterior.options:CleanPosteriorOptions",
            combines=False,
            reuses=True,
        ),
    },
    aliases={"dissect": "warmup_base_sampling"},
    describe=describe,
)
"""This project's strategies; ``dissect`` is another name of the published method."""
