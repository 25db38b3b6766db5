"""Online sample selection: which part of each batch to train on.

:class:`Selection` is the library: the same object in the trainer and in a training loop of your own. ``build`` makes it
from a run's settings, ``strategies`` holds what ranks the samples, one file or folder each, and ``registry`` their
names.
"""

from __future__ import annotations

from dissect_clip.selection.build import build_preselector, build_selection
from dissect_clip.selection.preselection import Preselector
from dissect_clip.selection.registry import STRATEGIES, build_strategy, summaries
from dissect_clip.selection.selection import Choice, Selection
from dissect_clip.selection.store import ScoreStore
from dissect_clip.selection.strategy import Candidates, Needs, Strategy

__all__ = [
    "STRATEGIES", "Candidates", "Choice", "Preselector", "Needs", "ScoreStore", "Selection", "Strategy",
    "build_preselector", "build_selection", "build_strategy", "summaries",
]  # fmt: skip
