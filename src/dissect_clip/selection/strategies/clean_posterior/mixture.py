"""Two parts of one distribution: samples whose pairs are clean, and samples whose pairs are not, told by one number.

The clean part is the upper one. Models of the parts: two Gaussians (Li et al., "DivideMix", ICLR 2020), with variances
of their own or one in common, two beta distributions (Arazo et al., "Unsupervised label noise modeling and loss
correction", ICML 2019), or nothing but a quantile that parts them. Or the wrong part is known from decoys, and nothing
is assumed of the shape of either.

Shapes: N samples, F of them fitted to, P decoys, G places of a curve.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from dataclasses import astuple, dataclass, replace

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

FIT_ROWS = 1 << 16
"""Samples that the parts are fitted to, at most."""

DECOYS = "decoys"
"""The model that needs decoys."""

CURVE = 33
"""G, places of the curve that decoys give."""

_FEWEST = 32
"""Samples to part, and half as many decoys, at least."""

_TAIL = 0.15
"""Share of the decoys, the lowest, that are too few to count by."""

_ENDS = (0.001, 0.999)
"""Quantiles of all samples where the curve begins and ends; outside it is level."""

_ITERATIONS = 1000
_EDGE = 1e-3
"""How near to 0 and 1 what beta distributions are fitted to may come."""

Floats = NDArray[np.float64]
Found = tuple[float, float, float, float, float]
"""Share of the clean part, then mean and standard deviation of the lower and of the upper part."""


@dataclass(frozen=True)
class Parts:
    """The two parts. Picklable; floats, see :meth:`numbers`."""

    model: str  # one of MODELS, or DECOYS
    share: float  # of the samples that are clean, in (0, 1)
    low_mean: float
    low_deviation: float
    high_mean: float
    high_deviation: float
    lowest: float  # beta: the value that stands for 0; quantile: the first that counts as clean; decoys: of the curve
    highest: float  # beta: the value that stands for 1; decoys: of the curve
    curve: tuple[float, ...] = ()  # decoys: [G] the probability at values from lowest to highest, equally spaced

    def numbers(self) -> tuple[float, ...]:
        """All but the model: seven, and the G of the curve with decoys."""
        *first, curve = astuple(self)[1:]
        return (*first, *curve)

    @classmethod
    def of(cls, model: str, numbers: Sequence[float]) -> Parts:
        """Those of :meth:`numbers`."""
        share, low_mean, low_deviation, high_mean, high_deviation, lowest, highest, *curve = numbers
        return cls(
            model, share, low_mean, low_deviation, high_mean, high_deviation, lowest, highest, tuple(curve)
        )  # fmt: skip

    def clean(self, values: Tensor) -> Tensor:
        """The probability [N] that each of ``values`` [N] is of the clean part. It never falls; NaN for NaN."""
        if self.model == "quantile":
            return (values >= self.lowest).to(values.dtype).where(values.isfinite(), torch.nan)
        if self.model == DECOYS:
            return self._on_curve(values)
        log_odds = self._beta(values) if self.model == "beta" else self._gaussian(values)
        return torch.sigmoid(log_odds + float(np.log(self.share) - np.log1p(-self.share)))

    def _gaussian(self, values: Tensor) -> Tensor:
        low, high = self.low_deviation, self.high_deviation
        # The log odds are a parabola, which rises on one side of its vertex alone: beyond it they stay what they are.
        bend = 1 / high**2 - 1 / low**2
        if abs(bend) > 1e-6 / (low * high):
            vertex = (self.high_mean / high**2 - self.low_mean / low**2) / bend
            values = values.clamp(max=vertex) if bend > 0 else values.clamp(min=vertex)
        below, above = (values - self.low_mean) / low, (values - self.high_mean) / high
        return (below.square() - above.square()) / 2 + float(np.log(low / high))

    def _on_curve(self, values: Tensor) -> Tensor:
        # Non-blocking: a copy that waits would hold the step up.
        curve = torch.tensor(self.curve, dtype=values.dtype).to(values.device, non_blocking=True)
        place = ((values - self.lowest) / (self.highest - self.lowest)).clamp(0, 1) * (len(curve) - 1)
        left = place.nan_to_num(0).floor().long().clamp(max=len(curve) - 2)
        between = place - left
        return curve[left] * (1 - between) + curve[left + 1] * between

    def _beta(self, values: Tensor) -> Tensor:
        width = self.highest - self.lowest
        low = beta_shape((self.low_mean - self.lowest) / width, self.low_deviation / width)
        high = beta_shape((self.high_mean - self.lowest) / width, self.high_deviation / width)
        scaled = ((values - self.lowest) / width).clamp(_EDGE, 1 - _EDGE)
        left, right = high[0] - low[0], high[1] - low[1]
        if left > 0 and right > 0:  # rises up to here
            scaled = scaled.clamp(max=left / (left + right))
        elif left < 0 and right < 0:  # rises from here on
            scaled = scaled.clamp(min=left / (left + right))
        constant = _log_beta(*low) - _log_beta(*high)
        return left * scaled.log() + right * torch.log1p(-scaled) + constant


def _log_beta(a: float, b: float) -> float:
    return float(torch.lgamma(torch.tensor([a, b, a + b], dtype=torch.float64)) @ torch.tensor([1.0, 1, -1]).double())


def beta_shape(mean: float, deviation: float) -> tuple[float, float]:
    """The two shape parameters of the beta distribution with this mean in (0, 1) and standard deviation."""
    mean = min(max(mean, _EDGE), 1 - _EDGE)
    both = max(mean * (1 - mean) / max(deviation, _EDGE) ** 2 - 1, _EDGE)
    return mean * both, (1 - mean) * both


def _gaussians(values: Floats, covariance: str) -> Found:
    from sklearn.exceptions import ConvergenceWarning  # takes a second to import, and few runs need it
    from sklearn.mixture import GaussianMixture

    variance = max(float(values.var()), 1e-12)
    mixture = GaussianMixture(
        n_components=2,
        covariance_type=covariance,
        tol=1e-7,
        reg_covar=1e-6 * variance,
        max_iter=_ITERATIONS,
        weights_init=[0.5, 0.5],
        means_init=np.quantile(values, [0.25, 0.75])[:, None],
        precisions_init=[[1 / variance]] if covariance == "tied" else np.full((2, 1, 1), 1 / variance),
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)  # parts that overlap much move by ever less
        mixture.fit(values[:, None])
    deviations = np.sqrt(np.broadcast_to(mixture.covariances_.reshape(-1), 2))
    low, high = np.argsort(mixture.means_[:, 0], kind="stable")
    mean = mixture.means_[:, 0]
    found = (float(mean[low]), float(deviations[low]), float(mean[high]), float(deviations[high]))
    return float(mixture.weights_[high]), *found


def _weighted(values: Floats, weight: Floats) -> tuple[float, float]:
    """Mean and standard deviation."""
    mean = float(np.average(values, weights=weight))
    return mean, float(np.sqrt(np.average((values - mean) ** 2, weights=weight)))


def _betas(values: Floats, lowest: float, highest: float) -> Found:
    """Expectation maximisation whose second step takes each part's mean and variance (Arazo et al., section 3.1)."""
    middle = np.median(values)
    clean = np.where(values > middle, 0.9, 0.1)
    for _ in range(_ITERATIONS):
        found = (float(clean.mean()), *_weighted(values, 1 - clean), *_weighted(values, clean))
        parts = Parts("beta", *found, lowest, highest)
        before, clean = clean, parts.clean(torch.from_numpy(values)).numpy().clip(1e-6, 1 - 1e-6)
        if np.abs(clean - before).max() < 1e-4:
            break
    low, high = found[1:3], found[3:5]
    return (found[0], *low, *high) if low[0] <= high[0] else (1 - found[0], *high, *low)


