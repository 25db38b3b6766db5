"""SCAN: the cycle, the candidates, and what is learned when."""

import pytest
import torch
from selection.test_selector import SAMPLES, N, make_batch, make_selector, never, select

from dissect_clip.config.settings import Config
from dissect_clip.selection import Candidates, build_preselector, build_strategy
from dissect_clip.selection.strategies.scan.strategy import Scan, places
from dissect_clip.selection.top_k import top_k


def make_strategy(rate: float = 0.4, **changes: object) -> Scan:
    strategy = build_strategy(Config.of(select=True, select_strategy="scan", select_rate=rate, **changes))  # type: ignore[arg-type]
    assert isinstance(strategy, Scan)
    return strategy


def choose(strategy: Scan, place: torch.Tensor, epoch: int, seed: int = 0) -> list[int]:
    """The places in a batch that are left out."""
    generator = torch.Generator().manual_seed(seed)
    rank = strategy.rank(Candidates(epoch=epoch, generator=generator, memory=place[:, None]))
    kept = top_k(rank, round(strategy.rate(epoch) * len(place)), generator)
    return sorted(set(range(len(place))) - set(kept.tolist()))


def test_the_rate_goes_in_cycles_after_the_warm_up():
    strategy = make_strategy(scan_warmup=2, scan_period=3)
    cycle = [1, 1 - 0.25 * 0.6, 1 - 0.75 * 0.6, 0.4]
    assert [strategy.rate(epoch) for epoch in range(10)] == pytest.approx([1, 1, *cycle, *cycle])


def test_the_papers_setting_leaves_out_thirty_per_cent_on_average():
    strategy = make_strategy(scan_warmup=0)
    assert sum(map(strategy.rate, range(4))) / 4 == pytest.approx(0.7)


def test_full_epochs_at_the_end_and_schedules_count():
    strategy = make_strategy(scan_warmup=0, epochs=8, select_full_last=0.125)
    assert strategy.rate(6) < 1
    assert strategy.rate(7) == 1
    linear = make_strategy(scan_warmup=0, epochs=8, select_rate_schedule="linear")
    assert linear.rate(3) == pytest.approx(1 - 0.6 * 3 / 7)  # the height of the first cycle
    assert linear.rate(7) == pytest.approx(0.4)


def test_at_its_height_a_cycle_leaves_out_the_smallest_and_the_largest():
    place = torch.linspace(0, 1, 20)[torch.randperm(20, generator=torch.Generator().manual_seed(2))]
    left = choose(make_strategy(scan_warmup=0), place, epoch=3)
    order = place.argsort().tolist()
    assert left == sorted(order[:6] + order[-6:])


@pytest.mark.parametrize(("share", "low", "high"), [(0.0, 0, 12), (1.0, 12, 0), (0.25, 3, 9)])
def test_the_share_of_the_redundant(share: float, low: int, high: int):
    left = choose(make_strategy(scan_warmup=0, scan_redundant=share), torch.linspace(0, 1, 20), epoch=3)
    assert left == [*range(low), *range(20 - high, 20)]


def test_before_its_height_it_draws_among_the_candidates():
    strategy, place = make_strategy(scan_warmup=0), torch.linspace(0, 1, 20)
    draws = [choose(strategy, place, epoch=1, seed=seed) for seed in range(300)]
    assert {len(left) for left in draws} == {3}  # a quarter of the 12 candidates
    counts = torch.bincount(torch.tensor(draws).flatten(), minlength=20)
    assert counts[6:14].eq(0).all()
    assert counts[:6].min() > 40
    assert counts[14:].min() > 40


def test_what_was_never_seen_is_no_candidate():
    place = torch.full((20,), torch.nan)
    place[:16] = torch.linspace(0, 1, 16)
    assert not set(choose(make_strategy(scan_warmup=0), place, epoch=3)) & {16, 17, 18, 19}


def test_places_of_values():
    assert places(torch.tensor([3.0, 1.0, 2.0, 9.0, 4.0])).tolist() == [0.5, 0, 0.25, 1, 0.75]
    assert places(torch.tensor([3.0])).tolist() == [0]


def test_it_chooses_before_loading():
    selector = make_selector("scan", rate=0.4, scan_warmup=0)
    selector.store.scores[:, 0] = torch.linspace(0, 1, SAMPLES)
    chooser = build_preselector(Config.of(select=True, select_strategy="scan", select_before_load=True), selector)
    chooser.publish(selector.store.scores)
    ids, first = torch.arange(SAMPLES), torch.ones(SAMPLES, dtype=torch.bool)
    choice = chooser(ids, first, 3, 0)
    assert sorted(choice.order[: choice.count].tolist()) == list(range(12, 28))
    assert chooser(ids, first, 4, 0).count == SAMPLES  # the next preparation


def test_it_learns_from_preparations_alone():
    selector = make_selector("scan", rate=0.4, scan_warmup=1, scan_period=2)
    learned = []
    for epoch in range(6):
        selector.start_epoch(epoch)
        learned.append(selector.learns_losses)
    assert learned == [False, True, False, False, True, False]
    batch, loss = make_batch(torch.arange(N)), torch.arange(10.0).flip(0)
    select(selector, batch, never, 1, 1)
    selector.learn(batch.sample_id, loss)
    assert selector.store.scores[:N, 0].tolist() == pytest.approx([(9 - place) / 9 for place in range(10)])
    left = set(range(N)) - set(select(selector, batch, never, 3, 3).index.tolist())
    assert left == {0, 1, 2, 7, 8, 9}
