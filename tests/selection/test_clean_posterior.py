"""Drawing by P(clean): what is remembered, what is found, what is drawn; with the selector, ranks and the loader."""

import math
import re

import pytest
import torch
from processes import run_on_ranks
from selection.test_reuse import column, encode, make_config, make_selector, train
from selection.test_selector import SAMPLES, N, make_batch, never, select
from torch import Tensor

from dissect_clip.config.parser import parse_args
from dissect_clip.config.settings import Config
from dissect_clip.distributed.world import World
from dissect_clip.selection import STRATEGIES, Candidates, build_preselector, build_selection, build_strategy
from dissect_clip.selection.strategies.clean_posterior.decoys import decoy_ids
from dissect_clip.selection.strategies.clean_posterior.mixture import FIT_ROWS
from dissect_clip.selection.strategies.clean_posterior.strategy import CleanPosterior

NAME = "clean_posterior"


def make_strategy(**changes: object) -> CleanPosterior:
    """One without decoys, whose weight is P(clean) itself."""
    strategy = build_strategy(make_config(NAME, **({"clean_decoys": 0.0, "clean_exponent": 1.0} | changes)))
    assert isinstance(strategy, CleanPosterior)
    return strategy


def rows(average: Tensor, visits: float = 1.0, epoch: float = 5.0, z: Tensor | None = None) -> Tensor:
    """A store [M, 6] with these averages; the z-scores are the same unless they are given."""
    known = average.isfinite()
    columns = [
        average,
        torch.full_like(average, 0.5),
        torch.full_like(average, visits),
        torch.full_like(average, epoch),
    ]
    columns += [average if z is None else z, torch.zeros_like(average)]
    return torch.stack(columns, dim=1).where(known[:, None], torch.nan)


def two_parts(size: int = 4000, low: float = 0.0, high: float = 3.0) -> tuple[Tensor, Tensor]:
    """Averages of two parts, and which are of the upper one, six of ten."""
    random = torch.Generator().manual_seed(0)
    upper = torch.rand(size, generator=random) < 0.6
    return torch.randn(size, generator=random) * 0.7 + torch.where(upper, high, low), upper


def surveyed(memory: Tensor, epoch: int = 6, **changes: object) -> CleanPosterior:
    strategy = make_strategy(**changes)
    return strategy.with_survey(strategy.survey(memory, epoch))


def candidates(memory: Tensor, epoch: int = 6, seed: int = 0, **parts: Tensor | None) -> Candidates:
    return Candidates(epoch=epoch, generator=torch.Generator().manual_seed(seed), memory=memory[:, :4], **parts)


# ---- what is remembered


def visit(strategy: CleanPosterior, values: list[float], epochs: list[int]) -> Tensor:
    """The row [4] of a sample after these visits."""
    memory = torch.full((1, 4), math.nan)
    for value, epoch in zip(values, epochs, strict=True):
        memory = strategy.remember(candidates(memory, epoch, reused=torch.tensor([value])))
    return memory[0]


def test_visits_are_put_together():
    average, _, visits, last = visit(make_strategy(warmup_point=9), [1.0, 2.0, 3.0], [0, 4, 5]).tolist()
    assert average == pytest.approx(0.5 * (0.5 * 1 + 0.5 * 2) + 0.5 * 3)
    assert (visits, last) == (3, 5)


def test_the_variance_is_that_of_a_visit():
    torch.manual_seed(0)
    size, strategy = 4000, make_strategy(warmup_point=9)
    memory = torch.full((size, 4), math.nan)
    values = []
    for epoch in range(8):
        values.append(torch.randn(size) * 1.5)
        memory = strategy.remember(candidates(memory, epoch, reused=values[-1]))
    assert memory[:, 1].mean().item() == pytest.approx(1.5**2, rel=0.05)
    error = strategy._average_variance(memory[:, 2]) * memory[:, 1]
    assert error.mean().item() == pytest.approx(memory[:, 0].var().item(), rel=0.1)


def test_after_the_warm_up_only_differences_within_a_batch_count():
    memory = rows(torch.tensor([1.0, 2.0, 3.0]))[:, :4]
    values = torch.tensor([7.0, 6.0, 8.0])  # all have risen by 5 on average
    for epoch, shift in ((6, 5.0), (0, 0.0)):
        found = make_strategy().remember(candidates(memory, epoch, reused=values))[:, 0]
        torch.testing.assert_close(found, (memory[:, 0] + values - shift) / 2)


