"""Options of the clean posterior."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from dissect_clip.config.fields import FRACTION, NOT_NEGATIVE, Range, setting
from dissect_clip.config.run_plan import RunPlan
from dissect_clip.selection.strategies.options import WarmupOptions


@dataclass(frozen=True, kw_only=True)
class CleanPosteriorOptions(WarmupOptions):
    """The warm-up, the decoys and the sampling weights of the clean posterior."""

    warmup_point: int = setting(
        5,
        "epochs of uniform sampling before selection starts; the decoys have their wrong captions in them",
        within=NOT_NEGATIVE,
        ignored_by_others=True,
    )
    warmup_select_rate: float | None = setting(
        1.0, "share of every batch that is trained on during --warmup-point", within=FRACTION
    )
    clean_decoys: float = setting(
        0.02,
        "share of the samples, 4096 at most, that have a wrong caption on purpose during the warm-up, to estimate the "
        "share of mismatched pairs. About 100 are needed; 0 uses none",
        within=Range(at_least=0, at_most=0.5),
    )
    clean_exponent: float = setting(
        4.0, "exponent of P(clean) in the sampling weight of a sample; 0 samples uniformly", within=NOT_NEGATIVE
    )
    clean_floor: float = setting(
        0.0,
        "smallest sampling weight of a sample, when a certainly clean one has weight 1",
        within=Range(at_least=0, at_most=1),
    )
    clean_gate: float = setting(
        0.05,
        "sample uniformly if the decoys estimate that less than this share of the pairs is mismatched",
        within=Range(at_least=0, at_most=1),
    )

    def contradictions(self, run: RunPlan) -> Iterator[str]:
        yield from super().contradictions(run)
        if self.warmup_point == 0 and self.clean_decoys > 0:
            yield "--warmup-point 0 leaves no epoch for the decoys: give at least 1, or --clean-decoys 0"
        if self.given("clean_gate") and self.clean_decoys == 0:
            yield "--clean-gate needs decoys to have a meaning: leave --clean-decoys 0 out, or leave it out"
