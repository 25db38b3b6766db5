"""Draw by the probability that a pair is clean, as far as earlier training passes tell it.

The training pass says of each pair that it takes how well it fits (a z-score, see :mod:`dissect_clip.selection.reuse`).
Before each epoch two parts are fitted to what is known of all samples, pairs that fit and pairs that do not, and each
batch is drawn without replacement, by the probability of the first part. Nothing is scored for it, so the choice can be
made before samples are decoded. docs/clean_posterior.md has what it gains.

In the warm-up a few samples are decoys, whose captions are wrong on purpose. What lies where they lie is likely wrong,
what lies where they hardly do is clean: so they tell how many pairs are wrong, and how likely each is clean. The fit
alone knows neither, since wrong pairs are memorised. Where hardly any pair is wrong all samples have the same weight.

Shapes: N pairs of this rank, M samples, C columns of the store, P decoys.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from dissect_clip.config.settings import Config
from dissect_clip.seeding import Stream, derive_seed
from dissect_clip.selection.strategies.clean_posterior.decoys import decoy_ids
from dissect_clip.selection.strategies.clean_posterior.mixture import CURVE, DECOYS, FIT_ROWS, Parts, fit_parts
from dissect_clip.selection.strategy import Candidates, Needs, WarmingUp, required

_AVERAGE, _VARIANCE, _VISITS, _EPOCH, _FIRST = range(5)
"""Places of the columns; the last is there with decoys."""

_SCALARS = 7
"""Numbers of the parts, but for the curve."""

_LEAST = 1e-6
"""The smallest weight: a batch is filled up with samples that are surely wrong rather than being short."""


class CleanPosterior(WarmingUp):
    """drawn by the probability that the pair is clean, which training tells by itself; without a scoring pass"""

    remembers: tuple[str, ...] = ("average", "variance", "visits", "last_epoch")
    surveys: tuple[str, ...] = (
        "clean_share", "low_mean", "low_deviation", "high_mean", "high_deviation", "lowest", "highest",
        "known", "ratio", "noise",
    )  # fmt: skip
    reports = ("p_clean",)
    file = "clean.parquet"
    reuses = True

    def __init__(self, config: Config) -> None:
        super().__init__(config)
        self.needs = Needs.SCORE
        if config.selection.clean_statistic == "loss":
            self.needs |= Needs.LOSS
        if config.selection.clean_statistic == "clipscore":
            self.needs |= Needs.CLIPSCORE
        if self.decoys > 0:
            self.remembers += ("first_average",)
            self.surveys += ("decoys", "decoy_share", *(f"decoy_{name}" for name in self.surveys[1:_SCALARS]))
            self.surveys += tuple(f"curve_{place}" for place in range(CURVE))
        self.parts: Parts | None = None
        self.known = 0  # samples with a score, when the epoch began
        self.by_decoys: Parts | None = None  # what the decoys say of the scores at the end of the warm-up
        self.known_decoys = 0
        self.ratio = 0.0  # mean z-score of the lower part over that of the upper one
        self.noise = 0.0  # variance of a sample's statistic from visit to visit, over all samples

    @property
    def decoys(self) -> float:
        """See :attr:`Strategy.decoys`."""
        return self.config.selection.clean_decoys

    @property
    def depends_on(self) -> str:
        """See :attr:`Strategy.depends_on`: which samples are decoys."""
        return f"--clean-decoys {self.decoys:g} --seed {self.config.training.seed}" if self.decoys > 0 else ""

    @property
    def survey_of(self) -> str:
        """See :attr:`Strategy.survey_of`."""
        return f"--clean-model {self.config.selection.clean_model}"

    def has_decoys(self, epoch: int) -> bool:
        return self.decoys > 0 and self.warms_up(epoch)

    @property
    def told_apart(self) -> bool:
        """Whether there are two parts: enough wrong pairs by the decoys.

        Without those, whether the lower part is nearer to chance than to the upper one.
        """
        if self.parts is None:
            return False
        if self.decoys > 0:
            return self.by_decoys is not None and 1 - self.by_decoys.share >= self.config.selection.clean_gate
        return max(self.ratio, 0.0) < self.config.selection.clean_ratio  # the lower part may lie below chance

    def _decoy_ids(self, num_samples: int) -> Tensor:
        return (
            decoy_ids(num_samples, self.decoys, self.config.training.seed) if self.decoy_ids is None else self.decoy_ids
        )

    # ---- what is known of a sample

    def _statistic(self, candidates: Candidates) -> Tensor:
        if self.config.selection.clean_statistic == "loss":
            return -required(candidates.loss)
        if self.config.selection.clean_statistic == "clipscore":
            return required(candidates.last_clip_score)
        return required(candidates.score)

    def _trust(self, visits: Tensor) -> Tensor:
        """Variance of the average [N] of so many ``visits`` [N], where that of one is 1."""
        if self.config.selection.clean_ensemble == "mean":
            return 1 / visits
        if self.config.selection.clean_ensemble == "ema":
            keep = (1 - self.config.selection.clean_ema) ** 2
            left = keep ** (visits - 1)
            return (
                left + self.config.selection.clean_ema**2 * (1 - left) / (1 - keep)
                if keep < 1
                else torch.ones_like(visits)
            )
        return torch.ones_like(visits)

    def _visits(self, memory: Tensor) -> Tensor:
        """Visits [N] with the sample's own caption; those of a decoy with its wrong one stand below 0."""
        return memory[:, _VISITS].nan_to_num(0).clamp(min=0)

    def remember(self, candidates: Candidates) -> Tensor:
        memory, value = candidates.memory, self._statistic(candidates)
        decoy = candidates.decoy
        visits = self._visits(memory)
        average, variance = memory[:, _AVERAGE], memory[:, _VARIANCE].nan_to_num(0)
        if decoy is not None:  # what is known of a decoy is of its wrong caption, and kept apart
            average = memory[:, _FIRST]
            visits = memory[:, _VISITS].nan_to_num(0).abs()
        step = value - average
        if self.config.selection.clean_drift == "removed" and not self.warms_up(candidates.epoch):
            # What is trained on rises, what is not stays behind: only how they differ among each other counts.
            drift = step.nanmean().nan_to_num(0)
            value, step = value - drift, step - drift
        # How far a value is from the average before it has the variance of both.
        jump = step.square() / (1 + self._trust(visits.clamp(min=1)))
        variance = variance + (jump - variance) / visits.clamp(min=1)
        shares = {"last": torch.ones_like(visits), "mean": 1 / (visits + 1)}
        share = shares.get(
            self.config.selection.clean_ensemble, torch.full_like(visits, self.config.selection.clean_ema)
        )
        first = visits == 0
        average = torch.where(first, value, average + share * step)
        columns = torch.stack(
            [
                average,
                torch.where(first, torch.nan, variance),
                visits + 1,
                torch.full_like(value, candidates.epoch),
            ],
            dim=1,
        )
        if self.decoys == 0:
            return columns
        if decoy is not None:
            of_decoys = torch.full_like(columns, torch.nan)
            of_decoys[:, _VISITS] = -columns[:, _VISITS]
            columns = columns.where(~decoy[:, None], of_decoys)
        return torch.cat([columns, (average if self.warms_up(candidates.epoch) else memory[:, _FIRST])[:, None]], dim=1)

    # ---- what is known of all samples

    def survey(self, memory: Tensor, epoch: int) -> Sequence[float]:
        """See :meth:`Strategy.survey`; ``memory`` [M, C] has the scores behind this strategy's own columns."""
        found = self._survey_parts(memory, epoch)
        if self.decoys > 0:
            found += self._survey_decoys(memory) if any(found) else [0.0] * (1 + _SCALARS + CURVE)
        return found

    def _survey_parts(self, memory: Tensor, epoch: int) -> list[float]:
        rows = self._some(memory, self._visits(memory) > 0, epoch).double()
        parts = fit_parts(self.config.selection.clean_model, rows[:, _AVERAGE], self.config.selection.clean_quantile)
        if parts is None:
            return [0.0] * (_SCALARS + 3)
        clean = parts.clean(rows[:, _AVERAGE])
        z = rows[:, len(self.remembers) if self.config.selection.clean_statistic == "clipscore" else _AVERAGE]
        low, high = (float((z * share).sum() / share.sum().clamp(min=_LEAST)) for share in (1 - clean, clean))
        ratio = low / high if high > 0 else 1.0
        noise = rows[:, _VARIANCE].nanmean().nan_to_num(0)
        known = (self._visits(memory) > 0).sum()
        return [*parts.numbers(), float(known), ratio, float(noise)]

    def _survey_decoys(self, memory: Tensor) -> list[float]:
        """How many decoys are known, and what they say of the averages of all others in the warm-up."""
        first = memory[:, _FIRST]
        ids = self._decoy_ids(len(memory)).to(memory.device)
        known = first[ids].isfinite()
        others = self._some(memory, first.isfinite().index_fill(0, ids, False), 0)[:, _FIRST]
        parts = fit_parts(DECOYS, others, decoys=first[ids[known]])
        return [float(known.sum()), *([0.0] * (_SCALARS + CURVE) if parts is None else parts.numbers())]

    def _some(self, memory: Tensor, wanted: Tensor, epoch: int) -> Tensor:
        """Rows of ``memory`` [M, C] that are ``wanted`` [M] bool; of too many a random part."""
        places = wanted.nonzero()[:, 0]
        if len(places) > FIT_ROWS:
            generator = torch.Generator().manual_seed(derive_seed(self.config.training.seed, Stream.SELECT, epoch))
            places = places[torch.randint(len(places), (FIT_ROWS,), generator=generator).to(places.device)]
        return memory[places]

    def informed(self, survey: Sequence[float]) -> CleanPosterior:
        knowing = copy.copy(self)
        parts, (known, knowing.ratio, knowing.noise, *more) = survey[:_SCALARS], survey[_SCALARS:]
        knowing.known = int(known)
        knowing.parts = Parts.of(self.config.selection.clean_model, parts) if known else None
        knowing.by_decoys, knowing.known_decoys = None, 0
        if more:
            count, *numbers = more
            knowing.known_decoys = int(count)
            knowing.by_decoys = Parts.of(DECOYS, numbers) if any(numbers) else None
        return knowing

    @property
    def finding(self) -> str:
        parts, known = self.parts, self.by_decoys
        if parts is None or (self.decoys > 0 and known is None):
            return "Clean posterior: too little is known yet to part clean pairs from others"
        found = (
            f"{self.config.selection.clean_statistic} {parts.high_mean:.2f} ± {parts.high_deviation:.2f} against "
            f"{parts.low_mean:.2f} ± {parts.low_deviation:.2f}"
        )
        if known is not None:
            wrong = f"{100 * (1 - known.share):.0f} % of the captions look wrong"
            why = f"beside {self.known_decoys} decoys in the warm-up {wrong}"
            if not self.told_apart:
                return (
                    f"Clean posterior: {why}, --clean-gate {self.config.selection.clean_gate:g}: all have the same "
                    "weight"
                )
            return f"Clean posterior: {why}; {100 * parts.share:.0f} % of {self.known} samples are drawn from ({found})"
        means = (
            f"mean z-scores of the parts in a ratio of {self.ratio:.2f}, --clean-ratio "
            f"{self.config.selection.clean_ratio:g}"
        )
        if not self.told_apart:
            return f"Clean posterior: the two parts cannot be told apart ({means}): all samples have the same weight"
        return f"Clean posterior: {100 * parts.share:.0f} % of {self.known} samples look clean ({found}; {means})"

    # ---- what follows for a sample

    def posterior(self, memory: Tensor, epoch: int) -> Tensor:
        """P(clean) [N] by ``memory`` [N, C] before an epoch; NaN where the parts cannot be told apart.

        The share of the clean part for samples that were never seen, and ever nearer to it with ``--clean-forget``,
        the longer ago the last visit was.
        """
        if self.parts is None or not self.told_apart:
            return torch.full_like(memory[:, _AVERAGE], torch.nan)
        clean = self.parts.clean(memory[:, _AVERAGE])
        share = self.parts.share
        if self.config.selection.clean_forget > 0:
            age = (epoch - 1 - memory[:, _EPOCH]).clamp(min=0)
            clean = share + (clean - share) * (1 - self.config.selection.clean_forget) ** age
        return clean.where(clean.isfinite(), share)

    def rank(self, candidates: Candidates) -> Tensor:
        """Log weight plus Gumbel noise: its largest are a draw without replacement (Kool et al., ICML 2019)."""
        noise = -torch.empty_like(candidates.memory[:, 0]).exponential_(generator=candidates.generator).log()
        if self.warms_up(candidates.epoch) or not self.told_apart:
            return noise
        floor = self.config.selection.clean_floor
        clean = self.posterior(candidates.memory, candidates.epoch)
        weight = floor + (1 - floor) * clean**self.config.selection.clean_exponent
        return weight.clamp(min=_LEAST).log() + noise

    def certainty(self, memory: Tensor, epoch: int) -> Tensor:
        """P(clean) [N] as it is told to the user: by the decoys; without them that which is drawn by."""
        if self.decoys == 0:
            return self.posterior(memory, epoch)
        if self.by_decoys is None:
            return torch.full_like(memory[:, _FIRST], torch.nan)
        clean = self.by_decoys.clean(memory[:, _FIRST])
        return clean.where(clean.isfinite(), self.by_decoys.share)

    def report(self, candidates: Candidates) -> Tensor:
        return self.certainty(candidates.memory, candidates.epoch)[:, None]

    def verdict(self, memory: Tensor, ids: Tensor, num_samples: int, epoch: int) -> Mapping[str, Tensor]:
        """P(clean) with the ends of what one standard error of the statistic leaves open, and what it comes from.

        A sample that was visited once has the variance of all. Of the caption of a decoy nothing is known, since it was
        trained with another.
        """
        place = _AVERAGE if self.decoys == 0 else _FIRST
        average, visits = memory[:, place], self._visits(memory)
        in_warmup = round(sum(self.rate(epoch) for epoch in range(self.first_epoch)))
        counted = visits if self.decoys == 0 else visits.clamp(max=max(1, in_warmup))
        variance = memory[:, _VARIANCE].where(visits > 1, self.noise)
        error = (variance * self._trust(counted.clamp(min=1))).sqrt()
        low, high = memory.clone(), memory.clone()
        low[:, place], high[:, place] = average - error, average + error
        decoy = torch.isin(ids, self._decoy_ids(num_samples).to(ids.device))
        p_clean, p_low, p_high = (self.certainty(rows, epoch).where(~decoy, torch.nan) for rows in (memory, low, high))
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
