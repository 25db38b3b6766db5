"""Two parts of one distribution of scores: clean pairs, which lie higher, and mismatched pairs.

Without further knowledge two Gaussians with one variance are fitted (as Li et al., "DivideMix", ICLR 2020, with two).
With decoys the scores of mismatched pairs are known, and no shape is assumed for either part.

Shapes: N samples, F of them fitted to, P decoys, G places of a curve.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import astuple, dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

FIT_ROWS = 1 << 16
"""Samples that the parts are fitted to, at most."""

CURVE = 33
"""G, places of the curve that decoys give."""

_FEWEST = 32
"""Samples to fit to, and half as many decoys, at least."""

_TAIL = 0.15
"""Borders with a smaller share of the decoys below them are not used: too few to count."""

_ENDS = (0.001, 0.999)
"""Quantiles of all samples between which the curve lies; it is constant outside."""

_ITERATIONS = 1000

Floats = NDArray[np.float64]


@dataclass(frozen=True)
class Parts:
    """The two parts. Picklable; numbers only, see :meth:`numbers`."""

    share: float  # of the samples that are clean, in (0, 1)
    low_mean: float
    low_deviation: float
    high_mean: float
    high_deviation: float
    lowest: float = 0.0  # decoys: value at the first place of the curve
    highest: float = 0.0  # decoys: value at the last place of the curve
    curve: tuple[float, ...] = ()  # decoys: [G] P(clean) at values from lowest to highest, equally spaced

    def numbers(self) -> tuple[float, ...]:
        """All seven scalars, and with decoys the G of the curve."""
        *first, curve = astuple(self)
        return (*first, *curve)

    @classmethod
    def of(cls, numbers: Sequence[float]) -> Parts:
        """The parts with these :meth:`numbers`."""
        share, low_mean, low_deviation, high_mean, high_deviation, lowest, highest, *curve = numbers
        return cls(share, low_mean, low_deviation, high_mean, high_deviation, lowest, highest, tuple(curve))

    def clean(self, values: Tensor) -> Tensor:
        """P(clean) [N] of samples with these ``values`` [N]. It never falls as the value rises; NaN for NaN."""
        if self.curve:
            return self._on_curve(values)
        below, above = (values - self.low_mean) / self.low_deviation, (values - self.high_mean) / self.high_deviation
        log_odds = (below.square() - above.square()) / 2
        return torch.sigmoid(log_odds + float(np.log(self.share) - np.log1p(-self.share)))

    def _on_curve(self, values: Tensor) -> Tensor:
        # Non-blocking: a copy that waits would hold the step up.
        curve = torch.tensor(self.curve, dtype=values.dtype).to(values.device, non_blocking=True)
        place = ((values - self.lowest) / (self.highest - self.lowest)).clamp(0, 1) * (len(curve) - 1)
        left = place.nan_to_num(0).floor().long().clamp(max=len(curve) - 2)
        between = place - left
        return curve[left] * (1 - between) + curve[left + 1] * between


def _numbers_to_fit(values: Tensor) -> Floats | None:
    """``values`` [F] as numbers; None if they are too few, or all but equal."""
    numbers: Floats = values.double().cpu().numpy()
    if len(numbers) < _FEWEST or not np.ptp(numbers) > 1e-6 * max(1.0, float(np.abs(numbers).max())):
        return None
    return numbers


def fit_gaussians(values: Tensor) -> Parts | None:
    """Two Gaussians with one variance, fitted to ``values`` [F], finite.

    None for fewer than 32 values, or values that are all but equal.
    """
    numbers = _numbers_to_fit(values)
    if numbers is None:
        return None
    from sklearn.exceptions import ConvergenceWarning  # takes a second to import, and few runs need it
    from sklearn.mixture import GaussianMixture

    variance = max(float(numbers.var()), 1e-12)
    mixture = GaussianMixture(
        n_components=2,
        covariance_type="tied",
        tol=1e-7,
        reg_covar=1e-6 * variance,
        max_iter=_ITERATIONS,
        weights_init=[0.5, 0.5],
        means_init=np.quantile(numbers, [0.25, 0.75])[:, None],
        precisions_init=[[1 / variance]],
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)  # parts that overlap much move by ever less
        mixture.fit(numbers[:, None])
    deviation = float(np.sqrt(mixture.covariances_.item()))
    low, high = np.argsort(mixture.means_[:, 0], kind="stable")
    mean = mixture.means_[:, 0]
    share = min(max(float(mixture.weights_[high]), 1e-3), 1 - 1e-3)
    return Parts(share, float(mean[low]), deviation, float(mean[high]), deviation)


def _weighted(values: Floats, weight: Floats) -> tuple[float, float]:
    """Mean and standard deviation."""
    mean = float(np.average(values, weights=weight))
    return mean, float(np.sqrt(np.average((values - mean) ** 2, weights=weight)))


def _density(values: Floats, at: Floats, width: float) -> Floats:
    """Density of ``values``, smoothed with a Gaussian of this ``width``, at the places ``at`` [G]."""
    return np.array([np.exp(-(((values - place) / width) ** 2) / 2).mean() / width for place in at])


def _share_of_wrong(values: Floats, decoys: Floats) -> float:
    """The share of mismatched pairs among ``values`` [F], when ``decoys`` [P] are samples of mismatched pairs.

    At least this share, times the share of the decoys below a border, of all samples lies below that border. So each
    border gives an upper bound, and the smallest counts (Blanchard et al., "Semi-supervised novelty detection", JMLR
    2010).
    """
    borders = np.sort(decoys)
    below = np.arange(1, len(borders) + 1) / (len(borders) + 1)  # of a further decoy, on average
    all_below = np.searchsorted(np.sort(values), borders) / len(values)
    return min(1.0, float((all_below / below)[below >= _TAIL].min()))


def fit_decoys(values: Tensor, decoys: Tensor) -> Parts | None:
    """Bayes' rule with the decoys as samples of the mismatched part, for ``values`` [F], finite, of all other samples.

    P(clean) = 1 - share of mismatched pairs * density(``decoys`` [P]) / density(``values``). Both densities are
    smoothed with the same width, by Silverman's rule for the decoys, and P(clean) is made to rise by isotonic
    regression. None for fewer than 32 values or 16 decoys, or if they are all but equal.
    """
    numbers, wrong_values = _numbers_to_fit(values), decoys.double().cpu().numpy()
    if numbers is None or 2 * len(wrong_values) < _FEWEST or not np.ptp(wrong_values) > 0:
        return None
    from sklearn.isotonic import IsotonicRegression  # takes a second to import, and few runs need it

    wrong = _share_of_wrong(numbers, wrong_values)
    lowest, highest = map(float, np.quantile(numbers, _ENDS))
    spread = min(float(wrong_values.std()), float(np.subtract(*np.quantile(wrong_values, [0.75, 0.25]))) / 1.34)
    width = max(1.5 * spread * len(wrong_values) ** -0.2, (highest - lowest) / CURVE)
    places = np.linspace(lowest, highest, CURVE)
    everything = _density(numbers, places, width)
    ratio = _density(wrong_values, places, width) / np.maximum(everything, 1e-12)
    rising = IsotonicRegression(y_min=0, y_max=1, increasing=True)
    curve = tuple(map(float, rising.fit_transform(places, 1 - wrong * ratio, sample_weight=everything)))
    low = (float(wrong_values.mean()), float(wrong_values.std()))
    clean = Parts(1 - wrong, 0.0, 0.0, 0.0, 0.0, lowest, highest, curve).clean(torch.from_numpy(numbers)).numpy()
    high = _weighted(numbers, clean) if clean.sum() > 0 else (highest, 0.0)
    return Parts(float(clean.mean()), *low, *high, lowest, highest, curve)
