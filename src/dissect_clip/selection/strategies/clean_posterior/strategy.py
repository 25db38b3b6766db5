"""Sample in proportion to the probability that a pair is clean, estimated from earlier training passes.

The training pass gives the z-score of each pair that it takes: how far its cosine lies above that of mismatched pairs.
Before each epoch two Gaussians are fitted to the averages of all samples, one of clean and one of mismatched pairs, and
each batch is sampled without replacement in proportion to a power of the probability of the clean one. No scoring pass
is needed, so samples can be chosen before they are decoded. experiments/small/clean_posterior has the results.

During the warm-up a few samples are decoys, which have a wrong caption on purpose. Their scores show what the scores of
mismatched pairs look like, and so give the share of mismatched pairs and the probability that a pair is clean. The fit
alone gives neither, because mismatched pairs are memorised. If hardly any pair is mismatched, all samples have the same
weight.

Shapes: N pairs of this rank, M samples, C columns of the store, P decoys.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from dissect_clip.config.run_plan import RunPlan
from dissect_clip.seeding import Stream, derive_seed
from dissect_clip.selection.mixins import ReportsSamples, ReusesScores, SurveysAll, UsesDecoys, WarmsUp
from dissect_clip.selection.strategies.clean_posterior.decoys import decoy_ids
from dissect_clip.selection.strategies.clean_posterior.mixture import CURVE, FIT_ROWS, Parts, fit_decoys, fit_gaussians
from dissect_clip.selection.strategies.clean_posterior.options import CleanPosteriorOptions
from dissect_clip.selection.strategy import Candidates, Needs, required

_AVERAGE, _VARIANCE, _VISITS, _EPOCH, _FIRST = range(5)
"""Places of the columns; the last is there with decoys."""

_SCALARS = 7
"""Numbers of the parts, except the curve."""

_EMA = 0.5
"""Weight of a new visit in the moving average of a sample."""

_SMALLEST_GAP = 0.5
"""Without decoys: the parts count as distinct if the mean of the lower one is below this share of the upper one's."""

_LEAST = 1e-6
"""The smallest weight: a batch that lacks clean samples is filled with certainly mismatched ones."""