def test_a_sample_that_is_new_after_the_warm_up_is_shifted_with_the_others():
    memory = torch.cat([rows(torch.tensor([1.0, 2.0])), rows(torch.tensor([math.nan]))])[:, :4]
    strategy = make_strategy()
    found = strategy.remember(candidates(memory, 6, reused=torch.tensor([5.0, 6.0, 6.5])))[:, 0]
    assert found.tolist() == pytest.approx([1.0, 2.0, 2.5])
    alone = strategy.remember(candidates(memory[2:], 6, reused=torch.tensor([6.5])))[:, 0]
    assert alone.tolist() == [6.5]


def test_a_first_visit_has_no_variance_yet():
    memory = visit(make_strategy(), [1.5], [3])
    assert memory[1].isnan()
    assert memory[[0, 2, 3]].tolist() == [1.5, 1, 3]


# ---- what is found


def test_the_parts_are_found_and_distinguishes():
    averages, upper = two_parts()
    strategy = surveyed(rows(averages))
    assert strategy.distinguishes
    assert strategy.parts is not None
    assert strategy.parts.share == pytest.approx(0.6, abs=0.03)
    clean = strategy.posterior(rows(averages))
    assert clean[upper].mean() > 0.9
    assert clean[~upper].mean() < 0.1
    assert re.search(r"(59|60|61) % of 4000 samples", strategy.summary)


@pytest.mark.parametrize(("low", "apart"), [(2.0, False), (1.6, False), (1.2, True), (0.0, True), (-1.0, True)])
def test_a_lower_part_far_above_chance_is_no_wrong_part(low: float, apart: bool):
    averages, _ = two_parts(low=low, high=3.0 if low < 2 else 3.5)
    strategy = surveyed(rows(averages))
    assert strategy.distinguishes is apart
    assert ("all samples have the same weight" in strategy.summary) is not apart
    assert strategy.posterior(rows(averages)).isnan().all().item() is not apart


def test_where_nothing_is_known_nothing_is_found():
    strategy = surveyed(torch.full((500, 6), math.nan), epoch=0)
    assert strategy.parts is None
    assert not strategy.distinguishes
    assert "too few scores" in strategy.summary


