"""Drawing by P(clean): what is remembered, what is found, what is drawn; with the selector, ranks and the loader."""

import math
import re
from collections.abc import Mapping

import pytest
import torch
from processes import run_on_ranks
from selection.test_reuse import column, encode, make_config, make_selector, train
from selection.test_selector import SAMPLES, N, make_batch, never, select
from torch import Tensor

from dissect_clip.config.parser import parse_args
from dissect_clip.config.settings import Config
from dissect_clip.distributed.world import World
from dissect_clip.selection import Candidates, build_preselector, build_selection, summaries
from dissect_clip.selection.strategies.clean_posterior.decoys import decoy_ids
from dissect_clip.selection.strategies.clean_posterior.mixture import FIT_ROWS
from dissect_clip.selection.strategies.clean_posterior.strategy import CleanPosterior

NAME = "clean_posterior"


def make_strategy(**changes: object) -> CleanPosterior:
    """One without decoys, whose weight is P(clean) itself."""
    plain = {"clean_decoys": 0.0, "clean_exponent": 1.0, "clean_drift": "kept"}
    return CleanPosterior(make_config(NAME, **(plain | changes)))


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


def informed(memory: Tensor, epoch: int = 6, **changes: object) -> CleanPosterior:
    strategy = make_strategy(**changes)
    return strategy.informed(strategy.survey(memory, epoch))


def candidates(memory: Tensor, epoch: int = 6, seed: int = 0, **parts: Tensor | None) -> Candidates:
    return Candidates(epoch=epoch, generator=torch.Generator().manual_seed(seed), memory=memory[:, :4], **parts)


# ---- what is remembered


def visit(strategy: CleanPosterior, values: list[float], epochs: list[int]) -> Tensor:
    """The row [4] of a sample after these visits."""
    memory = torch.full((1, 4), math.nan)
    for value, epoch in zip(values, epochs, strict=True):
        memory = strategy.remember(candidates(memory, epoch, reused=torch.tensor([value])))
    return memory[0]


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"clean_ensemble": "last"}, 3.0),
        ({"clean_ensemble": "mean"}, 2.0),
        ({"clean_ensemble": "ema", "clean_ema": 0.25}, 0.75 * (0.75 * 1 + 0.25 * 2) + 0.25 * 3),
    ],
)
def test_visits_are_put_together(changes: dict[str, object], expected: float):
    average, _, visits, last = visit(make_strategy(**changes), [1.0, 2.0, 3.0], [0, 4, 5]).tolist()
    assert average == pytest.approx(expected)
    assert (visits, last) == (3, 5)


@pytest.mark.parametrize("ensemble", ["last", "mean", "ema"])
def test_the_variance_is_that_of_a_visit_whatever_the_ensemble(ensemble: str):
    torch.manual_seed(0)
    size, strategy = 4000, make_strategy(clean_ensemble=ensemble)
    memory = torch.full((size, 4), math.nan)
    values = []
    for epoch in range(8):
        values.append(torch.randn(size) * 1.5)
        memory = strategy.remember(candidates(memory, epoch, reused=values[-1]))
    assert memory[:, 1].mean().item() == pytest.approx(1.5**2, rel=0.05)
    error = strategy._trust(memory[:, 2]) * memory[:, 1]
    assert error.mean().item() == pytest.approx(memory[:, 0].var().item(), rel=0.1)


def test_after_the_warm_up_only_differences_within_a_batch_count():
    memory = rows(torch.tensor([1.0, 2.0, 3.0]))[:, :4]
    values = torch.tensor([7.0, 6.0, 8.0])  # all have risen by 5 on average
    for drift, epoch, shift in (("removed", 6, 5.0), ("removed", 0, 0.0), ("kept", 6, 0.0)):
        strategy = make_strategy(clean_drift=drift, clean_ensemble="last")
        found = strategy.remember(candidates(memory, epoch, reused=values))[:, 0]
        torch.testing.assert_close(found, values - shift)


def test_a_sample_that_is_new_after_the_warm_up_is_shifted_with_the_others():
    memory = torch.cat([rows(torch.tensor([1.0, 2.0])), rows(torch.tensor([math.nan]))])[:, :4]
    strategy = make_strategy(clean_drift="removed", clean_ensemble="last")
    found = strategy.remember(candidates(memory, 6, reused=torch.tensor([5.0, 6.0, 6.5])))[:, 0]
    assert found.tolist() == pytest.approx([1.0, 2.0, 2.5])
    alone = strategy.remember(candidates(memory[2:], 6, reused=torch.tensor([6.5])))[:, 0]
    assert alone.tolist() == [6.5]