class CleanPosterior(WarmsUp, SurveysAll, ReportsSamples, UsesDecoys, ReusesScores):
    """samples pairs in proportion to an estimated probability of being clean, computed during training"""

    Options = CleanPosteriorOptions
    options: CleanPosteriorOptions
    needs = Needs.SCORE
    remembers: tuple[str, ...] = ("average", "variance", "visits", "last_epoch")
    survey_names: tuple[str, ...] = (
        "clean_share", "low_mean", "low_deviation", "high_mean", "high_deviation", "lowest", "highest",
        "known", "ratio", "noise",
    )  # fmt: skip
    survey_format = "--clean-model tied"  # as checkpoints have it from the time when there were other models
    sample_columns = ("p_clean",)
    report_file = "clean.parquet"

    def __init__(self, options: CleanPosteriorOptions, run: RunPlan) -> None:
        super().__init__(options, run)
        if self.decoy_share > 0:
            self.remembers += ("first_average",)
            self.survey_names += ("decoys", "decoy_share", *(f"decoy_{name}" for name in self.survey_names[1:_SCALARS]))
            self.survey_names += tuple(f"curve_{place}" for place in range(CURVE))
        self.parts: Parts | None = None
        self.known = 0  # samples with a score, when the epoch began
        self.by_decoys: Parts | None = None  # the estimate from the decoys at the end of the warm-up
        self.known_decoys = 0
        self.ratio = 0.0  # mean z-score of the lower part over that of the upper one
        self.noise = 0.0  # mean variance of a sample's z-score between its visits

    @property
    def decoy_share(self) -> float:
        return self.options.clean_decoys

    @property
    def decoy_settings(self) -> str:
        return f"--clean-decoys {self.decoy_share:g} --seed {self.run.seed}" if self.decoy_share > 0 else ""

    def has_decoys_in(self, epoch: int) -> bool:
        return self.decoy_share > 0 and self.warms_up(epoch)

    @property
    def distinguishes(self) -> bool:
        """Whether clean and mismatched pairs can be distinguished.

        With decoys: whether they estimate enough mismatched pairs. Without: whether the mean of the lower part is
        nearer to chance, a z-score of 0, than to the mean of the upper one.
        """
        if self.parts is None:
            return False
        if self.decoy_share > 0:
            return self.by_decoys is not None and 1 - self.by_decoys.share >= self.options.clean_gate
        return max(self.ratio, 0.0) < _SMALLEST_GAP  # the lower part may lie below chance

    def _decoy_ids(self, num_samples: int) -> Tensor:
        if self.decoy_ids is None:
            return decoy_ids(num_samples, self.decoy_share, self.run.seed)
        return self.decoy_ids

    # ---- what is remembered of a sample

    def _average_variance(self, visits: Tensor) -> Tensor:
        """Variance [N] of the moving average after ``visits`` [N], in units of the variance of one visit."""
        keep = (1 - _EMA) ** 2
        left = keep ** (visits - 1)
        return left + _EMA**2 * (1 - left) / (1 - keep)

    def _visits(self, memory: Tensor) -> Tensor:
        """Visits [N] with the sample's own caption; those of a decoy with its wrong one stand below 0."""
        return memory[:, _VISITS].nan_to_num(0).clamp(min=0)

    def remember(self, candidates: Candidates) -> Tensor:
        memory, value = candidates.memory, required(candidates.score)
        decoy = candidates.decoy
        visits = self._visits(memory)
        average, variance = memory[:, _AVERAGE], memory[:, _VARIANCE].nan_to_num(0)
        if decoy is not None:  # what is known of a decoy is of its wrong caption, and kept apart
            average = memory[:, _FIRST]
            visits = memory[:, _VISITS].nan_to_num(0).abs()
        step = value - average
        if not self.warms_up(candidates.epoch):
            # The scores of selected samples rise and the others stay behind, so only differences within a batch count.
            drift = step.nanmean().nan_to_num(0)
            value, step = value - drift, step - drift
        # How far a value is from the average before it has the variance of both.
        jump = step.square() / (1 + self._average_variance(visits.clamp(min=1)))
        variance = variance + (jump - variance) / visits.clamp(min=1)
        first = visits == 0
        average = torch.where(first, value, average + _EMA * step)
        columns = torch.stack(
            [
                average,
                torch.where(first, torch.nan, variance),
                visits + 1,
                torch.full_like(value, candidates.epoch),
            ],
            dim=1,
        )
        if self.decoy_share == 0:
            return columns
        if decoy is not None:
            of_decoys = torch.full_like(columns, torch.nan)
            of_decoys[:, _VISITS] = -columns[:, _VISITS]
            columns = columns.where(~decoy[:, None], of_decoys)
        return torch.cat([columns, (average if self.warms_up(candidates.epoch) else memory[:, _FIRST])[:, None]], dim=1)

    # ---- the survey of all samples

    def survey(self, memory: Tensor, epoch: int) -> Sequence[float]:
        """See :meth:`SurveysAll.survey`; ``memory`` [M, C] has the last scores after this strategy's own columns."""
        found = self._survey_parts(memory, epoch)
        if self.decoy_share > 0:
            found += self._survey_decoys(memory) if any(found) else [0.0] * (1 + _SCALARS + CURVE)
        return found

    def _survey_parts(self, memory: Tensor, epoch: int) -> list[float]:
        rows = self._some(memory, self._visits(memory) > 0, epoch).double()
        z = rows[:, _AVERAGE]
        parts = fit_gaussians(z)
        if parts is None:
            return [0.0] * (_SCALARS + 3)
        clean = parts.clean(z)
        low, high = (float((z * share).sum() / share.sum().clamp(min=_LEAST)) for share in (1 - clean, clean))
        ratio = low / high if high > 0 else 1.0
        noise = rows[:, _VARIANCE].nanmean().nan_to_num(0)
        known = (self._visits(memory) > 0).sum()
        return [*parts.numbers(), float(known), ratio, float(noise)]

    def _survey_decoys(self, memory: Tensor) -> list[float]:
        """The number of decoys with a score, and their estimate from the averages of all samples in the warm-up."""
        first = memory[:, _FIRST]
        ids = self._decoy_ids(len(memory)).to(memory.device)
        known = first[ids].isfinite()
        others = self._some(memory, first.isfinite().index_fill(0, ids, False), 0)[:, _FIRST]
        parts = fit_decoys(others, first[ids[known]])
        return [float(known.sum()), *([0.0] * (_SCALARS + CURVE) if parts is None else parts.numbers())]

    def _some(self, memory: Tensor, wanted: Tensor, epoch: int) -> Tensor:
        """Rows of ``memory`` [M, C] where ``wanted`` [M] bool; a random part of them if there are too many."""
        places = wanted.nonzero()[:, 0]
        if len(places) > FIT_ROWS:
            generator = torch.Generator().manual_seed(derive_seed(self.run.seed, Stream.SELECT, epoch))
            places = places[torch.randint(len(places), (FIT_ROWS,), generator=generator).to(places.device)]
        return memory[places]

    def with_survey(self, survey: Sequence[float]) -> CleanPosterior:
        changed = copy.copy(self)
        parts, (known, changed.ratio, changed.noise, *more) = survey[:_SCALARS], survey[_SCALARS:]
        changed.known = int(known)
        changed.parts = Parts.of(parts) if known else None
        changed.by_decoys, changed.known_decoys = None, 0
        if more:
            count, *numbers = more
            changed.known_decoys = int(count)
            changed.by_decoys = Parts.of(numbers) if any(numbers) else None
        return changed

    @property
    def summary(self) -> str:
        parts, by_decoys = self.parts, self.by_decoys
        if parts is None or (self.decoy_share > 0 and by_decoys is None):
            return "Clean posterior: too few scores yet to distinguish clean from mismatched pairs"
        found = (
            f"z-score {parts.high_mean:.2f} ± {parts.high_deviation:.2f} against "
            f"{parts.low_mean:.2f} ± {parts.low_deviation:.2f}"
        )
        if by_decoys is not None:
            wrong = f"{self.known_decoys} decoys estimate that {100 * (1 - by_decoys.share):.0f} % of the pairs are"
            if not self.distinguishes:
                gate = f"below --clean-gate {self.options.clean_gate:g}"
                return f"Clean posterior: {wrong} mismatched, {gate}: all samples have the same weight"
            return (
                f"Clean posterior: {wrong} mismatched; {100 * parts.share:.0f} % of {self.known} samples lie in the "
                f"upper part ({found})"
            )
        means = f"the mean z-scores of the two parts have a ratio of {self.ratio:.2f}, limit {_SMALLEST_GAP:g}"
        if not self.distinguishes:
            return f"Clean posterior: {means}, too close to distinguish: all samples have the same weight"
        return (
            f"Clean posterior: {100 * parts.share:.0f} % of {self.known} samples lie in the upper part ({found}; "
            f"{means})"
        )

    # ---- the probability of a sample

    def posterior(self, memory: Tensor) -> Tensor:
        """P(clean) [N] by the rows ``memory`` [N, C]; NaN if the parts cannot be distinguished.

        A sample that was never seen has the share of the clean part.
        """
        if self.parts is None or not self.distinguishes:
            return torch.full_like(memory[:, _AVERAGE], torch.nan)
        clean = self.parts.clean(memory[:, _AVERAGE])
        return clean.where(clean.isfinite(), self.parts.share)

    def rank(self, candidates: Candidates) -> Tensor:
        """Log weight plus Gumbel noise: the largest are a sample without replacement (Kool et al., ICML 2019)."""
        noise = -torch.empty_like(candidates.memory[:, 0]).exponential_(generator=candidates.generator).log()
        if self.warms_up(candidates.epoch) or not self.distinguishes:
            return noise
        floor = self.options.clean_floor
        clean = self.posterior(candidates.memory)
        weight = floor + (1 - floor) * clean**self.options.clean_exponent
        return weight.clamp(min=_LEAST).log() + noise

    def reported_posterior(self, memory: Tensor) -> Tensor:
        """P(clean) [N] for the record and the report: estimated from the decoys, without them as in ``posterior``."""
        if self.decoy_share == 0:
            return self.posterior(memory)
        if self.by_decoys is None:
            return torch.full_like(memory[:, _FIRST], torch.nan)
        clean = self.by_decoys.clean(memory[:, _FIRST])
        return clean.where(clean.isfinite(), self.by_decoys.share)

    def report(self, candidates: Candidates) -> Tensor:
        return self.reported_posterior(candidates.memory)[:, None]

    def sample_report(self, memory: Tensor, ids: Tensor, num_samples: int, epoch: int) -> Mapping[str, Tensor]:
        """P(clean), the same at one standard error of the z-score below and above, and what they follow from.

        A sample with a single visit has the mean variance of all samples. A decoy has no estimate, because it was
        trained with another caption.
        """
        place = _AVERAGE if self.decoy_share == 0 else _FIRST
        average, visits = memory[:, place], self._visits(memory)
        in_warmup = round(sum(self.rate(epoch) for epoch in range(self.options.warmup_epochs)))
        counted = visits if self.decoy_share == 0 else visits.clamp(max=max(1, in_warmup))
        variance = memory[:, _VARIANCE].where(visits > 1, self.noise)
        error = (variance * self._average_variance(counted.clamp(min=1))).sqrt()
        low, high = memory.clone(), memory.clone()
        low[:, place], high[:, place] = average - error, average + error
        decoy = torch.isin(ids, self._decoy_ids(num_samples).to(ids.device))
        p_clean, p_low, p_high = (
            self.reported_posterior(rows).where(~decoy, torch.nan) for rows in (memory, low, high)
        )
        return {
            "p_clean": p_clean,
            "p_clean_low": p_low,
            "p_clean_high": p_high,
            "statistic": average.where(~decoy, torch.nan),
            "standard_error": error.where(average.isfinite() & ~decoy, torch.nan),
            "visits": visits,
            "last_epoch": memory[:, _EPOCH],
            "is_decoy": decoy,
        }
