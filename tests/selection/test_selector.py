"""The selector: how many, which, at what cost, and the same on any number of ranks."""

from dataclasses import replace
from typing import Any

import pytest
import torch
from processes import run_on_ranks
from torch import Tensor
from torch.nn.functional import normalize

from dissect_clip.config.options import StrategyOptions
from dissect_clip.config.settings import Config
from dissect_clip.data.batch import Batch
from dissect_clip.distributed.world import World
from dissect_clip.selection import STRATEGIES, Candidates, Choice, Needs, Selection, Strategy, build_selection
from dissect_clip.selection.strategy import kept
from dissect_clip.selection.top_k import replace_unusable, top_k
from dissect_clip.training.scoring import Encoded
from dissect_clip.training.step import Scoring, score_and_choose, unselected_features

SAMPLES, N = 40, 10
SCORING = [name for name in STRATEGIES if STRATEGIES[name].scores and not STRATEGIES[name].reuses]


def make_selector(name: str, world: World | None = None, rate: float = 0.3, **changes: object) -> Selection:
    settings: dict[str, object] = {"warmup_point": 1, "warmup_select_rate": rate, "scan_warmup": 0} | changes
    if Needs.REFERENCE in STRATEGIES.class_of(name).needs:
        settings |= {"select_reference": "given"}
    config = Config.of(select=True, select_strategy=name, select_rate=rate, **settings)  # type: ignore[arg-type]
    selector = build_selection(config, SAMPLES, world or World())
    assert selector is not None
    return selector


def make_batch(ids: Tensor) -> Batch:
    """A batch whose features follow from the ids alone."""
    return Batch(ids[:, None, None, None].float().expand(-1, 3, 2, 2), ids[:, None], ids)


def encode(batch: Batch) -> Encoded:
    phase = batch.sample_id[:, None].float() * torch.tensor([0.7, 1.1, 1.9])
    return Encoded(normalize(phase.sin(), dim=1), normalize((phase * 1.3).cos(), dim=1), torch.tensor(10.0), None)


def encode_otherwise(batch: Batch) -> Encoded:
    """Under the reference model."""
    phase = batch.sample_id[:, None].float() * torch.tensor([0.4, 1.7, 0.9, 2.3])
    return Encoded(normalize(phase.cos(), dim=1), normalize((phase * 0.8).sin(), dim=1), torch.tensor(20.0), None)


def never(batch: Batch) -> Encoded:
    raise AssertionError("there should be no scoring pass here")


def score_and_select(
    selector: Selection, batch: Batch, scorer: Scoring, epoch: int, step: int, reference: Scoring = encode_otherwise
) -> tuple[Choice, Encoded | None]:
    """The choice of a training step, and what was scored for it; a choice before it need not have been trained on."""
    selector.epoch = epoch
    selector._waiting.clear()
    return score_and_choose(selector, batch, scorer, reference, step)


def select(*arguments: Any, **others: Any) -> Choice:
    return score_and_select(*arguments, **others)[0]


@pytest.mark.parametrize(
    ("rate", "size", "expected"), [(0.3, 10, 3), (1.0, 7, 7), (0.01, 10, 1), (0.5, 1, 1), (0.35, 10, 4)]
)
def test_kept(rate, size, expected):
    assert kept(rate, size) == expected


def test_top_k_takes_the_largest_and_keeps_their_order():
    generator = torch.Generator().manual_seed(0)
    assert top_k(torch.tensor([1.0, 9.0, 3.0, 7.0]), 2, generator).tolist() == [1, 3]


def test_top_k_breaks_ties_uniformly():
    generator = torch.Generator().manual_seed(0)
    counts = torch.zeros(6)
    for _ in range(3000):
        counts[top_k(torch.zeros(6), 2, generator)] += 1
    assert counts.min() > 900
    assert counts.max() < 1100


def test_top_k_takes_what_is_not_finite_last():
    rank = torch.tensor([torch.nan, -5.0, torch.inf, -6.0])
    assert top_k(rank, 2, torch.Generator().manual_seed(0)).tolist() == [1, 3]


@pytest.mark.parametrize(
    ("index", "unusable", "expected"),
    [
        ([1, 4], [], [1, 4]),
        ([1, 4], [0], [1, 4]),
        ([1, 4], [4], [1, 1]),  # the first usable place is 0 for the first turn, 1 for the second
        ([0, 2], [0, 1], [2, 2]),
        ([0, 1, 2], [1, 2, 3, 4], [0, 0, 0]),
        ([0, 1], [0, 1, 2, 3, 4], [0, 1]),
    ],
)
def test_places_that_are_not_usable_are_replaced(index, unusable, expected):
    usable = torch.ones(5, dtype=torch.bool)
    usable[unusable] = False
    assert replace_unusable(torch.tensor(index), usable).tolist() == expected


def encode_with_broken(batch: Batch) -> Encoded:
    """Ids 2 and 5 have no finite features."""
    encoded = encode(batch)
    broken = torch.isin(batch.sample_id, torch.tensor([2, 5]))[:, None]
    return replace(encoded, image_features=encoded.image_features.where(~broken, torch.nan))


@pytest.mark.parametrize("name", SCORING)
@pytest.mark.parametrize("rate", [0.3, 0.9])
def test_a_sample_without_a_finite_score_is_left_out_and_counted(name, rate):
    selector = make_selector(name, rate=rate)
    batch = make_batch(torch.arange(N))
    for epoch in (0, 1):
        selection = select(selector, batch, encode_with_broken, epoch, epoch)
        assert len(selection.index) == kept(rate, N)
        assert not {2, 5} & set(selection.index.tolist())
        assert len(set(selection.index.tolist())) == min(kept(rate, N), N - 2)
    assert selector.not_finite.item() == 4
    if selector.strategy.remembers:
        assert selector.store.scores[[2, 5]].isnan().all()
        assert selector.store.scores[[0, 1, 3, 4, 6, 7, 8, 9]].isfinite().all()
    candidates = selection.candidates
    if candidates is not None and candidates.loss is not None:
        assert candidates.loss[[0, 1, 3, 4, 6, 7, 8, 9]].isfinite().all()


