"""Options of JEST; those of Learnability are in :mod:`dissect_clip.selection.strategies.options`."""

from __future__ import annotations

from dataclasses import dataclass

from dissect_clip.config.fields import COUNT, POSITIVE, setting
from dissect_clip.selection.strategies.options import ReferenceOptions


@dataclass(frozen=True, kw_only=True)
class JestOptions(ReferenceOptions):
    """How JEST samples a sub-batch."""

    jest_chunks: int = setting(
        16, "number of chunks that a sub-batch is sampled in, each given the chunks before it", within=COUNT
    )
    jest_gain: float = setting(
        1.0, "inverse temperature of the sampling; a large value takes the best pairs of each chunk", within=POSITIVE
    )