def _fit_tied(values: Floats, quantile: float) -> Parts:
    return Parts("tied", *_gaussians(values, "tied"), 0.0, 0.0)


def _fit_own(values: Floats, quantile: float) -> Parts:
    return Parts("gaussian", *_gaussians(values, "full"), 0.0, 0.0)


def _fit_beta(values: Floats, quantile: float) -> Parts:
    lowest, highest = float(values.min()), float(values.max())
    return Parts("beta", *_betas(values, lowest, highest), lowest, highest)


def _fit_quantile(values: Floats, quantile: float) -> Parts:
    border = float(np.quantile(values, quantile))
    clean = (values >= border).astype(np.float64)
    # A border at the very lowest leaves nothing below.
    low = _weighted(values, 1 - clean) if clean.min() < 1 else (border, 0.0)
    return Parts("quantile", float(clean.mean()), *low, *_weighted(values, clean), border, border)


MODELS: dict[str, Callable[[Floats, float], Parts]] = {
    "tied": _fit_tied,
    "gaussian": _fit_own,
    "beta": _fit_beta,
    "quantile": _fit_quantile,
}
"""Models of the two parts by name."""


def _density(values: Floats, at: Floats, width: float) -> Floats:
    """Of ``values`` smoothed by a Gaussian of this ``width``, at places [G]."""
    return np.array([np.exp(-(((values - place) / width) ** 2) / 2).mean() / width for place in at])


