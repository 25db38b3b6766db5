"""negCLIPLoss against its formula, and beside the loss that it is made from."""

from math import exp, log

import pytest
import torch
from selection.test_selector import N, encode, make_batch, make_selector, select

from dissect_clip.selection.strategies.negcliploss.strategy import NegCLIPLoss, normaliser


def test_the_normaliser_by_hand():
    """Two sub-batches, {0, 2} and {1, 3}: each pair's images and captions are those of its own alone."""
    cosine = torch.randn(4, 4, generator=torch.Generator().manual_seed(1)).double() / 3
    table, temperature = cosine.tolist(), 0.2
    expected = []
    for i, others in enumerate([(0, 2), (1, 3), (0, 2), (1, 3)]):
        row = log(sum(exp(table[i][j] / temperature) for j in others))
        column = log(sum(exp(table[j][i] / temperature) for j in others))
        expected.append(temperature * (row + column) / 2)
    found = normaliser(cosine, torch.tensor(temperature).double(), torch.tensor([0, 1, 0, 1]))
    assert found.tolist() == pytest.approx(expected)


def test_over_the_whole_batch_the_order_is_that_of_small_loss():
    batch = make_batch(torch.arange(N))
    whole = make_selector("negcliploss", negcliploss_batch_size=N)
    candidates = select(whole, batch, encode, 0, 0).candidates
    small = select(make_selector("small_loss"), batch, encode, 0, 0).candidates
    rank = whole.strategy.rank(candidates)
    torch.testing.assert_close(rank, -small.loss / encode(batch).logit_scale)


@pytest.mark.parametrize(
    ("size", "wanted", "sizes"), [(10, 3, [4, 3, 3]), (10, 10, [10]), (10, 99, [10]), (9, 3, [3, 3, 3])]
)
def test_sub_batches_are_a_partition_of_even_parts(size, wanted, sizes):
    selector = make_selector("negcliploss", negcliploss_batch_size=wanted)
    strategy = selector.strategy
    assert isinstance(strategy, NegCLIPLoss)
    candidates = select(selector, make_batch(torch.arange(size)), encode, 0, 0).candidates
    parts = [strategy._parts(candidates, size) for _ in range(2)]
    for part in parts:
        assert sorted(part.bincount().tolist(), reverse=True) == sizes
    assert len(sizes) == 1 or not torch.equal(*parts)


def test_by_default_a_sub_batch_is_as_large_as_what_is_trained_on():
    selector = make_selector("negcliploss", rate=0.5)
    candidates = select(selector, make_batch(torch.arange(N)), encode, 0, 0).candidates
    assert selector.strategy._parts(candidates, N).bincount().tolist() == [N // 2] * 2


def test_many_partitions_come_to_the_mean_over_all():
    """Of four pairs in two halves there are three partitions."""
    batch = make_batch(torch.arange(4))
    selector = make_selector("negcliploss", negcliploss_batches=3000, negcliploss_batch_size=2)
    candidates = select(selector, batch, encode, 0, 0).candidates
    cosine = candidates.image_features @ candidates.text_features.T
    halves = [torch.tensor(part) for part in ([0, 0, 1, 1], [0, 1, 0, 1], [0, 1, 1, 0])]
    mean = sum(normaliser(cosine, torch.tensor(0.1), half) for half in halves) / 3
    torch.testing.assert_close(selector.strategy.rank(candidates), cosine.diagonal() - mean, atol=5e-3, rtol=0)


def test_a_temperature_of_its_own():
    batch = make_batch(torch.arange(N))
    fixed = make_selector("negcliploss", negcliploss_batch_size=N, negcliploss_temperature=0.5)
    candidates = select(fixed, batch, encode, 0, 0).candidates
    cosine = candidates.image_features @ candidates.text_features.T
    expected = cosine.diagonal() - normaliser(cosine, torch.tensor(0.5), torch.zeros(N))
    torch.testing.assert_close(fixed.strategy.rank(candidates), expected)
