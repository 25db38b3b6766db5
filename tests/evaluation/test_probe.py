"""The linear probe beside an independently written logistic regression, and its search for lambda."""

import pytest
import torch
from torch.nn import functional as F

from dissect_clip.distributed.world import World
from dissect_clip.errors import TrainingError
from dissect_clip.evaluation import probe
from dissect_clip.evaluation.common import LabelledFeatures
from dissect_clip.evaluation.metrics import Accuracy
from dissect_clip.evaluation.probe import LAMBDAS, choose_weight, fit, join, linear_probe, score, split_off


@pytest.fixture
def sklearn():
    return pytest.importorskip("sklearn", reason="scikit-learn is not installed")


def clusters(count, noise, num_classes=4, seed=0):
    """Unit features around an axis for each class, which they tell where there is little noise."""
    generator = torch.Generator().manual_seed(seed)
    label = torch.arange(count) % num_classes
    image = torch.eye(8)[label] + noise * torch.randn(count, 8, generator=generator)
    return LabelledFeatures(F.normalize(image, dim=1), label)


def independent_fit(data, weight, num_classes):
    """Gradient descent, with second-order steps, on the same objective in float64."""
    features = torch.cat([data.image.double(), torch.ones(len(data.label), 1, dtype=torch.float64)], dim=1)
    parameters = torch.zeros(num_classes, features.shape[1], dtype=torch.float64, requires_grad=True)

    def objective(flat):
        matrix = flat.view(num_classes, -1)
        loss = F.cross_entropy(features @ matrix.T, data.label, reduction="sum")
        return loss + weight / 2 * matrix[:, :-1].square().sum()

    flat = parameters.detach().reshape(-1)
    for _ in range(40):  # Newton's method; the intercepts' common shift costs nothing, hence the ridge
        gradient = torch.autograd.functional.jacobian(objective, flat)
        hessian = torch.autograd.functional.hessian(objective, flat) + 1e-9 * torch.eye(len(flat), dtype=torch.float64)
        flat = flat - torch.linalg.solve(hessian, gradient)
    return flat.view(num_classes, -1)


@pytest.mark.parametrize("weight", [0.1, 1.0, 30.0])
def test_a_fit_is_the_minimum_of_the_objective(sklearn, weight):
    data = clusters(60, 0.5)
    expected = independent_fit(data, weight, 4)
    weights, intercepts, complete = fit(data, weight)
    assert complete
    torch.testing.assert_close(weights, expected[:, :-1], atol=1e-3, rtol=1e-3)
    torch.testing.assert_close(
        intercepts - intercepts.mean(), expected[:, -1] - expected[:, -1].mean(), atol=1e-3, rtol=1e-3
    )


def test_features_that_tell_the_classes_are_told_apart(sklearn):
    train, validation, test = (clusters(count, 0.05, seed=seed) for seed, count in enumerate((40, 20, 30)))
    found = linear_probe(train, validation, test, 4, World())
    expected = independent_fit(join(train, validation), found.weight, 4)
    answer = (test.image.double() @ expected[:, :-1].T + expected[:, -1]).argmax(dim=1)
    assert (answer == test.label).all()
    assert (found.accuracy.top1, found.accuracy.mean_per_class_recall, found.accuracy.num_images) == (1, 1, 30)


def test_accuracy_on_hard_features_is_that_of_the_independent_fit(sklearn):
    train, test = clusters(80, 0.7), clusters(50, 0.7, seed=1)
    expected = independent_fit(train, 1.0, 4)
    answer = (test.image.double() @ expected[:, :-1].T + expected[:, -1]).argmax(dim=1)
    found, _ = score(train, test, 1.0, 4)
    assert found.top1 == pytest.approx((answer == test.label).double().mean().item())
    assert 0.3 < found.top1 < 1


@pytest.mark.parametrize("num_classes", [2, 3])
def test_a_class_without_training_images_is_never_the_answer(sklearn, num_classes):
    train, test = clusters(30, 0.05, num_classes), clusters(20, 0.05, num_classes + 1, seed=1)
    found, _ = score(train, test, 1.0, num_classes + 1)
    assert found.top1 == pytest.approx((test.label < num_classes).double().mean().item())


@pytest.mark.parametrize("peak", [0, 5, 16, 37, 48, 63, 96])
def test_the_search_finds_the_peak_in_few_fits(monkeypatch, peak):
    fits = []

    def peaked(train, test, weight, num_classes):
        place = min(range(len(LAMBDAS)), key=lambda i: abs(LAMBDAS[i] / weight - 1))
        fits.append(place)
        return Accuracy(1 - abs(place - peak) / 100, 1, 1, 1), True

    monkeypatch.setattr(probe, "score", peaked)
    data = clusters(4, 0.1)
    assert choose_weight(data, data, 4, World()) == pytest.approx(float(LAMBDAS[peak]))
    assert len(fits) == len(set(fits)) <= 7 + 2 * 4


def test_of_equal_values_the_strongest_regularisation_is_taken(monkeypatch):
    monkeypatch.setattr(probe, "score", lambda *_: (Accuracy(0.5, 1, 1, 1), True))
    data = clusters(4, 0.1)
    assert choose_weight(data, data, 4, World()) == LAMBDAS[-1]


def test_the_grid_is_that_of_the_paper():
    assert len(LAMBDAS) == 97  # 96 steps
    assert (LAMBDAS[0], LAMBDAS[-1]) == pytest.approx((1e-6, 1e6))
    assert LAMBDAS[8] / LAMBDAS[0] == pytest.approx(10)


def test_fits_that_do_not_end_are_reported(monkeypatch, caplog, sklearn):
    monkeypatch.setattr(probe, "MAX_ITERATIONS", 1)
    data = clusters(40, 0.5)
    choose_weight(data, data, 4, World())
    assert "fits did not end in 1 iterations" in caplog.text


@pytest.mark.parametrize("count", [2, 3, 50])
def test_a_split_is_a_draw_without_loss_that_the_seed_decides(count):
    data = LabelledFeatures(torch.arange(count, dtype=torch.float32)[:, None], torch.arange(count))
    first, second = split_off(data, 0.2, seed=1)
    assert sorted(first.label.tolist() + second.label.tolist()) == list(range(count))
    assert len(second.label) == max(1, round(0.2 * count))
    assert torch.equal(first.image[:, 0].long(), first.label)
    again = split_off(data, 0.2, seed=1)[1]
    assert torch.equal(again.label, second.label)
    if count == 50:
        assert not torch.equal(split_off(data, 0.2, seed=2)[1].label, second.label)


def test_too_little_to_learn_from_is_refused(sklearn):
    with pytest.raises(TrainingError, match="cannot be split"):
        split_off(clusters(1, 0.1), 0.2, 0)
    with pytest.raises(TrainingError, match="all of one class"):
        fit(clusters(5, 0.1, num_classes=1), 1.0)
    one, two = clusters(5, 0.1, num_classes=1), clusters(5, 0.1)
    with pytest.raises(TrainingError, match="all of one class"):
        linear_probe(one, two, two, 2, World(rank=3, size=8))


def test_features_that_are_not_finite_are_refused():
    good, bad = clusters(8, 0.1), clusters(8, 0.1)
    bad.image[3, 0] = torch.nan
    with pytest.raises(TrainingError, match="1 of 8 test images are not finite"):
        linear_probe(good, good, bad, 4, World())
