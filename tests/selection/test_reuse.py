"""Scores that are used again: what is kept, who is scored, what training teaches; and the choice before loading."""

import dataclasses

import pytest
import torch
from processes import run_on_ranks
from selection.test_selector import SAMPLES, N, make_batch, never, select
from torch import Tensor
from torch.nn.functional import normalize

from dissect_clip.config.settings import Config
from dissect_clip.data.batch import Batch
from dissect_clip.distributed.world import World
from dissect_clip.errors import SetupError
from dissect_clip.selection import (
    STRATEGIES,
    Candidates,
    Needs,
    Selection,
    Strategy,
    build_preselector,
    build_selection,
    build_strategy,
)
from dissect_clip.selection.earlier_scores import EarlierScores, pair_z
from dissect_clip.selection.strategy import REUSABLE
from dissect_clip.training.scoring import Encoded

NEEDS = {name: STRATEGIES.class_of(name).needs for name in STRATEGIES if not STRATEGIES[name].reuses}
REUSING = [name for name, needs in NEEDS.items() if needs and not needs & ~REUSABLE]
OTHERS = [name for name, needs in NEEDS.items() if needs & ~REUSABLE]


def encode(batch: Batch) -> Encoded:
    """Features that follow from the ids alone."""
    image, text = normalize(torch.randn(2, SAMPLES, 4, generator=torch.Generator().manual_seed(8)), dim=-1)
    return Encoded(image[batch.sample_id], text[batch.sample_id], torch.tensor(10.0), None)


def encode_with_broken(batch: Batch) -> Encoded:
    """Ids 2 and 5 have no finite features."""
    encoded = encode(batch)
    broken = torch.isin(batch.sample_id, torch.tensor([2, 5]))[:, None]
    return dataclasses.replace(encoded, image_features=encoded.image_features.where(~broken, torch.nan))


def make_config(name: str = "clipscore", refresh: float = 0.0, rate: float = 0.3, **changes: object) -> Config:
    settings: dict[str, object] = {"warmup_point": 1, "warmup_select_rate": rate} | changes
    return Config.of(select=True, select_strategy=name, select_rate=rate, score_refresh=refresh, **settings)  # type: ignore[arg-type]


def make_selector(name: str = "clipscore", refresh: float = 0.0, world: World | None = None, **changes: object):
    selector = build_selection(make_config(name, refresh, **changes), SAMPLES, world or World())
    assert selector is not None
    assert selector.earlier is not None
    return selector


def column(selector: Selection, name: str) -> Tensor:
    return selector.store.scores[:, selector.store.columns.index(name)]


def train(selector: Selection, batch: Batch, epoch: int, step: int, scorer=encode) -> list[int]:
    """A step whose training pass computes what the scoring pass would; returns the chosen ids."""
    selection = select(selector, batch, scorer, epoch, step)
    part = batch.take(selection.index)
    encoded = encode(part)
    selector.learn(part.sample_id, image_features=encoded.image_features, text_features=encoded.text_features)
    return part.sample_id.tolist()


# ---- z-scores


