"""Several strategies as one: positions, sums, columns and rates."""

import pytest
import torch
from selection.test_reuse import encode, train
from selection.test_selector import SAMPLES, N, make_batch, never, select
from selection.test_strategies import make_candidates

from dissect_clip.config.settings import Config
from dissect_clip.distributed.world import World
from dissect_clip.errors import SetupError
from dissect_clip.selection import Needs, Strategy, build_selection, build_strategy
from dissect_clip.selection.strategies.combination import positions

DISSECT = "warmup_base_sampling:0.7+small_loss:0.3"
BOTH = "historical_base_sampling:1+warmup_base_sampling:1"


def make_config(text: str, **changes: object) -> Config:
    settings: dict[str, object] = {"warmup_point": 2, "warmup_select_rate": 0.9, "select_rate": 0.5} | changes
    return Config.of(select=True, select_strategy=text, **settings)  # type: ignore[arg-type]


def make_strategy(text: str, **changes: object) -> Strategy:
    return build_strategy(make_config(text, **changes))


@pytest.mark.parametrize(
    ("rank", "expected"),
    [
        ([5.0, 1.0, 3.0], [1, 0, 0.5]),
        ([2.0, 2.0, 7.0, 1.0, 9.0], [0.375, 0.375, 0.75, 0, 1]),
        ([0.0, 0.0, 0.0], [0.5] * 3),
        ([torch.nan, 4.0, 1.0, 8.0], [0.5, 0.5, 0, 1]),
        ([torch.nan, torch.nan], [0.5, 0.5]),
        ([-torch.inf, 3.0, torch.inf], [0, 0.5, 1]),
        ([7.0], [0]),
    ],
)
def test_positions(rank: list[float], expected: list[float]):
    assert positions(torch.tensor(rank)).tolist() == pytest.approx(expected)


def test_the_rank_is_the_weighted_sum_of_the_positions():
    candidates = make_candidates(memory=torch.linspace(10, 60, 8)[:, None])
    strategy = make_strategy(DISSECT)
    delta = 100 * candidates.similarity.clamp(min=0) - candidates.memory[:, 0]
    first, second = (value.argsort(descending=True).argsort() / 7 for value in (delta, candidates.loss))
    torch.testing.assert_close(strategy.rank(candidates), 0.7 * first + 0.3 * second)


def test_of_a_strategy_that_chooses_a_set_the_order_of_its_picks_counts():
    candidates = make_candidates(memory=torch.linspace(10, 60, 8)[:, None])
    strategy = make_strategy("warmup_base_sampling:0.7+divbs:0.3")
    delta = candidates.memory[:, 0] - 100 * candidates.similarity.clamp(min=0)
    picks = make_strategy("divbs").rank(candidates)
    expected = 0.7 * delta.argsort().argsort() / 7 + 0.3 * picks.argsort().argsort() / 7
    torch.testing.assert_close(strategy.rank(candidates), expected)
    assert strategy.needs == Needs.SCORE | Needs.FEATURES


def test_it_needs_what_any_needs_and_remembers_what_all_remember():
    strategy = make_strategy(BOTH + "+small_loss:2")
    assert strategy.needs == Needs.SCORE | Needs.LOSS
    assert strategy.remembers == ("historical_base_sampling_clip_score", "warmup_base_sampling_clip_score")


def test_each_looks_at_its_own_columns():
    candidates = make_candidates(memory=torch.rand(8, 2) * 100)
    alone = [
        positions(make_strategy(name).rank(make_candidates(memory=candidates.memory[:, [i]])))
        for i, name in enumerate(["historical_base_sampling", "warmup_base_sampling"])
    ]
    torch.testing.assert_close(make_strategy(BOTH).rank(candidates), alone[0] + alone[1])


def test_who_does_not_remember_leaves_its_column():
    strategy = make_strategy(BOTH)
    candidates = make_candidates(epoch=2, memory=torch.rand(8, 2))  # after the warm-up
    values = strategy.remember(candidates)
    assert torch.equal(values[:, 1], candidates.memory[:, 1])
    assert not torch.equal(values[:, 0], candidates.memory[:, 0])
    assert make_strategy(DISSECT).remember(make_candidates(epoch=2)) is None


def test_the_rate_is_that_of_the_first():
    assert [make_strategy(DISSECT).rate(epoch) for epoch in (0, 1, 2)] == [0.9, 0.9, 0.5]
    other = make_strategy("small_loss:0.3+warmup_base_sampling:0.7")
    assert [other.rate(epoch) for epoch in (0, 1, 2)] == [0.5, 0.5, 0.5]


def test_in_its_warm_up_a_strategy_decides_nothing():
    candidates = make_candidates(epoch=0)
    strategy = make_strategy(DISSECT)
    assert torch.equal(strategy.rank(candidates).argsort(), candidates.loss.argsort(descending=True))


@pytest.mark.parametrize("name", ["infobatch", "scan"])
def test_strategies_with_a_plan_of_their_own_are_refused(name: str):
    with pytest.raises(SetupError, match=f"{name} cannot be combined"):
        make_strategy(f"small_loss:1+{name}:1")


@pytest.mark.parametrize("refresh", [1.0, 0.2])
def test_it_selects_and_remembers_through_the_selector(refresh: float):
    config = make_config(BOTH, score_refresh=refresh, select_rate=0.3, warmup_point=1)
    selector = build_selection(config, SAMPLES, World())
    assert selector is not None
    for step in range(4):
        ids = torch.randperm(SAMPLES, generator=torch.Generator().manual_seed(step))[:N]
        chosen = train(selector, make_batch(ids), step, step, encode)
        assert len(chosen) == (9 if step == 0 and selector.strategy.rate(0) == 0.9 else 3)
    known = selector.store.scores.isfinite().sum(dim=0)
    assert known[0] >= known[1] > 0


def test_at_rate_one_it_scores_nothing():
    config = make_config(DISSECT, select_rate=1.0, warmup_select_rate=1.0)
    selector = build_selection(config, SAMPLES, World())
    assert selector is not None
    assert select(selector, make_batch(torch.arange(N)), never, 3, 0).index.tolist() == list(range(N))
