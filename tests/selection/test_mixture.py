"""Two parts of a distribution: found where they are, and the probability of the upper one."""

import dataclasses
import math

import pytest
import torch
from torch import Tensor

from dissect_clip.selection.strategies.clean_posterior.mixture import Parts, fit_decoys, fit_gaussians


def mixed(size: int = 20000, share: float = 0.6, low: float = 0.0, high: float = 4.0, seed: int = 0):
    """Values of two Gaussians with a deviation of 1, and which are of the upper one."""
    random = torch.Generator().manual_seed(seed)
    upper = torch.rand(size, generator=random) < share
    values = torch.randn(size, generator=random) + torch.where(upper, high, low)
    return values.double(), upper


def test_gaussians_are_found_where_they_are():
    values, _ = mixed()
    parts = fit_gaussians(values)
    assert parts is not None
    assert parts.share == pytest.approx(0.6, abs=0.02)
    assert (parts.low_mean, parts.high_mean) == pytest.approx((0.0, 4.0), abs=0.05)
    assert (parts.low_deviation, parts.high_deviation) == pytest.approx((1.0, 1.0), abs=0.05)


def test_both_have_one_variance():
    values, upper = mixed()
    values[upper] = 4 + (values[upper] - 4) / 2
    parts = fit_gaussians(values)
    assert parts is not None
    assert parts.low_deviation == parts.high_deviation


def density(value: Tensor, mean: float, deviation: float) -> Tensor:
    return torch.exp(-(((value - mean) / deviation) ** 2) / 2) / deviation


def test_the_probability_is_bayes_rule():
    parts = Parts(0.7, 0.5, 1.2, 2.0, 1.2)
    values = torch.tensor([-1.0, 0.3, 1.0, 2.0]).double()
    high, low = 0.7 * density(values, 2.0, 1.2), 0.3 * density(values, 0.5, 1.2)
    torch.testing.assert_close(parts.clean(values), high / (high + low))


def some_decoys() -> Tensor:
    return torch.randn(200, generator=torch.Generator().manual_seed(7)).double()


MODELS = {"gaussians": fit_gaussians, "decoys": lambda values: fit_decoys(values, some_decoys())}


@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize(("low", "stretch"), [(0.0, 1.0), (3.0, 1.0), (0.0, 5.0), (0.0, 0.2)])
def test_the_probability_never_falls_and_is_one(model: str, low: float, stretch: float):
    values, upper = mixed(4000, low=low)
    values[upper] = 4 + (values[upper] - 4) * stretch
    parts = MODELS[model](values)
    assert parts is not None
    clean = parts.clean(torch.linspace(-30, 30, 500).double())
    assert (clean.diff() >= -1e-12).all()
    assert ((clean >= 0) & (clean <= 1)).all()
    assert parts.low_mean <= parts.high_mean


def test_it_is_calibrated_where_the_model_holds():
    values, upper = mixed(high=2.5)
    parts = fit_gaussians(values)
    assert parts is not None
    clean = parts.clean(values)
    for low in (0.0, 0.25, 0.5, 0.75):
        inside = (clean >= low) & (clean < low + 0.25)
        assert upper[inside].double().mean() == pytest.approx(clean[inside].mean().item(), abs=0.05)


@pytest.mark.parametrize("model", MODELS)
def test_nothing_is_known_of_what_is_not_known(model: str):
    values, _ = mixed(1000)
    parts = MODELS[model](values)
    assert parts is not None
    assert parts.clean(torch.tensor([math.nan, 1.0]).double()).isnan().tolist() == [True, False]


@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize("values", [torch.arange(31.0), torch.full((1000,), 3.7), torch.empty(0)])
def test_too_few_or_equal_values_have_no_parts(model: str, values: Tensor):
    assert MODELS[model](values) is None


@pytest.mark.parametrize("model", MODELS)
def test_the_same_values_have_the_same_parts_and_numbers_hold_all_of_it(model: str):
    values, _ = mixed(1000)
    first, second = MODELS[model](values), MODELS[model](values.float())
    assert first is not None
    assert second is not None
    assert first.numbers() == pytest.approx(second.numbers(), rel=1e-3, abs=1e-3)
    assert Parts.of(first.numbers()) == first
    assert dataclasses.replace(first, share=0.5) != first


@pytest.mark.parametrize("share", [0.95, 0.8, 0.6])
def test_decoys_tell_the_share_where_the_parts_overlap(share: float):
    found = []
    for seed in range(20):
        values, _ = mixed(4000, share, high=1.2, seed=seed)
        decoys = torch.randn(126, generator=torch.Generator().manual_seed(100 + seed)).double()
        parts = fit_decoys(values, decoys)
        assert parts is not None
        found.append(parts.share)
    assert sum(found) / len(found) == pytest.approx(share, abs=0.06)
