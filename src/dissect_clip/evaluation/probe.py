"""Linear probe: logistic regression on frozen image features, its regularisation chosen on a validation split.

As in Radford et al. 2021, appendix A.3: scikit-learn's L-BFGS with at most 1,000 iterations; lambda from a grid of
eight steps a decade between 1e-6 and 1e6, searched from every second decade inwards by halving the interval around the
best; then training and validation split together. Features are those of CLIP_benchmark, what ``encode_image`` gives,
scaled to length one (the paper takes those before the last projection).

Shapes: M images, C classes, D features, P values of lambda.
"""

from __future__ import annotations

import logging
import warnings
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from dissect_clip.distributed.world import World
from dissect_clip.errors import TrainingError
from dissect_clip.evaluation.common import LabelledFeatures, share
from dissect_clip.evaluation.metrics import Accuracy, accuracy, best_rank, class_counts
from dissect_clip.seeding import Stream, derive_seed

log = logging.getLogger(__name__)

STEPS_PER_DECADE = 8
LAMBDAS = 10.0 ** (np.arange(12 * STEPS_PER_DECADE + 1) / STEPS_PER_DECADE - 6)
"""[97] float64, 1e-6 to 1e6."""
_FIRST_STEP = 2 * STEPS_PER_DECADE

MAX_ITERATIONS = 1000
TOLERANCE = 1e-6
"""Of the gradient. scikit-learn's 1e-4 is met at the start where many classes share features of length one."""


@dataclass(frozen=True, slots=True)
class Probe:
    """A probe's result on the test split."""

    accuracy: Accuracy
    weight: float  # lambda of the L2 penalty lambda / 2 * |W|^2 beside the summed cross entropies


def split_off(data: LabelledFeatures, proportion: float, seed: int) -> tuple[LabelledFeatures, LabelledFeatures]:
    """Two parts of a set, the second of ``proportion`` of it, by a draw that depends on the seed and its size alone.

    Raises:
        TrainingError: there are fewer than two images.
    """
    count = len(data.label)
    if count < 2:
        raise TrainingError(f"linear probe: {count} training images cannot be split; there must be more")
    generator = torch.Generator().manual_seed(derive_seed(seed, Stream.PROBE))
    order = torch.randperm(count, generator=generator).to(data.label.device)
    second = min(max(1, round(proportion * count)), count - 1)
    parts = (order[second:].sort().values, order[:second].sort().values)
    first, rest = (LabelledFeatures(data.image[index], data.label[index]) for index in parts)
    return first, rest


def join(first: LabelledFeatures, second: LabelledFeatures) -> LabelledFeatures:
    """One set after the other."""
    return LabelledFeatures(torch.cat([first.image, second.image]), torch.cat([first.label, second.label]))


def _arrays(data: LabelledFeatures) -> tuple[NDArray[np.float64], NDArray[np.int64]]:
    return data.image.cpu().numpy().astype(np.float64), data.label.cpu().numpy()


def fit(data: LabelledFeatures, weight: float) -> tuple[Tensor, Tensor, bool]:
    """The linear classifier with the least summed cross entropy plus ``weight`` / 2 * |W|^2; intercepts are free.

    Of two classes W is the difference of their weights, one vector.

    Returns:
        weights [C, D] and intercepts [C] float64 on the CPU, of the classes that occur, in rising order; whether the
        search came to its end.

    Raises:
        TrainingError: fewer than two classes occur.
    """
    from sklearn.exceptions import ConvergenceWarning
    from sklearn.linear_model import LogisticRegression

    features, labels = _arrays(data)
    if len(np.unique(labels)) < 2:
        raise TrainingError("linear probe: the training images are all of one class")
    model = LogisticRegression(C=1 / weight, max_iter=MAX_ITERATIONS, tol=TOLERANCE)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)
        model.fit(features, labels)
    weights, intercepts = torch.from_numpy(model.coef_), torch.from_numpy(model.intercept_)
    if len(weights) == 1:  # of two classes scikit-learn keeps the second's
        weights, intercepts = torch.cat([-weights, weights]) / 2, torch.cat([-intercepts, intercepts]) / 2
    return weights, intercepts, bool((model.n_iter_ < MAX_ITERATIONS).all())


def score(train: LabelledFeatures, test: LabelledFeatures, weight: float, num_classes: int) -> tuple[Accuracy, bool]:
    """Accuracy on ``test`` of a classifier fitted to ``train``; whether the fit came to its end. Not collective.

    Classes that no training image has are never the answer.
    """
    weights, intercepts, complete = fit(train, weight)
    label = test.label.cpu()
    known = test.image.cpu().double() @ weights.T + intercepts
    logits = torch.full((len(label), num_classes), known.min().item() - 1, dtype=torch.float64)
    logits[:, train.label.bincount().nonzero()[:, 0].cpu()] = known
    rank = best_rank(logits, label[:, None] == torch.arange(num_classes))
    return accuracy(class_counts(rank, label, num_classes)), complete


def choose_weight(train: LabelledFeatures, validation: LabelledFeatures, num_classes: int, world: World) -> float:
    """The lambda of the grid with the best accuracy on the validation split, as the search finds it. Collective.

    Of equal ones the largest. Each rank fits some of the values that are tried at a time.
    """
    tried: dict[int, float] = {}
    incomplete = 0

    def attempt(places: Sequence[int]) -> None:
        nonlocal incomplete
        new = [place for place in dict.fromkeys(places) if 0 <= place < len(LAMBDAS) and place not in tried]
        mine = [score(train, validation, float(LAMBDAS[new[i]]), num_classes) for i in share(len(new), world)]
        rows = torch.tensor([[found.top1, float(complete)] for found, complete in mine])
        every = world.all_gather_uneven(rows.reshape(-1, 2).to(world.device)).cpu()
        tried.update(zip(new, every[:, 0].tolist(), strict=True))
        incomplete += int((every[:, 1] == 0).sum())

    def best() -> int:
        return max(tried, key=lambda place: (tried[place], place))

    attempt(range(0, len(LAMBDAS), _FIRST_STEP))
    step = _FIRST_STEP // 2
    while step:
        attempt([best() - step, best() + step])
        step //= 2
    if incomplete:
        log.warning("Linear probe: %d of %d fits did not end in %d iterations", incomplete, len(tried), MAX_ITERATIONS)
    return float(LAMBDAS[best()])


def linear_probe(
    train: LabelledFeatures, validation: LabelledFeatures, test: LabelledFeatures, num_classes: int, world: World
) -> Probe:
    """Choose lambda on the validation split, train on both, and classify the test split. Collective.

    Arguments and result are equal on all ranks.

    Raises:
        TrainingError: features are not finite, or the training images are all of one class.
    """
    for name, part in (("training", train), ("validation", validation), ("test", test)):
        bad = int((~part.image.isfinite().all(dim=1)).sum())
        if bad:
            raise TrainingError(f"linear probe: features of {bad} of {len(part.label)} {name} images are not finite")
    if (train.label == train.label[0]).all():  # which not all ranks would meet in the search
        raise TrainingError("linear probe: the training images are all of one class")
    with world.watchdog.suspend_timeout():  # a fit takes as long as it takes
        weight = choose_weight(train, validation, num_classes, world)
        found, _ = world.on_main(lambda: score(join(train, validation), test, weight, num_classes))
    return Probe(found, weight)