def test_a_first_visit_has_no_variance_yet():
    memory = visit(make_strategy(), [1.5], [3])
    assert memory[1].isnan()
    assert memory[[0, 2, 3]].tolist() == [1.5, 1, 3]


@pytest.mark.parametrize(
    ("statistic", "part", "expected"),
    [("z", {"reused": 2.0}, 2.0), ("loss", {"loss": -2.5}, 2.5), ("clipscore", {"last_clip_score": 31.0}, 31.0)],
)
def test_what_a_pair_is_told_by(statistic: str, part: Mapping[str, float], expected: float):
    strategy = make_strategy(clean_statistic=statistic)
    given = {name: torch.tensor([value]) for name, value in part.items()}
    memory = strategy.remember(candidates(torch.full((1, 4), math.nan), **given))
    assert memory[0, 0].item() == expected


# ---- what is found


def test_the_parts_are_found_and_told_apart():
    averages, upper = two_parts()
    strategy = informed(rows(averages))
    assert strategy.told_apart
    assert strategy.parts is not None
    assert strategy.parts.share == pytest.approx(0.6, abs=0.03)
    clean = strategy.posterior(rows(averages), 6)
    assert clean[upper].mean() > 0.9
    assert clean[~upper].mean() < 0.1
    assert re.search(r"(59|60|61) % of 4000 samples look clean", strategy.finding)


@pytest.mark.parametrize(("gate", "apart"), [(0.0, False), (0.5, False), (0.8, True), (1.0, True)])
def test_a_lower_part_far_above_chance_is_no_wrong_part(gate: float, apart: bool):
    averages, _ = two_parts(low=2.0)  # of 3.0 above
    strategy = informed(rows(averages), clean_ratio=gate)
    assert strategy.told_apart is apart
    assert ("cannot be told apart" in strategy.finding) is not apart
    assert strategy.posterior(rows(averages), 6).isnan().all().item() is not apart


def test_a_ratio_of_0_never_tells_them_apart():
    averages, _ = two_parts(low=-1.0)  # below chance, as a vision transformer has them
    assert not informed(rows(averages), clean_ratio=0.0).told_apart
    assert informed(rows(averages), clean_ratio=0.01).told_apart


def test_chance_is_that_of_the_z_scores_whatever_pairs_are_told_by():
    averages, _ = two_parts()
    drifting = rows(averages * 5 + 40, z=averages)
    assert informed(drifting, clean_statistic="clipscore").told_apart
    assert not informed(rows(averages * 5 + 40), clean_statistic="clipscore").told_apart


def test_where_nothing_is_known_nothing_is_found():
    strategy = informed(torch.full((500, 6), math.nan), epoch=0)
    assert strategy.parts is None
    assert not strategy.told_apart
    assert "too little is known" in strategy.finding


