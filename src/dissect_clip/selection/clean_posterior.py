"""Draw by the probability that a pair is clean, as far as earlier training passes tell it.

The training pass says of each pair that it takes how well it fits (a z-score, see :mod:`dissect_clip.selection.reuse`).
Before each epoch all samples are held against decoys, a few whose captions are wrong on purpose: what lies where they
lie is likely wrong, what lies where they hardly do is clean. Each batch is drawn without replacement, a power of the
probability of being clean its weight. Nothing is scored for it, so the choice can be made before samples are decoded.
docs/clean_posterior.md has what it gains.

In data without wrong captions hardly any sample lies among the decoys, and all have nearly the same weight. Without
decoys two parts are fitted to what is known of all samples; where they cannot be told apart all have the same weight.

Shapes: N pairs of this rank, M samples, C columns of the store, P decoys.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from dissect_clip.config import Config
from dissect_clip.seeding import Stream, derive_seed
from dissect_clip.selection.base import Candidates, Needs, WarmingUp, required
from dissect_clip.selection.decoys import decoy_ids
from dissect_clip.selection.mixture import CURVE, DECOYS, FIT_ROWS, Parts, fit_parts

_AVERAGE, _VARIANCE, _VISITS, _EPOCH, _Z = range(5)
"""Places of the columns; the z-score is the first of those that scores are kept in."""

_SCALARS = 7
"""Numbers of the parts, but for the curve."""

_LEAST = 1e-6
"""The smallest weight: a batch is filled up with samples that are surely wrong rather than being short."""


class CleanPosterior(WarmingUp):
    """drawn by the probability that the pair is clean, which training tells by itself; without a scoring pass"""

    remembers = ("average", "variance", "visits", "last_epoch")
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
        if config.clean_statistic == "loss":
            self.needs |= Needs.LOSS
        if config.clean_statistic == "clipscore":
            self.needs |= Needs.CLIPSCORE
        if self.decoys > 0:
            self.surveys += ("decoys", *(f"curve_{place}" for place in range(CURVE)))
        self.parts: Parts | None = None
        self.known = 0  # samples with a score, when the epoch began
        self.known_decoys = 0
        self.ratio = 0.0  # mean z-score of the lower part over that of the upper one
        self.noise = 0.0  # variance of a sample's statistic from visit to visit, over all samples

    @property
    def decoys(self) -> float:
        """See :attr:`Strategy.decoys`."""
        return self.config.clean_decoys if self.config.clean_model == DECOYS else 0.0

    @property
    def told_apart(self) -> bool:
        """Whether there are two parts; without decoys, of which the lower one is nearer to chance than to the upper."""
        return self.parts is not None and (self.decoys > 0 or self.ratio < self.config.clean_gate)

    def _decoy_ids(self, num_samples: int) -> Tensor:
        return decoy_ids(num_samples, self.decoys, self.config.seed)

    # ---- what is known of a sample

    def _statistic(self, candidates: Candidates) -> Tensor:
        if self.config.clean_statistic == "loss":
            return -required(candidates.loss)
        if self.config.clean_statistic == "clipscore":
            return required(candidates.last_clip_score)
        return required(candidates.score)

    def _trust(self, visits: Tensor) -> Tensor:
        """Variance of the average [N] of so many ``visits`` [N], where that of one is 1."""
        if self.config.clean_ensemble == "mean":
            return 1 / visits
        if self.config.clean_ensemble == "ema":
            keep = (1 - self.config.clean_ema) ** 2
            left = keep ** (visits - 1)
            return left + self.config.clean_ema**2 * (1 - left) / (1 - keep) if keep < 1 else torch.ones_like(visits)
        return torch.ones_like(visits)

    def remember(self, candidates: Candidates) -> Tensor:
        memory, value = candidates.memory, self._statistic(candidates)
        visits = memory[:, _VISITS].nan_to_num(0)
        average, variance = memory[:, _AVERAGE], memory[:, _VARIANCE].nan_to_num(0)
        step = value - average
        if self.config.clean_drift == "removed" and not self.warms_up(candidates.epoch):
            # What is trained on rises, what is not stays behind: only how they differ among each other counts.
            drift = step.nanmean().nan_to_num(0)
            value, step = value - drift, step - drift
        # How far a value is from the average before it has the variance of both.
        jump = step.square() / (1 + self._trust(visits.clamp(min=1)))
        variance = variance + (jump - variance) / visits.clamp(min=1)
        shares = {"last": torch.ones_like(visits), "mean": 1 / (visits + 1)}
        share = shares.get(self.config.clean_ensemble, torch.full_like(visits, self.config.clean_ema))
        first = visits == 0
        return torch.stack(
            [
                torch.where(first, value, average + share * step),
                torch.where(first, torch.nan, variance),
                visits + 1,
                torch.full_like(value, candidates.epoch),
            ],
            dim=1,
        )

    # ---- what is known of all samples

    def survey(self, memory: Tensor, epoch: int) -> Sequence[float]:
        """See :meth:`Strategy.survey`; ``memory`` [M, C] has the z-scores behind this strategy's own columns."""
        seen = memory[:, _VISITS].nan_to_num(0) > 0
        decoys = memory[:0, _AVERAGE]
        if self.decoys > 0:
            ids = self._decoy_ids(len(memory)).to(memory.device)
            decoys = memory[ids[seen[ids]], _AVERAGE]
            seen = seen.index_fill(0, ids, False)
        known = seen.nonzero()[:, 0]
        total = len(known)
        if total > FIT_ROWS:
            generator = torch.Generator().manual_seed(derive_seed(self.config.seed, Stream.SELECT, epoch))
            known = known[torch.randint(total, (FIT_ROWS,), generator=generator).to(known.device)]
        rows = memory[known].double()
        parts = fit_parts(self.config.clean_model, rows[:, _AVERAGE], self.config.clean_quantile, decoys)
        if parts is None:
            return [0.0] * len(self.surveys)
        clean = parts.clean(rows[:, _AVERAGE])
        z = rows[:, _Z if self.config.clean_statistic == "clipscore" else _AVERAGE]
        low, high = (float((z * share).sum() / share.sum().clamp(min=_LEAST)) for share in (1 - clean, clean))
        ratio = low / high if high > 0 else 1.0
        noise = rows[:, _VARIANCE].nanmean().nan_to_num(0)
        numbers = parts.numbers()
        found = [*numbers[:_SCALARS], float(total), ratio, float(noise)]
        return [*found, float(len(decoys)), *parts.curve] if self.decoys > 0 else found

    def informed(self, survey: Sequence[float]) -> CleanPosterior:
        knowing = copy.copy(self)
        share, low_mean, low_deviation, high_mean, high_deviation, lowest, highest, known, *rest = survey
        knowing.ratio, knowing.noise, *more = rest
        knowing.known, knowing.known_decoys = int(known), int(more[0]) if more else 0
        knowing.parts = None
        if known:
            knowing.parts = Parts(
                self.config.clean_model,
                share, low_mean, low_deviation, high_mean, high_deviation, lowest, highest,
                curve=tuple(more[1:]),
            )  # fmt: skip
        return knowing

    @property
    def finding(self) -> str:
        parts = self.parts
        if parts is None:
            return "Clean posterior: too little is known yet to part clean pairs from others"
        if self.decoys > 0:
            return (
                f"Clean posterior: {100 * parts.share:.0f} % of {self.known} samples look clean "
                f"({self.config.clean_statistic} {parts.high_mean:.2f} ± {parts.high_deviation:.2f} against "
                f"{parts.low_mean:.2f} ± {parts.low_deviation:.2f} of {self.known_decoys} decoys)"
            )
        means = f"mean z-scores of the parts in a ratio of {self.ratio:.2f}, --clean-gate {self.config.clean_gate:g}"
        if not self.told_apart:
            return f"Clean posterior: the two parts cannot be told apart ({means}): all samples have the same weight"
        return (
            f"Clean posterior: {100 * parts.share:.0f} % of {self.known} samples look clean "
            f"({self.config.clean_statistic} {parts.high_mean:.2f} ± {parts.high_deviation:.2f} against "
            f"{parts.low_mean:.2f} ± {parts.low_deviation:.2f}; {means})"
        )

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
        if self.config.clean_forget > 0:
            age = (epoch - 1 - memory[:, _EPOCH]).clamp(min=0)
            clean = share + (clean - share) * (1 - self.config.clean_forget) ** age
        return clean.where(clean.isfinite(), share)

    def rank(self, candidates: Candidates) -> Tensor:
        """Log weight plus Gumbel noise: its largest are a draw without replacement (Kool et al., ICML 2019)."""
        noise = -torch.empty_like(candidates.memory[:, 0]).exponential_(generator=candidates.generator).log()
        if self.warms_up(candidates.epoch) or not self.told_apart:
            return noise
        weight = self._weight(self.posterior(candidates.memory, candidates.epoch))
        return weight.clamp(min=_LEAST).log() + noise

    def _weight(self, clean: Tensor) -> Tensor:
        """[N] in 0..1 by P(clean) [N]: what is likely clean counts alike, and what is not the less, the less it is.

        o^e / (o^e + t^e), where o and t are the odds of being clean and those of the threshold: P(clean) itself for an
        exponent e of 1 and a threshold of 1/2. By P(clean) itself too many wrong pairs are drawn, and by a power of it
        the easiest of the clean pairs again and again.
        """
        config = self.config
        threshold = math.log(config.clean_threshold / (1 - config.clean_threshold))
        weight = torch.sigmoid(config.clean_exponent * (torch.logit(clean, eps=_LEAST) - threshold))
        return config.clean_floor + (1 - config.clean_floor) * weight

    def report(self, candidates: Candidates) -> Tensor:
        return self.posterior(candidates.memory, candidates.epoch)[:, None]

    def verdict(self, memory: Tensor, ids: Tensor, num_samples: int, epoch: int) -> Mapping[str, Tensor]:
        """P(clean) with the ends of what one standard error of the statistic leaves open, and what it comes from.

        A sample that was visited once has the variance of all. Of the caption of a decoy nothing is known, since it was
        trained with another.
        """
        average, visits = memory[:, _AVERAGE], memory[:, _VISITS].nan_to_num(0)
        variance = memory[:, _VARIANCE].where(visits > 1, self.noise)
        error = (variance * self._trust(visits.clamp(min=1))).sqrt()
        low, high = memory.clone(), memory.clone()
        low[:, _AVERAGE], high[:, _AVERAGE] = average - error, average + error
        decoy = torch.isin(ids, self._decoy_ids(num_samples).to(ids.device))
        p_clean, p_low, p_high = (self.posterior(rows, epoch).where(~decoy, torch.nan) for rows in (memory, low, high))
        return {
            "p_clean": p_clean,
            "p_clean_low": p_low,
            "p_clean_high": p_high,
            "statistic": average,
            "standard_error": error.where(visits > 0, torch.nan),
            "visits": visits,
            "last_epoch": memory[:, _EPOCH],
            "is_decoy": decoy,
        }
