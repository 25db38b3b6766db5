"""The selection of a training run, as its settings ask for it."""

from __future__ import annotations

from dissect_clip.config.settings import Config
from dissect_clip.distributed.world import World
from dissect_clip.errors import SetupError
from dissect_clip.selection.earlier_scores import EarlierScores
from dissect_clip.selection.mixins import weights_losses
from dissect_clip.selection.preselection import Preselector
from dissect_clip.selection.selection import Selection
from dissect_clip.selection.strategies.build import build_strategy
from dissect_clip.selection.strategy import REUSABLE, Needs, Strategy


def build_selection(config: Config, num_samples: int, world: World) -> Selection | None:
    """The selection that the settings ask for, with an empty table and without decoys; None without ``--select``.

    Raises:
        SetupError: if the strategy cannot be combined with scores of earlier steps, a choice before loading, the loss
            of the run, or other strategies, as the settings ask.
    """
    if not config.selection.select:
        return None
    strategy = build_strategy(config)
    _check_loss(config, strategy)
    if config.selection.select_before_load and strategy.needs & ~REUSABLE:
        raise SetupError(
            "--select-before-load chooses before samples are decoded, but --select-strategy "
            f"{config.selection.select_strategy} looks at their features or at a reference model: leave it out, with "
            "--score-refresh and --select-preset"
        )
    return Selection.from_strategy(strategy, config, num_samples, world)


def _check_loss(config: Config, strategy: Strategy) -> None:
    """Raises SetupError if the strategy weights samples, and the loss of the run cannot be weighted."""
    for kind, is_used in (
        ("a CoCa model", "coca" in config.model.model.lower()),
        ("--distill-model", config.model.distill),
    ):
        if weights_losses(strategy) and is_used:
            raise SetupError(
                f"--select-strategy {config.selection.select_strategy} weights the contrastive loss of each pair, "
                f"which does not go with the other losses of {kind}: choose another strategy, or give --select-rescale "
                "off"
            )


def build_preselector(config: Config, selection: Selection | None) -> Preselector | None:
    """What tells the loader which samples to decode; None without ``--select-before-load``.

    Raises:
        SetupError: if every sample is to be scored, and so has to be loaded, or all are needed to weight some.
    """
    if selection is None or not config.selection.select_before_load:
        return None
    strategy = selection.strategy
    if weights_losses(strategy):
        raise SetupError(
            f"--select-before-load, also as a part of --select-preset fast, does not go with --select-strategy "
            f"{config.selection.select_strategy}, which weights what it keeps against what it leaves out: leave it "
            "out, or give --select-rescale off"
        )
    if selection.earlier is not None:
        return Preselector(selection.earlier, selection.num_samples)
    if strategy.needs is Needs.NOTHING:
        return Preselector(EarlierScores(strategy, 0.0), selection.num_samples)
    raise SetupError(
        "--select-before-load does not load what it does not choose, but --select-strategy "
        f"{config.selection.select_strategy} scores every sample: add --score-refresh 0, or a small share such as 0.1"
    )
