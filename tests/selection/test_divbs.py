"""DivBS against the same picks made with explicit bases, and its gradients against autograd."""

from itertools import combinations

import pytest
import torch
from torch import Tensor
from torch.nn.functional import normalize

from dissect_clip.config.settings import Config
from dissect_clip.distributed.world import World
from dissect_clip.models.loss import SampleLoss
from dissect_clip.selection import Candidates, build_strategy
from dissect_clip.selection.strategies.divbs import feature_gradients, greedy_span


def random_vectors(count: int = 12, width: int = 9, seed: int = 0) -> Tensor:
    vectors = torch.randn(count, width, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return vectors * torch.linspace(0.2, 2, count, dtype=torch.float64)[:, None] + 0.3


def representativeness(vectors: Tensor, chosen: list[int]) -> float:
    """Squared length of the sum of all vectors within the span of the chosen ones, by an orthonormal basis."""
    basis = torch.linalg.qr(vectors[chosen].T).Q
    return (basis.T @ vectors.sum(dim=0)).square().sum().item()


def best_next(vectors: Tensor, chosen: list[int]) -> int:
    """The pick after ``chosen``, with everything projected anew."""
    total = vectors.sum(dim=0)
    if chosen:
        basis = torch.linalg.qr(vectors[chosen].T).Q
        total = total - basis @ (basis.T @ total)
    others = [place for place in range(len(vectors)) if place not in chosen]
    return max(others, key=lambda place: (vectors[place] @ total).abs().item())


@pytest.mark.parametrize("seed", range(4))
def test_each_pick_is_the_best_one(seed):
    vectors = random_vectors(seed=seed)
    picks, _ = greedy_span(vectors, 8)
    chosen: list[int] = []
    for pick in picks.tolist():
        assert pick == best_next(vectors, chosen)
        chosen.append(pick)


def test_by_hand():
    """Of (3, 0), (2, 0), (0, 2), (0, 1) the sum is (5, 3); after the first only (0, 3) is left of it."""
    vectors = torch.tensor([[3.0, 0], [2, 0], [0, 2], [0, 1]])
    picks, gain = greedy_span(vectors, 1)
    assert picks.tolist() == [0]
    assert gain.tolist() == [0, 0, 36, 9]
    assert greedy_span(vectors, 2)[0].tolist() == [0, 2]


def test_of_orthogonal_vectors_the_picks_are_the_best_subset():
    vectors = torch.linalg.qr(random_vectors(7, 7)).Q * torch.arange(1.0, 8).double()[:, None]
    picks, _ = greedy_span(vectors, 3)
    best = max(combinations(range(7), 3), key=lambda chosen: representativeness(vectors, list(chosen)))
    assert sorted(picks.tolist()) == list(best)


def test_picks_are_distinct_and_cover_a_copy_once():
    vectors = torch.cat([random_vectors(5, 3), random_vectors(5, 3), torch.zeros(2, 3)])
    picks, gain = greedy_span(vectors, 9)
    assert picks.unique().numel() == 9
    assert torch.linalg.matrix_rank(vectors[picks[:3]]) == 3
    assert gain.max() < 1e-12  # nothing is left of the sum


def candidates(siglip: bool = False, size: int = 6) -> Candidates:
    random = torch.Generator().manual_seed(5)
    image, text = normalize(torch.randn(2, size, 4, generator=random), dim=-1)
    return Candidates(
        epoch=0,
        generator=random,
        memory=torch.zeros(size, 0),
        image_features=image,
        text_features=text,
        logit_scale=torch.tensor(6.0),
        logit_bias=torch.tensor(-2.0) if siglip else None,
    )


@pytest.mark.parametrize("siglip", [False, True])
def test_gradients_are_those_of_the_loss(siglip):
    known = candidates(siglip)
    image, text = known.image_features.clone().requires_grad_(), known.text_features.clone().requires_grad_()
    loss = SampleLoss(World(), siglip)(normalize(image, dim=1), normalize(text, dim=1), *scalars(known)).sum()
    expected = torch.cat(torch.autograd.grad(loss, (image, text)), dim=1)
    torch.testing.assert_close(feature_gradients(known, siglip), expected, rtol=1e-4, atol=1e-5)


def scalars(known: Candidates) -> tuple[Tensor, Tensor | None]:
    return known.logit_scale, known.logit_bias


def test_the_kept_share_is_what_is_picked_in_its_order():
    known = candidates(size=10)
    rank = build_strategy(Config.of(select_rate=0.4, select_strategy="divbs")).rank(known)
    picks, _ = greedy_span(feature_gradients(known, sigmoid=False), 4)
    assert rank.argsort(descending=True)[:4].tolist() == picks.tolist()
