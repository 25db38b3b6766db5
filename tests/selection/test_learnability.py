"""Learnability, alone and joint, against formulas that are written out and against all subsets."""

from collections.abc import Callable
from itertools import combinations
from math import exp, log

import pytest
import torch
from processes import run_on_ranks
from selection.test_selector import N, encode, encode_otherwise, make_batch, make_selector, select
from torch import Tensor

from dissect_clip.config.settings import Config
from dissect_clip.distributed.world import World
from dissect_clip.models.loss import SampleLoss
from dissect_clip.selection import build_strategy
from dissect_clip.selection.pairs import learner_logits, reference_logits
from dissect_clip.selection.strategies.learnability.strategy import (
    Among,
    Jest,
    Learnability,
    chunk_sizes,
    draw_chunks,
    sigmoid_learnability,
    softmax_learnability,
)

Logits = list[list[float]]


def random_logits(size: int, seed: int, spread: float = 1.5) -> tuple[Tensor, Tensor]:
    learner, reference = torch.randn(2, size, size, generator=torch.Generator().manual_seed(seed)).double() * spread
    return learner, reference


def sigmoid_batch(learner: Logits, reference: Logits, chosen: list[int]) -> float:
    """Loss of the sub-batch, not averaged, under the learner minus that under the reference."""

    def loss(logits: Logits) -> float:
        return sum(log(1 + exp(-logits[i][j] if i == j else logits[i][j])) for i in chosen for j in chosen)

    return loss(learner) - loss(reference)


def softmax_among(learner: Logits, reference: Logits, chosen: list[int], place: int) -> float:
    """The own logit, and the normalisers over the chosen pairs, learner minus reference."""

    def loss(logits: Logits) -> float:
        row = log(sum(exp(logits[place][j]) for j in chosen)) if chosen else 0
        column = log(sum(exp(logits[j][place]) for j in chosen)) if chosen else 0
        return (row + column) / 2 - logits[place][place]

    return loss(learner) - loss(reference)


def exhaustive(size: int, count: int, value: Callable[[list[int], int], float]) -> list[int]:
    """The greedy choice by looking at every candidate anew for every pick."""
    chosen: list[int] = []
    for _ in range(count):
        others = [place for place in range(size) if place not in chosen]
        chosen.append(max(others, key=lambda place: value(chosen, place)))
    return chosen


def one_by_one(pair: tuple[Tensor, Among], count: int) -> list[int]:
    return draw_chunks(*pair, chunk_sizes(count, count), noise=None)[0].tolist()


@pytest.mark.parametrize("seed", range(4))
def test_one_by_one_is_the_exhaustive_greedy_choice_of_the_sigmoid_loss(seed):
    learner, reference = random_logits(9, seed)
    tables = learner.tolist(), reference.tolist()
    expected = exhaustive(9, 5, lambda chosen, place: sigmoid_batch(*tables, [*chosen, place]))
    assert one_by_one(sigmoid_learnability(learner, reference), 5) == expected


@pytest.mark.parametrize("seed", range(4))
def test_one_by_one_is_the_exhaustive_greedy_choice_of_the_softmax_loss(seed):
    learner, reference = random_logits(9, seed)
    tables = learner.tolist(), reference.tolist()
    expected = exhaustive(9, 5, lambda chosen, place: softmax_among(*tables, chosen, place))
    assert one_by_one(softmax_learnability(learner, reference), 5) == expected


def test_the_greedy_choice_is_the_best_of_all_where_pairs_say_little_of_each_other():
    learner, reference = random_logits(8, 3, spread=0.02)
    learner -= torch.arange(8.0).double().diag()
    best = max(
        combinations(range(8), 4), key=lambda chosen: sigmoid_batch(learner.tolist(), reference.tolist(), [*chosen])
    )
    assert sorted(one_by_one(sigmoid_learnability(learner, reference), 4)) == list(best)


def test_a_toy_batch_in_which_two_belong_together():
    """Pair 0 is the most learnable alone, 1 and 2 nearly, and 2 has much to learn of 0 that 1 has not."""
    learner = torch.full((3, 3), -9.0).double()
    learner[0, 2] = 4.0
    learner[[0, 1, 2], [0, 1, 2]] = torch.tensor([-2.0, -1.0, -0.9]).double()
    reference = torch.full((3, 3), -9.0).double()
    assert one_by_one(sigmoid_learnability(learner, reference - torch.eye(3)), 2) == [0, 2]
    pairs = combinations(range(3), 2)
    assert max(pairs, key=lambda p: sigmoid_batch(learner.tolist(), (reference - torch.eye(3)).tolist(), [*p])) == (
        0,
        2,
    )