def test_a_large_set_is_looked_at_in_part_and_every_epoch_in_another():
    averages, _ = two_parts(3 * FIT_ROWS // 2)
    memory = rows(averages)
    strategy = make_strategy(clean_model="quantile")
    first, again, later = (strategy.survey(memory, epoch) for epoch in (6, 6, 7))
    assert list(first) == list(again) != list(later)
    assert first[strategy.surveys.index("known")] == len(memory)


def test_samples_that_no_epoch_gives_do_not_count():
    averages, _ = two_parts()
    some = torch.cat([averages, torch.full((4000,), math.nan)])
    assert informed(rows(some)).parts == informed(rows(averages)).parts


# ---- decoys


def with_decoys(share_wrong: float, size: int = 4000, **changes: object) -> tuple[Tensor, Tensor, CleanPosterior]:
    """A store after the warm-up whose wrong pairs, decoys among them, are two lower than the rest.

    Of the samples that are no decoys: their rows, and which are wrong. And what is found.
    """
    strategy = make_strategy(clean_decoys=0.05, **changes)
    random = torch.Generator().manual_seed(1)
    wrong = torch.rand(size, generator=random) < share_wrong
    decoys = decoy_ids(size, 0.05, strategy.config.training.seed)
    average = torch.randn(size, generator=random) * 0.7 + torch.where(wrong.index_fill(0, decoys, True), 1.0, 3.0)
    memory = rows(average)
    memory = torch.cat([memory[:, :4], average[:, None], memory[:, 4:]], dim=1)
    memory[decoys, :4] = math.nan
    others = torch.ones(size, dtype=torch.bool).index_fill(0, decoys, False)
    return memory[others], wrong[others], strategy.informed(strategy.survey(memory, 6))


@pytest.mark.parametrize("share", [0.1, 0.4, 0.8])
def test_with_decoys_the_probability_is_that_of_the_truth(share: float):
    memory, wrong, strategy = with_decoys(share)
    assert strategy.told_apart
    assert strategy.known == len(memory) == 3800
    assert strategy.known_decoys == 200
    assert strategy.by_decoys is not None
    assert strategy.by_decoys.share == pytest.approx(1 - share, abs=0.1)
    clean = strategy.certainty(memory, 6)
    assert (clean - (~wrong).float()).square().mean() < 0.08
    for low, high in ((0, 0.2), (0.2, 0.8), (0.8, 1.01)):
        inside = (clean >= low) & (clean < high)
        if inside.sum() > 300:
            assert (~wrong)[inside].double().mean().item() == pytest.approx(clean[inside].mean().item(), abs=0.15)
    assert re.search(r"beside 200 decoys in the warm-up \d+ % of the captions look wrong", strategy.finding)


def test_without_wrong_pairs_decoys_find_none_and_all_have_the_same_chance():
    memory, _, strategy = with_decoys(0.0)
    assert not strategy.told_apart
    assert "all have the same weight" in strategy.finding
    assert strategy.certainty(memory, 6).mean() > 0.97
    found = chances(strategy, memory[:8], k=4, draws=2000)
    assert found.tolist() == pytest.approx([0.5] * 8, abs=0.05)


def test_the_probability_is_that_of_the_warm_up_and_the_draw_that_of_today():
    memory, _, strategy = with_decoys(0.4)
    later = memory.clone()
    later[:, 0] += 1
    assert strategy.certainty(later, 9).equal(strategy.certainty(memory, 9))
    assert (strategy.posterior(later, 9) > strategy.posterior(memory, 9)).double().mean() > 0.9


def test_too_few_decoys_find_nothing():
    strategy = with_decoys(0.4, size=200)[2]
    assert strategy.parts is not None
    assert strategy.by_decoys is None
    assert not strategy.told_apart
    assert "too little is known" in strategy.finding


@pytest.mark.parametrize(("ensemble", "first", "later"), [("ema", 2.75, 3.375), ("mean", 7 / 3, 2.75)])
def test_what_is_known_of_a_decoy_is_kept_apart(ensemble: str, first: float, later: float):
    strategy = make_strategy(clean_decoys=0.05, warmup_point=3, clean_ensemble=ensemble)
    decoy = torch.tensor([True, False])
    memory = torch.full((2, 5), math.nan)
    for epoch, value in enumerate((1.0, 2.0, 4.0)):
        memory = strategy.remember(warming(memory, epoch, value, decoy))
    assert memory[0, [0, 1, 3]].isnan().all()
    assert memory[1, [0, 2, 3]].tolist() == pytest.approx([first, 3.0, 2.0])
    assert memory[:, 4].tolist() == pytest.approx([first, first])
    memory = strategy.remember(warming(memory, 3, 4.0, None))
    assert memory[:, 4].tolist() == pytest.approx([first, first])
    assert memory[:, 0].tolist() == pytest.approx([4.0, later])
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
    error = strategy.verdict(memory[:50], torch.arange(4000, 4050), 4000, 6)["standard_error"]
    assert error.square().tolist() == pytest.approx(
        (memory[:50, 1] * strategy._trust(torch.tensor(float(visits)))).tolist(), rel=1e-5
    )


def test_of_a_decoy_there_is_no_verdict():
    memory, _, strategy = with_decoys(0.4)
    ids = torch.arange(1000, 1100)
    verdict = strategy.verdict(memory[:100], ids, 4000, 6)
    decoys = torch.isin(ids, decoy_ids(4000, 0.05, strategy.config.training.seed))
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
    return informed(rows(averages), **changes)


def test_the_first_is_drawn_with_the_weight_as_its_chance():
    strategy = knowing()
    memory = rows(torch.tensor([0.0, 1.4, 1.6, 3.0]))
    clean = strategy.posterior(memory, 6)
    assert chances(strategy, memory).tolist() == pytest.approx((clean / clean.sum()).tolist(), abs=0.03)


@pytest.mark.parametrize(("changes", "weight"), [
    ({"clean_exponent": 2.0}, lambda clean: clean**2),
    ({"clean_exponent": 0.0}, lambda clean: clean**0),
    ({"clean_floor": 0.2}, lambda clean: 0.2 + 0.8 * clean),
])  # fmt: skip
def test_weights(changes, weight):
    strategy = knowing(**changes)
    memory = rows(torch.tensor([0.0, 1.4, 1.6, 3.0]))
    expected = weight(strategy.posterior(memory, 6))
    assert chances(strategy, memory).tolist() == pytest.approx((expected / expected.sum()).tolist(), abs=0.03)


def test_a_sample_that_was_never_seen_has_the_mean():
    strategy = knowing()
    assert strategy.parts is not None
    memory = rows(torch.tensor([math.nan, 3.0]))
    assert strategy.posterior(memory, 6)[0].item() == pytest.approx(strategy.parts.share)


def test_what_was_found_is_forgotten_epoch_by_epoch():
    strategy = knowing(clean_forget=0.5)
    assert strategy.parts is not None
    share = strategy.parts.share
    memory = torch.cat([rows(torch.tensor([-1.0]), epoch=epoch) for epoch in (5.0, 4.0, 3.0)])
    clean = (strategy.posterior(memory, 6) / share).tolist()
    assert clean == pytest.approx([0.0, 0.5, 0.75], abs=0.01)


@pytest.mark.parametrize("case", ["warm-up", "one part", "nothing known"])
def test_otherwise_all_have_the_same_chance(case: str):
    averages, _ = two_parts(low=2.5)
    strategy = {"warm-up": knowing(), "one part": informed(rows(averages)), "nothing known": make_strategy()}[case]
    memory = rows(torch.tensor([0.0, 1.4, 1.6, 3.0]))
    found = chances(strategy, memory, epoch=0 if case == "warm-up" else 6, k=2)
    assert found.tolist() == pytest.approx([0.5] * 4, abs=0.03)


def test_a_verdict_holds_probability_uncertainty_and_what_it_comes_from():
    strategy = knowing(clean_ensemble="last")
    memory = torch.cat(
        [rows(torch.tensor([1.5]), visits=4.0), rows(torch.tensor([1.5])), rows(torch.tensor([math.nan]))]
    )
    verdict = strategy.verdict(memory, torch.arange(3), 3, 6)
    assert {len(values) for values in verdict.values()} == {3}
    assert verdict["standard_error"].tolist()[:2] == pytest.approx([math.sqrt(0.5), math.sqrt(strategy.noise)])
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
        expected = selector.strategy.posterior(selector.store.scores[:N], 6)
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
    return parse_args(["--train-data", "x.tar", "--select", "--select-strategy", NAME, *words], summaries())


def test_by_default_it_is_chosen_before_loading_after_a_warm_up_on_everything():
    config = parse()
    assert (config.selection.select_preset, config.selection.score_refresh, config.selection.select_before_load) == (
        "fast",
        0.0,
        True,
    )
    assert (config.selection.warmup_point, config.selection.warmup_select_rate, config.selection.select_rate) == (
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
        (["--clean-ema", "0"], "--clean-ema"),
        (["--warmup-point", "40"], "--warmup-point 40 leaves no epoch"),
        (["--epochs", "5"], "--warmup-point 5 leaves no epoch of --epochs 5"),
        (["--score-image-size", "64"], "--score-image-size has no meaning with --select-strategy clean_posterior"),
        (["--select-negatives", "all"], "use another strategy than clean_posterior"),
        (["--score-keep-locked", "--lock-text"], "use another strategy than clean_posterior"),
        (["--select-strategy", "clean_posterior:1+clipscore:1"], "clean_posterior cannot be combined"),
        (["--select-strategy", "clipscore", "--clean-floor", "0.1"], "--clean-floor has no meaning"),
        (["--warmup-point", "0"], "--warmup-point 0 leaves no epoch for the decoys"),
        (["--clean-decoys", "0", "--clean-gate", "0.2"], "--clean-gate needs decoys"),
        (["--clean-ratio", "0.2"], "--clean-ratio needs no decoys to have a meaning: add --clean-decoys 0"),
        (["--clean-quantile", "0.2"], "--clean-quantile needs that model"),
        (["--clean-ema", "0.2", "--clean-ensemble", "last"], "--clean-ema needs that ensemble"),
    ],
)
def test_refused(words: list[str], message: str, capsys: pytest.CaptureFixture[str]):
    with pytest.raises(SystemExit):
        parse(*words)
    assert message in capsys.readouterr().err


def test_a_selection_from_the_first_epoch_on_is_allowed():
    assert parse("--warmup-point", "0", "--clean-decoys", "0").selection.warmup_point == 0