def test_a_large_set_is_looked_at_in_part_and_every_epoch_in_another():
    averages, _ = two_parts(3 * FIT_ROWS // 2)
    memory = rows(averages)
    strategy = make_strategy()
    first, again, later = (strategy.survey(memory, epoch) for epoch in (6, 6, 7))
    assert list(first) == list(again) != list(later)
    assert first[strategy.survey_names.index("known")] == len(memory)


def test_samples_that_no_epoch_gives_do_not_count():
    averages, _ = two_parts()
    some = torch.cat([averages, torch.full((4000,), math.nan)])
    assert surveyed(rows(some)).parts == surveyed(rows(averages)).parts


# ---- decoys


def with_decoys(share_wrong: float, size: int = 4000, **changes: object) -> tuple[Tensor, Tensor, CleanPosterior]:
    """A store after the warm-up whose wrong pairs, decoys among them, are two lower than the rest.

    Of the samples that are no decoys: their rows, and which are wrong. And what is found.
    """
    strategy = make_strategy(clean_decoys=0.05, **changes)
    random = torch.Generator().manual_seed(1)
    wrong = torch.rand(size, generator=random) < share_wrong
    decoys = decoy_ids(size, 0.05, strategy.run.seed)
    average = torch.randn(size, generator=random) * 0.7 + torch.where(wrong.index_fill(0, decoys, True), 1.0, 3.0)
    memory = rows(average)
    memory = torch.cat([memory[:, :4], average[:, None], memory[:, 4:]], dim=1)
    memory[decoys, :4] = math.nan
    others = torch.ones(size, dtype=torch.bool).index_fill(0, decoys, False)
    return memory[others], wrong[others], strategy.with_survey(strategy.survey(memory, 6))


@pytest.mark.parametrize("share", [0.1, 0.4, 0.8])
def test_with_decoys_the_probability_is_that_of_the_truth(share: float):
    memory, wrong, strategy = with_decoys(share)
    assert strategy.distinguishes
    assert strategy.known == len(memory) == 3800
    assert strategy.known_decoys == 200
    assert strategy.by_decoys is not None
    assert strategy.by_decoys.share == pytest.approx(1 - share, abs=0.1)
    clean = strategy.reported_posterior(memory)
    assert (clean - (~wrong).float()).square().mean() < 0.08
    for low, high in ((0, 0.2), (0.2, 0.8), (0.8, 1.01)):
        inside = (clean >= low) & (clean < high)
        if inside.sum() > 300:
            assert (~wrong)[inside].double().mean().item() == pytest.approx(clean[inside].mean().item(), abs=0.15)
    assert re.search(r"200 decoys estimate that \d+ % of the pairs", strategy.summary)


def test_without_wrong_pairs_decoys_find_none_and_all_have_the_same_chance():
    memory, _, strategy = with_decoys(0.0)
    assert not strategy.distinguishes
    assert "all samples have the same weight" in strategy.summary
    assert strategy.reported_posterior(memory).mean() > 0.97
    found = chances(strategy, memory[:8], k=4, draws=2000)
    assert found.tolist() == pytest.approx([0.5] * 8, abs=0.05)


def test_the_probability_is_that_of_the_warm_up_and_the_draw_that_of_today():
    memory, _, strategy = with_decoys(0.4)
    later = memory.clone()
    later[:, 0] += 1
    assert strategy.reported_posterior(later).equal(strategy.reported_posterior(memory))
    assert (strategy.posterior(later) > strategy.posterior(memory)).double().mean() > 0.9


def test_too_few_decoys_find_nothing():
    strategy = with_decoys(0.4, size=200)[2]
    assert strategy.parts is not None
    assert strategy.by_decoys is None
    assert not strategy.distinguishes
    assert "too few scores" in strategy.summary


def test_what_is_known_of_a_decoy_is_kept_apart():
    first = 2.75
    strategy = make_strategy(clean_decoys=0.05, warmup_point=4)
    decoy = torch.tensor([True, False])
    memory = torch.full((2, 5), math.nan)
    for epoch, value in enumerate((1.0, 2.0, 4.0)):
        memory = strategy.remember(warming(memory, epoch, value, decoy))
    assert memory[0, [0, 1, 3]].isnan().all()
    assert memory[1, [0, 2, 3]].tolist() == pytest.approx([first, 3.0, 2.0])
    assert memory[:, 4].tolist() == pytest.approx([first, first])
    strategy = make_strategy(clean_decoys=0.05, warmup_point=3)
    memory = strategy.remember(warming(memory, 3, 4.0, None))
    assert memory[:, 4].tolist() == pytest.approx([first, first])
    # The drift of the batch, 1.25 of the one sample with an average, is removed.
    assert memory[:, 0].tolist() == pytest.approx([2.75, first])
    assert memory[:, 2].tolist() == [1.0, 4.0]


def warming(memory: Tensor, epoch: int, value: float, decoy: Tensor | None) -> Candidates:
    """Two samples in an epoch, both with this score."""
    return Candidates(
        epoch=epoch, generator=torch.Generator(), memory=memory, reused=torch.tensor([value, value]), decoy=decoy
    )


@pytest.mark.parametrize(("rate", "visits"), [(1.0, 5), (0.5, 2), (0.1, 1)])
def test_the_error_is_that_of_the_visits_in_the_warm_up(rate: float, visits: int):
    memory, _, strategy = with_decoys(0.4, warmup_point=5, warmup_select_rate=rate)
    memory[:, 2] = 20
    error = strategy.sample_report(memory[:50], torch.arange(4000, 4050), 4000, 6)["standard_error"]
    assert error.square().tolist() == pytest.approx(
        (memory[:50, 1] * strategy._average_variance(torch.tensor(float(visits)))).tolist(), rel=1e-5
    )


def test_of_a_decoy_there_is_no_verdict():
    memory, _, strategy = with_decoys(0.4)
    ids = torch.arange(1000, 1100)
    verdict = strategy.sample_report(memory[:100], ids, 4000, 6)
    decoys = torch.isin(ids, decoy_ids(4000, 0.05, strategy.run.seed))
    assert 0 < decoys.sum() < 20
    assert verdict["is_decoy"].equal(decoys)
    for name in ("p_clean", "p_clean_low", "p_clean_high", "statistic", "standard_error"):
        assert verdict[name].isnan().equal(decoys)
    assert (verdict["p_clean_low"] <= verdict["p_clean_high"])[~decoys].all()


# ---- what is drawn


def chances(strategy: CleanPosterior, memory: Tensor, epoch: int = 6, k: int = 1, draws: int = 4000) -> Tensor:
    """How often each is among the k largest."""
    counts = torch.zeros(len(memory))
    for seed in range(draws):
        counts[strategy.rank(candidates(memory, epoch, seed)).topk(k).indices] += 1
    return counts / draws


def knowing(**changes: object) -> CleanPosterior:
    averages, _ = two_parts()
    return surveyed(rows(averages), **changes)


def test_the_first_is_drawn_with_the_weight_as_its_chance():
    strategy = knowing()
    memory = rows(torch.tensor([0.0, 1.4, 1.6, 3.0]))
    clean = strategy.posterior(memory)
    assert chances(strategy, memory).tolist() == pytest.approx((clean / clean.sum()).tolist(), abs=0.03)


@pytest.mark.parametrize(("changes", "weight"), [
    ({"clean_exponent": 2.0}, lambda clean: clean**2),
    ({"clean_exponent": 0.0}, lambda clean: clean**0),
    ({"clean_floor": 0.2}, lambda clean: 0.2 + 0.8 * clean),
])  # fmt: skip
def test_weights(changes, weight):
    strategy = knowing(**changes)
    memory = rows(torch.tensor([0.0, 1.4, 1.6, 3.0]))
    expected = weight(strategy.posterior(memory))
    assert chances(strategy, memory).tolist() == pytest.approx((expected / expected.sum()).tolist(), abs=0.03)


def test_a_sample_that_was_never_seen_has_the_mean():
    strategy = knowing()
    assert strategy.parts is not None
    memory = rows(torch.tensor([math.nan, 3.0]))
    assert strategy.posterior(memory)[0].item() == pytest.approx(strategy.parts.share)


@pytest.mark.parametrize("case", ["warm-up", "one part", "nothing known"])
def test_otherwise_all_have_the_same_chance(case: str):
    averages, _ = two_parts(low=2.5)
    strategy = {"warm-up": knowing(), "one part": surveyed(rows(averages)), "nothing known": make_strategy()}[case]
    memory = rows(torch.tensor([0.0, 1.4, 1.6, 3.0]))
    found = chances(strategy, memory, epoch=0 if case == "warm-up" else 6, k=2)
    assert found.tolist() == pytest.approx([0.5] * 4, abs=0.03)


def test_a_verdict_holds_probability_uncertainty_and_what_it_comes_from():
    strategy = knowing()
    memory = torch.cat(
        [rows(torch.tensor([1.5]), visits=4.0), rows(torch.tensor([1.5])), rows(torch.tensor([math.nan]))]
    )
    verdict = strategy.sample_report(memory, torch.arange(3), 3, 6)
    assert {len(values) for values in verdict.values()} == {3}
    assert verdict["standard_error"].tolist()[:2] == pytest.approx(
        [math.sqrt(0.5 * strategy._average_variance(torch.tensor(4.0))), math.sqrt(strategy.noise)]
    )
    assert verdict["visits"].tolist() == [4, 1, 0]
    assert verdict["statistic"].isnan().tolist() == [False, False, True]
    low, middle, high = (verdict[name][0].item() for name in ("p_clean_low", "p_clean", "p_clean_high"))
    assert low < middle < high
    assert strategy.parts is not None
    assert verdict["p_clean"][2].item() == pytest.approx(strategy.parts.share)
    assert not verdict["is_decoy"].any()


# ---- with the selector


def test_nothing_is_scored_not_even_in_the_first_epoch():
    selector = make_selector(NAME, warmup_select_rate=1.0)
    batch = make_batch(torch.arange(N))
    for epoch in (0, 1, 2):
        selector.start_epoch(epoch)
        assert len(train(selector, batch, epoch, epoch, scorer=never)) == (N if epoch == 0 else 3)
    assert column(selector, "visits")[:N].sum() == N + 3 + 3
    assert column(selector, "visits")[N:].isnan().all()


@pytest.mark.parametrize("refresh", [0.25, 1.0])
def test_a_refresh_scores_more_of_them_and_a_visit_counts_once(refresh: float):
    selector = make_selector(NAME, refresh, warmup_select_rate=1.0)
    batch = make_batch(torch.arange(N))
    train(selector, batch, 0, 0)
    assert column(selector, "visits")[:N].eq(1).all()
    selection = select(selector, batch, encode, 1, 1)
    assert selection.scored == max(2, round(refresh * N))
    train(selector, batch, 1, 1)
    assert column(selector, "visits")[:N].max() == 2
    assert (column(selector, "visits")[:N] == 2).sum() >= selection.scored


def test_what_a_record_holds():
    averages, _ = two_parts(SAMPLES)
    for wanted in (True, False):
        selector = make_selector(NAME, record=wanted, clean_decoys=0.0)
        selector.store.scores[:] = rows(averages)
        selector.start_epoch(6)
        selection = select(selector, make_batch(torch.arange(N)), never, 6, 6)
        if not wanted:
            assert selection.reported is None
            continue
        assert isinstance(selector.strategy, CleanPosterior)
        expected = selector.strategy.posterior(selector.store.scores[:N])
        assert selection.reported is not None
        torch.testing.assert_close(selection.reported[:, 0], expected)


def test_the_loader_draws_by_what_was_found_when_the_epoch_began():
    config = make_config(NAME, rate=0.5, clean_decoys=0.0).replace(select_before_load=True)
    selector = build_selection(config, SAMPLES, World())
    chooser = build_preselector(config, selector)
    assert selector is not None
    assert chooser is not None
    averages, upper = two_parts(SAMPLES)
    selector.store.scores[:] = rows(averages)
    selector.start_epoch(6)
    chooser.publish(selector.store.scores, selector.survey)
    ids = torch.cat([upper.nonzero()[:4, 0], (~upper).nonzero()[:4, 0]])
    choices = [chooser(ids, torch.ones(8, dtype=torch.bool), 6, seed) for seed in range(50)]
    assert {choice.count for choice in choices} == {4}
    picked = torch.stack([choice.order[:4] for choice in choices])
    assert (picked < 4).double().mean() > 0.9


def epoch_on_ranks(world: World) -> tuple[list[float], list[int], list[list[float]]]:
    """An epoch of two ranks with samples of their own: the survey, what was drawn, and the store after it."""
    averages, _ = two_parts(SAMPLES)
    selector = make_selector(NAME, world=world, clean_decoys=0.0)
    selector.store.scores[:] = rows(averages)
    if not world.is_main:
        selector.store.scores[:, 0] += 1e-3  # as on hardware that rounds otherwise
    selector.start_epoch(6)
    chosen = train(selector, make_batch(torch.arange(N) + N * world.rank), 6, 6)
    return list(selector.survey), chosen, selector.store.scores[:, 1:].nan_to_num(-1).tolist()


@pytest.mark.dist
def test_all_ranks_go_by_what_rank_0_has_found_and_learn_the_same():
    first, second = run_on_ranks(2, epoch_on_ranks)
    assert first[0] == second[0]
    assert max(first[1]) < N <= min(second[1])
    assert [row[1] for row in first[2]] == [row[1] for row in second[2]]


# ---- flags


def parse(*words: str) -> Config:
    return parse_args(["--train-data", "x.tar", "--select", "--select-strategy", NAME, *words], STRATEGIES)


def test_by_default_it_is_chosen_before_loading_after_a_warm_up_on_everything():
    config = parse()
    assert (config.selection.select_preset, config.selection.score_refresh, config.selection.select_before_load) == (
        "fast",
        0.0,
        True,
    )
    assert (config.get("warmup_point"), config.get("warmup_select_rate"), config.selection.select_rate) == (
        5,
        1.0,
        0.3,
    )


@pytest.mark.parametrize(
    ("words", "refresh", "before"),
    [
        (["--score-refresh", "0.1"], 0.1, True),
        (["--score-refresh", "1"], 1.0, False),
        (["--select-preset", "exact"], 1.0, False),
        (["--dataset-resampled", "--train-num-samples", "1000"], 0.0, False),
    ],
)
def test_other_ways(words: list[str], refresh: float, before: bool):
    config = parse(*words)
    assert (config.selection.score_refresh, config.selection.select_before_load) == (refresh, before)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--clean-ema", "0"], "--clean-ema was removed"),
        (["--warmup-point", "40"], "--warmup-point 40 leaves no epoch"),
        (["--epochs", "5"], "--warmup-point 5 leaves no epoch of --epochs 5"),
        (["--score-image-size", "64"], "--score-image-size has no meaning with --select-strategy clean_posterior"),
        (["--select-negatives", "all"], "use another strategy than clean_posterior"),
        (["--score-keep-locked", "--lock-text"], "use another strategy than clean_posterior"),
        (["--select-strategy", "clean_posterior:1+clipscore:1"], "clean_posterior cannot be combined"),
        (["--select-strategy", "clipscore", "--clean-floor", "0.1"], "--clean-floor has no meaning"),
        (["--warmup-point", "0"], "--warmup-point 0 leaves no epoch for the decoys"),
        (["--clean-decoys", "0", "--clean-gate", "0.2"], "--clean-gate needs decoys"),
    ],
)
def test_refused(words: list[str], message: str, capsys: pytest.CaptureFixture[str]):
    with pytest.raises(SystemExit):
        parse(*words)
    assert message in capsys.readouterr().err


def test_a_selection_from_the_first_epoch_on_is_allowed():
    assert parse("--warmup-point", "0", "--clean-decoys", "0").get("warmup_point") == 0