def test_features_of_the_pairs_that_are_not_chosen_are_handed_on():
    selection, scored = score_and_select(make_selector("clipscore"), make_batch(torch.arange(N)), encode, 0, 0)
    others = unselected_features(scored, selection)
    rest = [place for place in range(N) if place not in selection.index.tolist()]
    encoded = encode(make_batch(torch.tensor(rest)))
    assert torch.equal(others, torch.cat([encoded.image_features, encoded.text_features], dim=1))


def test_what_is_not_finite_is_handed_on_as_zeros():
    batch = make_batch(torch.arange(N))
    selection, scored = score_and_select(make_selector("clipscore"), batch, encode_with_broken, 0, 0)
    others = unselected_features(scored, selection)
    assert others.isfinite().all()
    assert others.eq(0).all(dim=1).sum() == 2


@pytest.mark.parametrize("name", STRATEGIES)
@pytest.mark.parametrize("size", [1, N])
def test_keeps_k_distinct_places(name, size):
    selector = make_selector(name)
    for epoch in (0, 1):
        index = select(selector, make_batch(torch.arange(size)), encode, epoch, epoch).index
        assert len(index) == kept(selector.strategy.rate(epoch), size)
        assert index.unique().numel() == len(index)
        assert (index.diff() > 0).all()


@pytest.mark.parametrize("name", STRATEGIES)
def test_the_same_place_in_training_gives_the_same_choice(name):
    first, second = make_selector(name), make_selector(name)
    batch = make_batch(torch.arange(N))
    for step in range(3):
        assert torch.equal(
            select(first, batch, encode, step, step).index, select(second, batch, encode, step, step).index
        )


def test_random_choices_differ_between_steps_and_ranks():
    batch = make_batch(torch.arange(N))
    choices = [
        tuple(select(make_selector("random", World(rank=rank, size=1)), batch, never, 0, step).index.tolist())
        for rank in range(4)
        for step in range(4)
    ]
    assert len(set(choices)) > 8


@pytest.mark.parametrize("name", STRATEGIES)
def test_rate_one_keeps_the_batch_as_it_is_without_scoring(name):
    selection = select(make_selector(name, rate=1.0), make_batch(torch.arange(N)), never, 0, 0)
    assert selection.index.tolist() == list(range(N))


def test_a_strategy_that_needs_no_scores_ranks_and_remembers_all_the_same():
    class LeastVisited(Strategy):
        remembers = ("visits",)

        def rank(self, candidates: Candidates) -> Tensor:
            return -candidates.memory[:, 0].nan_to_num()

        def remember(self, candidates: Candidates) -> Tensor:
            return candidates.memory.nan_to_num() + 1

    config, world = Config.of(select=True, select_rate=0.5), World()
    selector = Selection.from_strategy(LeastVisited(StrategyOptions(), config.plan()), config, SAMPLES, world)
    select(selector, make_batch(torch.arange(5)), never, 0, 0)
    assert select(selector, make_batch(torch.arange(N)), never, 0, 1).index.tolist() == [5, 6, 7, 8, 9]
    assert selector.store.scores[:N, 0].tolist() == [2.0] * 5 + [1.0] * 5


def test_warmup_on_all_data_still_takes_scores():
    selector = make_selector("warmup_base_sampling", warmup_select_rate=1.0)
    selection = select(selector, make_batch(torch.arange(N)), encode, 0, 0)
    assert selection.index.tolist() == list(range(N))
    assert selector.store.scores[:N].isfinite().all()


def test_record_scores_also_where_all_is_kept():
    selection = select(make_selector("clipscore", rate=1.0, record=True), make_batch(torch.arange(N)), encode, 0, 0)
    assert selection.candidates is not None


def test_loss_is_the_clip_loss_of_the_batch_by_sample():
    selector = make_selector("small_loss")
    batch = make_batch(torch.arange(N))
    candidates = select(selector, batch, encode, 0, 0).candidates
    encoded = encode(batch)
    logits = 10 * encoded.image_features @ encoded.text_features.T
    expected = [-(logits[i].log_softmax(0)[i] + logits[:, i].log_softmax(0)[i]).item() / 2 for i in range(N)]
    assert candidates.loss.tolist() == pytest.approx(expected, rel=1e-5)


def _select_on_rank(world: World, name: str) -> tuple[list[list[float]], list[float]]:
    selector = make_selector(name, world)
    losses: list[float] = []
    for step in range(4):
        ids = torch.arange(N) + N * ((world.rank + step) % world.size)
        candidates = select(selector, make_batch(ids), encode, step, step).candidates
        if candidates is not None and candidates.loss is not None:
            losses = candidates.loss.tolist()
    return selector.store.scores.nan_to_num(-1).tolist(), losses


@pytest.mark.dist
def test_two_ranks_share_scores_and_losses():
    for name in ("historical_base_sampling", "small_loss"):
        (store0, losses0), (store1, losses1) = run_on_ranks(2, _select_on_rank, name)
        assert store0 == store1
        whole = select(
            make_selector("small_loss"), make_batch(torch.arange(2 * N)), encode, 0, 0
        ).candidates.loss.tolist()
        if losses0:
            assert losses1 + losses0 == pytest.approx(whole, rel=1e-5)  # in the last step rank 1 has the first ids
        else:
            assert sum(row != [-1.0] for row in store0) == 2 * N
