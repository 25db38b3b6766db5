"""Online sample selection: which part of each batch to train on.

:class:`Selection` is the library: the same object in the trainer and in a training loop of your own. ``build`` makes it
from a run's settings, ``strategies`` holds what ranks the samples, one file or folder each, and ``registry`` their
names.

The names below are imported when they are first used, so that importing this package, as the command line does for
``--help``, does not import torch.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from dissect_clip.config.options import StrategyOptions
    from dissect_clip.config.run_plan import RunPlan
    from dissect_clip.selection.build import build_preselector, build_selection
    from dissect_clip.selection.preselection import Preselector
    from dissect_clip.selection.registry import STRATEGIES
    from dissect_clip.selection.selection import Choice, Selection
    from dissect_clip.selection.store import ScoreStore
    from dissect_clip.selection.strategies.build import build_strategy
    from dissect_clip.selection.strategy import Candidates, Needs, Strategy

__all__ = [
    "STRATEGIES", "Candidates", "Choice", "Needs", "Preselector", "RunPlan", "ScoreStore", "Selection", "Strategy",
    "StrategyOptions", "build_preselector", "build_selection", "build_strategy",
]  # fmt: skip

_PLACES = {
    "STRATEGIES": "selection.registry",
    "Candidates": "selection.strategy",
    "Choice": "selection.selection",
    "Needs": "selection.strategy",
    "Preselector": "selection.preselection",
    "RunPlan": "config.run_plan",
    "ScoreStore": "selection.store",
    "Selection": "selection.selection",
    "Strategy": "selection.strategy",
    "StrategyOptions": "config.options",
    "build_preselector": "selection.build",
    "build_selection": "selection.build",
    "build_strategy": "selection.strategies.build",
}
"""The module of each public name."""


def __getattr__(name: str) -> Any:
    if name not in _PLACES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"dissect_clip.{_PLACES[name]}"), name)