def test_a_chunk_does_not_see_its_own():
    learner, reference = random_logits(10, 1)
    alone, among = sigmoid_learnability(learner, reference)
    first = alone.topk(3).indices.tolist()
    drawn, _ = draw_chunks(alone, among, [3, 3], noise=None)
    tables = learner.tolist(), reference.tolist()
    others = [place for place in range(10) if place not in first]
    others.sort(key=lambda place: sigmoid_batch(*tables, [*first, place]), reverse=True)
    assert drawn.tolist() == [*first, *others[:3]]


@pytest.mark.parametrize(
    ("count", "chunks", "sizes"), [(8, 3, [3, 3, 2]), (2, 16, [1, 1]), (5, 1, [5]), (6, 3, [2, 2, 2])]
)
def test_chunks_are_as_even_as_can_be(count, chunks, sizes):
    assert chunk_sizes(count, chunks) == sizes


def test_pairs_are_drawn_in_proportion_to_the_exponential_of_their_learnability():
    selector = make_selector("jest", rate=0.25)
    candidates = select(selector, make_batch(torch.arange(4)), encode, 0, 0).candidates
    learnability, draws = torch.tensor([-1.0, 0.0, 1.0, 2.0]), 4000
    noise = Jest._noise(candidates, draws)
    counts = torch.zeros(4)
    for number in range(draws):
        drawn, _ = draw_chunks(learnability, lambda chunk: learnability, [1], noise[number : number + 1])
        counts[drawn] += 1
    assert (counts / draws).tolist() == pytest.approx(learnability.softmax(dim=0).tolist(), abs=0.03)


def test_the_gain_sharpens_the_draw():
    batch, chosen = make_batch(torch.arange(N)), {}
    for gain in (1e-6, 1e6):
        selector = make_selector("jest", jest_gain=gain)
        chosen[gain] = {tuple(select(selector, batch, encode, 0, step).index.tolist()) for step in range(12)}
    candidates = select(make_selector("jest"), batch, encode, 0, 0).candidates
    pair = softmax_learnability(learner_logits(candidates), reference_logits(candidates))
    best = draw_chunks(*pair, chunk_sizes(3, 16), noise=None)[0].sort().values
    assert chosen[1e6] == {tuple(best.tolist())}
    assert len(chosen[1e-6]) > 6


def test_learnability_is_the_loss_minus_that_of_the_reference():
    batch = make_batch(torch.arange(N))
    selector = make_selector("learnability")
    selection = select(selector, batch, encode, 0, 0)
    loss = SampleLoss(World(), siglip=False)
    learner, reference = encode(batch), encode_otherwise(batch)
    own = loss(learner.image_features, learner.text_features, learner.logit_scale, None)
    other = loss(reference.image_features, reference.text_features, reference.logit_scale, None)
    assert sorted((own - other).topk(3).indices.tolist()) == selection.index.tolist()


@pytest.mark.parametrize("kind", [Jest, Learnability])
def test_without_a_given_reference_it_warms_up_uniformly_and_scores_nothing(kind):
    name = kind.__name__.lower()
    config = Config.of(select=True, select_strategy=name, select_rate=0.2, warmup_point=3, warmup_select_rate=0.5)
    strategy = build_strategy(config)
    assert isinstance(strategy, kind)
    assert [strategy.rate(epoch) for epoch in (0, 2, 3)] == [0.5, 0.5, 0.2]
    assert [bool(strategy.needs_in(epoch)) for epoch in (0, 2, 3)] == [False, False, True]


def _losses_on_rank(world: World) -> list[float]:
    selector = make_selector("learnability", world)
    candidates = select(selector, make_batch(torch.arange(N) + N * world.rank), encode, 0, 0).candidates
    return (candidates.loss - candidates.reference_loss).tolist()


@pytest.mark.dist
def test_both_losses_are_against_the_pairs_of_all_ranks():
    whole = select(make_selector("learnability"), make_batch(torch.arange(2 * N)), encode, 0, 0).candidates
    first, second = run_on_ranks(2, _losses_on_rank)
    expected = (whole.loss - whole.reference_loss).tolist()
    assert [*first, *second] == pytest.approx(expected, rel=1e-4, abs=1e-5)


def test_a_pair_that_is_not_finite_under_the_reference_is_left_out():
    selector = make_selector("jest", rate=0.8)

    def broken(batch):
        encoded = encode_otherwise(batch)
        encoded.text_features[4] = torch.nan
        return encoded

    selection = select(selector, make_batch(torch.arange(N)), encode, 0, 0, broken)
    assert 4 not in selection.index
    assert selector.not_finite == 1
    assert selection.candidates.reference_text_features.isfinite().all()