def random_features(size: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    random = torch.Generator().manual_seed(seed)
    image, text = normalize(torch.randn(2, size, 5, generator=random), dim=-1)
    return image, text


def test_z_of_the_score_by_hand():
    image, text = random_features(6)
    z = pair_z(image, text, Needs.SCORE)[:, 0]
    others = torch.tensor([(image[i] @ text[j]).item() for i in range(6) for j in range(6) if i != j])
    for i in range(6):
        expected = ((image[i] @ text[i]) - others.mean()) / others.std(correction=0)
        assert z[i].item() == pytest.approx(expected.item(), abs=1e-5)


def test_z_of_the_loss_is_that_of_infonce_with_another_caption_or_image():
    image, text = random_features(6)
    scale = 20.0
    z = pair_z(image, text, Needs.LOSS)[:, 0]
    logits = scale * image @ text.T
    for i in range(6):
        sides = []
        for row in (logits[i], logits[:, i]):  # the image with every caption, the caption with every image
            losses = row.logsumexp(0) - row  # the loss if this one were the true one
            others = torch.cat([losses[:i], losses[i + 1 :]])
            sides.append((others.mean() - losses[i]) / others.std(correction=0))
        assert z[i].item() == pytest.approx(((sides[0] + sides[1]) / 2).item(), abs=1e-4)


@pytest.mark.parametrize("needs", [Needs.SCORE, Needs.LOSS, Needs.SCORE | Needs.LOSS])
def test_z_is_the_same_however_the_cosines_are_shifted_and_stretched(needs):
    """So it can be held against a z-score of another time."""
    image, text = random_features(8)
    one = torch.full((8, 1), 3.0)
    shifted = pair_z(torch.cat([2 * image, one], dim=1), torch.cat([text, one], dim=1), needs)
    torch.testing.assert_close(shifted, pair_z(image, text, needs), atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("needs", [Needs.SCORE, Needs.LOSS])
def test_a_pair_that_is_not_finite_counts_for_no_other(needs):
    image, text = random_features(7)
    broken = image.clone()
    broken[3, 1] = torch.nan
    left = [0, 1, 2, 4, 5, 6]
    z = pair_z(broken, text, needs)
    assert z[3].isnan().all()
    torch.testing.assert_close(z[left], pair_z(image[left], text[left], needs))


@pytest.mark.parametrize("size", [1, 2])
def test_a_pair_alone_has_no_z(size):
    image, text = random_features(size)
    image[1:] = torch.nan
    assert not pair_z(image, text, Needs.SCORE).isfinite().any()


# ---- the selector


@pytest.mark.parametrize("name", REUSING)
def test_the_first_epoch_scores_all_and_later_ones_none(name):
    selector = make_selector(name)
    everything = make_batch(torch.arange(SAMPLES))
    assert select(selector, everything, encode, 0, 0).scored == SAMPLES
    train(selector, everything, 0, 0)
    assert selector.store.scores[:, -1].eq(0).all()
    chosen = train(selector, everything, 1, 1, scorer=never)
    assert len(chosen) == round(0.3 * SAMPLES)
    assert selector.store.scores[:, -1].eq(1).nonzero().flatten().tolist() == chosen


def test_where_all_are_kept_training_alone_gives_the_scores():
    selector = make_selector("warmup_base_sampling", warmup_select_rate=1.0)
    batch = make_batch(torch.arange(N))
    assert train(selector, batch, 0, 0, scorer=never) == list(range(N))
    encoded = encode(batch)
    z = pair_z(encoded.image_features, encoded.text_features, Needs.SCORE)[:, 0]
    assert torch.equal(column(selector, "last_score")[:N], z)
    assert torch.equal(column(selector, "clip_score")[:N], z)
    assert column(selector, "last_score")[N:].isnan().all()


@pytest.mark.parametrize(("name", "largest"), [("clipscore", True), ("small_loss", True), ("big_loss", False)])
def test_ranks_by_the_last_known_score(name, largest):
    selector = make_selector(name)
    selector.store.scores[:N, 0] = torch.tensor([5.0, 1, 9, 2, 8, 3, 7, 4, 6, 0])
    chosen = select(selector, make_batch(torch.arange(N)), never, 3, 0).index.tolist()
    assert chosen == ([2, 4, 6] if largest else [1, 3, 9])


def test_differential_is_held_against_the_last_known_score():
    selector = make_selector("warmup_base_sampling")
    history, last = torch.arange(10.0), torch.tensor([0.0, 3, 2, 1, 4, 4, 6, 5, 8, 9])
    selector.store.scores[:N, 0], selector.store.scores[:N, 1] = history, last
    # 3 - 1, 5 - 4 and 7 - 5 fell; 1 - 3 rose; the others are where they were.
    assert select(selector, make_batch(torch.arange(N)), never, 3, 0).index.tolist() == [3, 5, 7]


def test_refresh_scores_the_stalest_and_those_never_scored_first():
    selector = make_selector("clipscore", refresh=0.4)
    selector.store.scores[:N, 0] = 1.0
    selector.store.scores[:N, 1] = torch.tensor([7.0, 3, 9, 8, 1, 6, torch.nan, 5, 2, 4])
    asked = []

    def watched(batch: Batch):
        asked.append(batch.sample_id.tolist())
        return encode(batch)

    selection = select(selector, make_batch(torch.arange(N)), watched, 1, 5)
    assert asked == [[1, 4, 6, 8]]
    assert selection.scored == 4
    z = pair_z(*(getattr(encode(make_batch(torch.tensor(asked[0]))), f"{side}_features") for side in ("image", "text")),
               Needs.SCORE)[:, 0]  # fmt: skip
    assert selection.candidates is not None
    torch.testing.assert_close(selection.candidates.score[torch.tensor(asked[0])], z)
    assert selection.candidates.score[[0, 2, 3, 5, 7, 9]].eq(1).all()


@pytest.mark.parametrize(("name", "fewest"), [("clipscore", 2), ("small_loss", 3)])
def test_a_share_too_small_for_a_score_is_rounded_up(name, fewest):
    known = EarlierScores(build_strategy(make_config(name, refresh=0.01)), 0.01)
    assert [known.fresh(1, size) for size in (1, 2, 100, 1000)] == [0, 2, fewest, 10]
    assert EarlierScores(known.strategy, 0.0).fresh(1, 1000) == 0
    assert pair_z(*random_features(fewest), known.strategy.needs).isfinite().all()


def test_schedules_count_where_scores_are_used_again():
    known = EarlierScores(build_strategy(make_config(epochs=8, select_rate_schedule="linear")), 0.2)
    assert [known.kept(epoch, 10) for epoch in range(8)] == [10, 9, 8, 7, 6, 5, 4, 3]
    assert [known.fresh(epoch, 10) for epoch in (0, 1)] == [0, 2]  # training alone gives the first scores
    selector = make_selector("clipscore", epochs=8, select_rate_schedule="linear")
    assert published(selector, epochs=8)(torch.arange(20), torch.ones(20, dtype=torch.bool), 4, 0).count == 12


def test_a_sample_nothing_is_known_of_is_at_the_mean():
    known = EarlierScores(build_strategy(make_config()), 0.0)
    rows = torch.tensor([[1.0, 0], [torch.nan, torch.nan], [5.0, 0]])
    assert known.rank(known.candidates(rows, 1, torch.Generator())).tolist() == [1, 3, 5]
    rank = known.rank(known.candidates(torch.full((3, 2), torch.nan), 1, torch.Generator()))
    assert rank.tolist() == [0, 0, 0]


def test_momentum_moves_only_what_was_scored_anew():
    selector = make_selector("historical_base_sampling", select_momentum=0.5)
    everything = make_batch(torch.arange(SAMPLES))
    train(selector, everything, 0, 0)
    before = column(selector, "clip_score").clone()
    chosen = train(selector, everything, 1, 1)
    encoded = encode(everything.take(torch.tensor(chosen)))
    z = pair_z(encoded.image_features, encoded.text_features, Needs.SCORE)[:, 0]
    after = column(selector, "clip_score")
    torch.testing.assert_close(after[chosen], (before[chosen] + z) / 2)
    others = [place for place in range(SAMPLES) if place not in chosen]
    assert torch.equal(after[others], before[others])


@pytest.mark.parametrize("name", REUSING)
def test_what_is_not_finite_is_left_out_counted_and_not_remembered(name):
    selector = make_selector(name)
    batch = make_batch(torch.arange(N))
    chosen = train(selector, batch, 0, 0, scorer=encode_with_broken)
    assert not {2, 5} & set(chosen)
    assert selector.not_finite.item() == 2
    assert selector.store.scores[[2, 5]].isnan().all()
    assert selector.store.scores[[0, 1, 3, 4, 6, 7, 8, 9], -1].eq(0).all()


def test_features_of_training_that_are_not_finite_leave_the_last_score():
    selector = make_selector()
    selector.store.scores[:N] = 2.0
    batch = make_batch(torch.arange(N))
    selection = select(selector, batch, never, 1, 7)
    encoded = encode(batch.take(selection.index))
    broken = encoded.image_features.clone()
    broken[1] = torch.nan
    ids = batch.sample_id[selection.index]
    selector.learn(ids, image_features=broken, text_features=encoded.text_features)
    when = column(selector, "last_batch")[selection.index]
    assert when.tolist() == [7, 2, 7]
    assert column(selector, "last_score")[selection.index][1] == 2


def test_full_rate_of_one_scores_everything_as_before():
    config = make_config(refresh=1.0)
    selector = build_selection(config, SAMPLES, World())
    assert selector is not None
    assert selector.earlier is None


class ByFeatures(Strategy):
    """ranks by features, which no earlier step can give"""

    needs = Needs.SCORE | Needs.FEATURES

    def rank(self, candidates: Candidates) -> Tensor:
        return torch.zeros(len(candidates.memory))


def test_a_strategy_that_looks_at_more_than_scores_is_refused():
    name = f"{__name__}:ByFeatures"
    with pytest.raises(SetupError, match=rf"--score-refresh 0.1 .* --select-strategy {name} looks at more"):
        make_selector(name, refresh=0.1)


@pytest.mark.parametrize("name", OTHERS)
@pytest.mark.parametrize(
    ("changes", "flag"),
    [
        ({"refresh": 0.1}, "--score-refresh 0.1"),
        ({"refresh": 1.0, "select_before_load": True}, "--select-before-load"),
        ({"refresh": 0.0, "select_before_load": True}, "--select-before-load"),
    ],
)
def test_what_looks_at_features_or_a_reference_is_refused(name, changes, flag):
    with pytest.raises(SetupError, match=rf"{flag} .* --select-strategy {name}.*leave"):
        build_selection(make_config(name, **changes), SAMPLES, World())


def stores_after_training(world: World, name: str) -> list[list[float]]:
    selector = make_selector(name, refresh=0.2, world=world)
    for step in range(6):
        ids = torch.randperm(SAMPLES, generator=torch.Generator().manual_seed(10 * step + world.rank))[:N]
        train(selector, make_batch(ids), step // 2, step)
    return selector.store.scores.nan_to_num(-1).tolist()


@pytest.mark.dist
@pytest.mark.parametrize("name", ["warmup_base_sampling", "small_loss"])
def test_stores_of_all_ranks_stay_equal(name):
    first, second = run_on_ranks(2, stores_after_training, name)
    assert first == second
    assert any(row[-1] >= 0 for row in first)


# ---- the choice before loading


def published(selector: Selection, **changes: object):
    chooser = build_preselector(make_config(selector.strategy.run.select_strategy, select_before_load=True), selector)
    assert chooser is not None
    chooser.publish(selector.store.scores)
    return chooser


def fill(selector: Selection) -> None:
    """Scores and times without ties."""
    random = torch.Generator().manual_seed(3)
    for place in range(selector.store.scores.shape[1]):
        selector.store.scores[:, place] = torch.randperm(SAMPLES, generator=random).float()


@pytest.mark.parametrize("name", REUSING)
@pytest.mark.parametrize("refresh", [0.0, 0.2, 0.8])
def test_chooses_before_loading_what_it_would_choose_after(name, refresh):
    before, after = make_selector(name, refresh), make_selector(name, refresh)
    fill(before)
    fill(after)
    ids = torch.randperm(SAMPLES, generator=torch.Generator().manual_seed(4))[:20]
    whole = make_batch(ids)
    choice = published(before)(ids, torch.ones(20, dtype=torch.bool), 3, 0)
    assert choice.count == min(20, round(refresh * 20) + 6)
    assert sorted(choice.order.tolist()) == list(range(20))
    part = whole.take(choice.order[: choice.count])
    part = Batch(part.image, part.text, part.sample_id, num_read=20)
    assert sorted(train(before, part, 3, 9)) == sorted(train(after, whole, 3, 9))
    torch.testing.assert_close(before.store.scores, after.store.scores)


def test_a_sample_that_comes_twice_counts_as_unknown():
    selector = make_selector()
    fill(selector)
    best = column(selector, "last_score").topk(6).indices
    ids = torch.arange(SAMPLES)
    once = torch.ones(SAMPLES, dtype=torch.bool)
    chooser = published(selector, rate=0.3)
    assert set(best.tolist()) <= set(chooser(ids, once, 3, 0).order[:12].tolist())
    once[best] = False
    order = chooser(ids, once, 3, 0).order.tolist()
    assert not set(best.tolist()) & set(order[:12])
    assert not set(best.tolist()) & set(order[-12:])


def test_epochs_that_score_or_keep_all_leave_nothing_out():
    selector = make_selector()
    choice = published(selector)(torch.arange(20), torch.ones(20, dtype=torch.bool), 0, 0)
    assert (choice.count, choice.order.tolist()) == (20, list(range(20)))


def test_a_random_choice_before_loading_depends_on_its_seed_alone():
    config = make_config("random", select_before_load=True)
    selector = build_selection(config, SAMPLES, World())
    chooser = build_preselector(config, selector)
    ids, once = torch.arange(20), torch.ones(20, dtype=torch.bool)
    orders = [tuple(chooser(ids, once, 1, seed).order.tolist()) for seed in (0, 0, 1)]
    assert orders[0] == orders[1] != orders[2]
    assert chooser(ids, once, 1, 0).count == 6
    part = make_batch(ids[list(orders[0][:6])])
    batch = Batch(part.image, part.text, part.sample_id, num_read=20)
    assert select(selector, batch, never, 1, 0).index.tolist() == list(range(6))


def test_exact_scoring_cannot_choose_before_loading():
    config = make_config("clipscore", refresh=1.0, select_before_load=True)
    selector = build_selection(config, SAMPLES, World())
    with pytest.raises(SetupError, match=r"--select-strategy clipscore scores every sample: add --score-refresh 0"):
        build_preselector(config, selector)