def _share_of_wrong(values: Floats, decoys: Floats) -> float:
    """The share of ``values`` [F] that is of the part which ``decoys`` [P] are samples of.

    Of all samples at least this share times the part of the decoys below a border lies below it, too. So each border
    is an upper bound, and the least counts (Blanchard et al., "Semi-supervised novelty detection", JMLR 2010).
    """
    borders = np.sort(decoys)
    below = np.arange(1, len(borders) + 1) / (len(borders) + 1)  # of a further decoy, on average
    all_below = np.searchsorted(np.sort(values), borders) / len(values)
    return min(1.0, float((all_below / below)[below >= _TAIL].min()))


def _fit_decoys(values: Floats, decoys: Floats) -> Parts:
    """Bayes' rule with the decoys as samples of the wrong part: P(clean) = 1 - share of wrong * f(decoys) / f(all).

    Both densities are smoothed alike, by Silverman's rule for the decoys, and P(clean) is made to rise, by isotonic
    regression.
    """
    from sklearn.isotonic import IsotonicRegression  # takes a second to import, and few runs need it

    wrong = _share_of_wrong(values, decoys)
    lowest, highest = map(float, np.quantile(values, _ENDS))
    spread = min(float(decoys.std()), float(np.subtract(*np.quantile(decoys, [0.75, 0.25]))) / 1.34)
    width = max(1.5 * spread * len(decoys) ** -0.2, (highest - lowest) / CURVE)
    places = np.linspace(lowest, highest, CURVE)
    everything = _density(values, places, width)
    ratio = _density(decoys, places, width) / np.maximum(everything, 1e-12)
    rising = IsotonicRegression(y_min=0, y_max=1, increasing=True)
    curve = rising.fit_transform(places, 1 - wrong * ratio, sample_weight=everything)
    parts = Parts(DECOYS, 1 - wrong, 0.0, 0.0, 0.0, 0.0, lowest, highest, tuple(map(float, curve)))
    clean = parts.clean(torch.from_numpy(values)).numpy()
    high = _weighted(values, clean) if clean.sum() > 0 else (highest, 0.0)
    low = (float(decoys.mean()), float(decoys.std()))
    return Parts(DECOYS, float(clean.mean()), *low, *high, lowest, highest, parts.curve)


def fit_parts(model: str, values: Tensor, quantile: float = 0.35, decoys: Tensor | None = None) -> Parts | None:
    """The two parts of ``values`` [F], finite; ``quantile`` is the share that a plain quantile puts below.

    ``decoys`` [P] are the values of those, which are not among the others; for the model that needs them.

    None where there is nothing to part: fewer than 32 values, or all but the same, or fewer than 16 decoys.
    """
    numbers = values.double().cpu().numpy()
    if len(numbers) < _FEWEST or not np.ptp(numbers) > 1e-6 * max(1.0, float(np.abs(numbers).max())):
        return None
    if model == DECOYS:
        known = np.empty(0) if decoys is None else decoys.double().cpu().numpy()
        return None if 2 * len(known) < _FEWEST or not np.ptp(known) > 0 else _fit_decoys(numbers, known)
    parts = MODELS[model](numbers, quantile)
    share = min(max(parts.share, 1e-3), 1 - 1e-3)
    return replace(parts, share=share)
