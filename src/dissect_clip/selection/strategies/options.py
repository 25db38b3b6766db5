"""Options that several strategies share: the warm-up, and the reference model."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from dataclasses import dataclass

from dissect_clip.config.fields import FRACTION, NOT_NEGATIVE, setting
from dissect_clip.config.options import O, StrategyOptions
from dissect_clip.config.run_plan import RunPlan


@dataclass(frozen=True, kw_only=True)
class WarmupOptions(StrategyOptions):
    """How long a strategy samples uniformly before it selects, and how much."""

    warmup_point: int = setting(
        10,
        "epochs of uniform sampling before selection starts. The differential compares with the scores of the last of "
        "them; a strategy without --select-reference takes the model after them as its reference. End them when "
        "matching captions score clearly higher than mismatched ones, usually after 3 to 6 passes over the samples "
        "that are trained on",
        within=NOT_NEGATIVE,
        ignored_by_others=True,
        common=True,
    )
    warmup_select_rate: float | None = setting(
        None,
        "share of every batch that is trained on during --warmup-point (default: --select-rate, or the strategy's "
        "own). 1.0 trains on all of it: it costs more and often selects better",
        within=FRACTION,
    )

    @property
    def warmup_epochs(self) -> int:
        return self.warmup_point

    def completed(self: O, run: RunPlan) -> O:
        assert isinstance(self, WarmupOptions)
        rate = run.select_rate if self.warmup_select_rate is None else self.warmup_select_rate
        return dataclasses.replace(self, warmup_select_rate=rate)

    def contradictions(self, run: RunPlan) -> Iterator[str]:
        if 0 < run.epochs <= self.warmup_epochs:
            yield (
                f"--warmup-point {self.warmup_epochs} leaves no epoch of --epochs {run.epochs} for selection: make it "
                "smaller, or train longer"
            )
        if self.warmup_select_rate is not None and not run.sets_rate:
            yield (
                f"--warmup-select-rate has no meaning with --select-strategy {run.select_strategy}, whose rate is that "
                "of its first strategy: leave it out"
            )


@dataclass(frozen=True, kw_only=True)
class DifferentialOptions(WarmupOptions):
    """The options of a strategy that compares with the scores at the end of its warm-up."""

    def contradictions(self, run: RunPlan) -> Iterator[str]:
        yield from super().contradictions(run)
        if self.warmup_point == 0:
            yield f"--warmup-point 0 leaves {run.select_strategy} without a reference: give at least 1"


@dataclass(frozen=True, kw_only=True)
class ReferenceOptions(WarmupOptions):
    """The reference model of a strategy that compares the model in training with one."""

    select_reference: str | None = setting(
        None,
        "weights of the reference model, a file or a pretrained tag of OpenCLIP (default: the model of this run after "
        "--warmup-point epochs of uniform sampling)",
    )
    select_reference_model: str | None = setting(
        None, "with --select-reference: the name of its architecture (default: --model)"
    )

    @property
    def warmup_epochs(self) -> int:
        return self.warmup_point if self.select_reference is None else 0

    def contradictions(self, run: RunPlan) -> Iterator[str]:
        yield from super().contradictions(run)
        if self.select_reference is None and self.warmup_point == 0:
            yield (
                f"--warmup-point 0 leaves {run.select_strategy} without a reference: give at least 1, or "
                "--select-reference"
            )
        if self.select_reference is None and self.select_reference_model is not None:
            yield "--select-reference-model needs --select-reference: give the weights"
        if self.select_reference is not None and self.warmup_select_rate is not None:
            yield (
                f"--warmup-select-rate has no meaning with --select-strategy {run.select_strategy} and "
                "--select-reference: leave it out"
            )
