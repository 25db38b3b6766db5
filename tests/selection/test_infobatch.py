"""InfoBatch: unbiased whatever the batch holds, K as asked, and losses that training gives."""

import pytest
import torch
from selection.test_selector import SAMPLES, N, make_batch, never, select
from selection.test_selector import make_selector as make_any
from torch import Tensor

from dissect_clip.config.settings import Config
from dissect_clip.distributed.world import World
from dissect_clip.errors import SetupError
from dissect_clip.models.loss import SampleLoss
from dissect_clip.selection import Candidates, Selection, build_preselector, build_selection, build_strategy
from dissect_clip.selection.strategies.infobatch.strategy import InfoBatch, share_below
from dissect_clip.selection.strategy import kept
from dissect_clip.selection.top_k import top_k


def make_strategy(mean: float = 2.0, below: float = 0.5, rate: float = 0.5, **changes: object) -> InfoBatch:
    config = Config.of(select=True, select_strategy="infobatch", select_rate=rate, **changes)  # type: ignore[arg-type]
    strategy = build_strategy(config)
    assert isinstance(strategy, InfoBatch)
    return strategy.with_survey((mean, below))


def make_candidates(loss: Tensor, seed: int = 0) -> Candidates:
    return Candidates(epoch=3, generator=torch.Generator().manual_seed(seed), memory=loss[:, None])


def draw(strategy: InfoBatch, loss: Tensor, seed: int) -> tuple[Tensor, Tensor]:
    """The places of a batch that are kept, and their weights."""
    candidates = make_candidates(loss, seed)
    k = kept(strategy.rate(candidates.epoch), len(loss))
    index = top_k(strategy.rank(candidates), k, candidates.generator)
    weight = strategy.weights(candidates, index)
    assert weight is not None
    return index, weight


def losses(above: int, below: int, unseen: int) -> Tensor:
    """Losses around a mean of 2, in no order."""
    whole = torch.cat([torch.linspace(2, 4, above), torch.linspace(0, 1.9, below), torch.full((unseen,), torch.nan)])
    return whole[torch.randperm(len(whole), generator=torch.Generator().manual_seed(5))]


BATCHES = {
    "room for all above": (3, 7, 0, 0.7),
    "no room for those below": (6, 6, 0, 0.5),
    "more above than kept": (9, 3, 0, 0.3),
    "never seen": (2, 5, 3, 0.6),
    "nothing seen": (0, 0, 10, 0.3),
    "all below": (0, 8, 0, 0.5),
    "all above": (8, 0, 0, 0.5),
    "two kept": (5, 5, 0, 0.2),
    "one kept": (5, 5, 0, 0.1),
}


@pytest.mark.parametrize(("above", "below", "unseen", "rate"), BATCHES.values(), ids=BATCHES)
def test_the_expected_gradient_is_that_of_the_whole_batch(above: int, below: int, unseen: int, rate: float):
    """Of a loss that is one of each sample alone, here the squared error of a linear model."""
    loss, strategy = losses(above, below, unseen), make_strategy(rate=rate)
    size = len(loss)
    x, y = torch.randn(size, 3, generator=torch.Generator().manual_seed(1)), torch.linspace(-1, 1, size)
    slope = torch.tensor([0.3, -0.2, 0.5], requires_grad=True)

    def gradient(index: Tensor, weight: Tensor) -> Tensor:
        error = (weight * (x[index] @ slope - y[index]).square()).mean()
        return torch.autograd.grad(error, slope)[0]

    draws = torch.stack([gradient(*draw(strategy, loss, seed)) for seed in range(700)])
    whole = gradient(torch.arange(size), torch.ones(size))
    error = draws.std(dim=0) / len(draws) ** 0.5
    assert ((draws.mean(dim=0) - whole).abs() <= 4 * error + 1e-6).all()


@pytest.mark.parametrize(("above", "below", "unseen", "rate"), BATCHES.values(), ids=BATCHES)
def test_weights_are_inverse_chances_with_mean_one(above: int, below: int, unseen: int, rate: float):
    loss, strategy = losses(above, below, unseen), make_strategy(rate=rate)
    size, draws = len(loss), 500
    count, seen = torch.zeros(size), torch.full((size,), torch.nan)
    for seed in range(draws):
        index, weight = draw(strategy, loss, seed)
        assert weight.mean().item() == pytest.approx(1, abs=1e-5)
        count[index] += 1
        seen[index] = weight
    chance = len(index) / size / seen
    assert ((count / draws - chance).abs() <= 4 * (chance * (1 - chance) / draws).sqrt() + 1e-6).all()


def test_with_room_it_is_the_papers_scheme():
    loss, strategy = losses(3, 7, 0), make_strategy(rate=0.7)
    index, weight = draw(strategy, loss, 0)
    above = loss[index] >= 2
    assert above.sum() == 3
    assert weight[above].tolist() == pytest.approx([0.7] * 3)
    assert weight[~above].tolist() == pytest.approx([0.7 * 7 / 4] * 4)


def test_without_room_those_below_are_kept_half_as_often():
    weight = draw(make_strategy(rate=0.3), losses(60, 40, 0), 0)[1]
    chance = 0.3 / weight
    assert chance.min().item() == pytest.approx(chance.max().item() / 2, rel=0.1)


@pytest.mark.parametrize("ratio", [0.01, 0.5, 0.99])
def test_both_parts_can_be_kept_and_are_no_larger_than_they_are(ratio: float):
    for above in range(9):
        for below in range(9):
            for k in range(2, above + below + 1):
                of_below = share_below(torch.tensor(above), torch.tensor(below), k, ratio).item()
                assert min(1, below) <= of_below <= below
                assert min(1, above) <= k - of_below <= above


def test_the_choice_differs_between_seeds_and_not_between_calls():
    loss, strategy = losses(0, 40, 0), make_strategy()
    chosen = [tuple(draw(strategy, loss, seed)[0].tolist()) for seed in (0, 0, 1)]
    assert chosen[0] == chosen[1] != chosen[2]


def test_without_rescaling_there_are_no_weights():
    strategy = make_strategy(select_rescale="off")
    assert not strategy.weights_losses
    assert strategy.weights(make_candidates(losses(3, 7, 0)), torch.arange(5)) is None


# ---- the data set


def test_the_survey_is_the_mean_of_what_is_known_and_the_share_below():
    memory = torch.tensor([[1.0], [torch.nan], [2.0], [6.0], [3.5]])
    survey = make_strategy().survey(memory, 1)
    assert survey == pytest.approx([12.5 / 4, 2 / 4])
    assert make_strategy().survey(torch.full((4, 1), torch.nan), 1) == [0, 0]


def test_a_prune_ratio_sets_the_rate():
    strategy = make_strategy(below=0.6, rate=0.3, infobatch_prune_ratio=0.25, epochs=40)
    assert strategy.rate(0) == pytest.approx(1 - 0.25 * 0.6)
    assert strategy.with_survey((2.0, 0.0)).rate(0) == 1
    assert [strategy.rate(epoch) < 1 for epoch in (34, 35, 39)] == [True, False, False]
    assert [strategy.may_select(epoch) for epoch in (34, 35)] == [True, False]


def test_the_last_eighth_trains_on_everything_unless_told_otherwise():
    assert [make_strategy(epochs=16).rate(epoch) for epoch in (0, 13, 14, 15)] == [0.5, 0.5, 1, 1]
    assert make_strategy(epochs=16, select_full_last=0.0).rate(15) == 0.5


# ---- with the selector


def make_selector(**changes: object) -> Selection:
    return make_any("infobatch", **changes)


def teach(selector: Selection, ids: Tensor, loss: Tensor, epoch: int = 0, step: int = 0) -> Tensor:
    """A step in which training finds these losses for the kept ones; returns their ids."""
    batch = make_batch(ids)
    selection = select(selector, batch, never, epoch, step)
    selector.learn(ids[selection.index], loss[selection.index])
    return ids[selection.index]


def test_remembers_the_losses_of_the_kept_ones_alone():
    selector = make_selector()
    ids = torch.arange(N)
    chosen = teach(selector, ids, torch.arange(10.0))
    known = selector.store.scores[:, 0].isfinite().nonzero().flatten()
    assert torch.equal(known, chosen)
    assert selector.store.scores[chosen, 0].tolist() == chosen.tolist()


def test_a_loss_that_is_not_finite_leaves_what_was_known():
    selector = make_selector()
    selector.store.scores[:] = 2.0
    chosen = teach(selector, torch.arange(N), torch.full((N,), torch.nan))
    assert selector.store.scores[chosen, 0].eq(2).all()


def test_an_epoch_begins_with_a_look_at_the_store():
    selector = make_selector()
    selector.store.scores[:20, 0] = torch.arange(20.0)
    selector.start_epoch(1)
    assert selector.survey == (9.5, 10 / 20)
    assert (selector.strategy.mean, selector.strategy.below) == selector.survey
    other = make_selector()
    other.load_state_dict(selector.state_dict())
    other.start_epoch(1)
    batch = make_batch(torch.arange(N))
    other.store.scores[:] = selector.store.scores
    first, second = (select(one, batch, never, 1, 1) for one in (selector, other))
    assert torch.equal(first.index, second.index)
    assert torch.equal(first.weight, second.weight)


def test_training_losses_are_those_of_the_batch_and_skip_what_is_not_finite():
    selector = make_selector()
    image, text = torch.nn.functional.normalize(torch.randn(2, 6, 4), dim=-1)
    broken = image.clone()
    broken[2] = torch.nan
    loss = selector.pair_losses(broken, text, torch.tensor(7.0))
    assert loss.isnan().tolist() == [place == 2 for place in range(6)]
    zeroed = (part.clone().index_fill(0, torch.tensor(2), 0) for part in (image, text))
    expected = SampleLoss(selector.world, siglip=False)(*zeroed, torch.tensor(7.0), None)
    expected[2] = torch.nan
    torch.testing.assert_close(loss, expected, equal_nan=True)


@pytest.mark.parametrize(("epochs", "wanted"), [(1, False), (2, True)])
def test_nothing_is_learned_that_no_epoch_will_read(epochs: int, wanted: bool):
    selector = make_selector(epochs=epochs)
    selector.start_epoch(0)
    assert selector.learns_losses is wanted


def test_it_cannot_choose_before_loading():
    config = Config.of(select=True, select_strategy="infobatch", select_before_load=True)
    selector = make_selector()
    selector.strategy = build_strategy(config)
    with pytest.raises(SetupError, match=r"--select-before-load, .* does not go with --select-strategy infobatch"):
        build_preselector(config, selector)


def test_without_weights_it_chooses_before_loading_by_the_mean_of_the_epochs_beginning():
    """The loader knows it, too, though it was built before."""
    config = Config.of(select=True, select_strategy="infobatch", select_rate=0.5, select_rescale="off",
                    select_before_load=True)  # fmt: skip
    selector = build_selection(config, SAMPLES, World())
    chooser = build_preselector(config, selector)
    assert selector is not None
    assert chooser is not None
    selector.store.scores[:, 0] = torch.arange(float(SAMPLES))
    selector.store.scores[SAMPLES // 2 :] += 100  # few of a batch are above the mean, and they stay
    selector.start_epoch(1)
    chooser.publish(selector.store.scores, selector.survey)
    ids = torch.cat([torch.arange(6), torch.arange(SAMPLES - 2, SAMPLES)])
    choice = chooser(ids, torch.ones(8, dtype=torch.bool), 1, 5)
    assert choice.count == 4
    assert {6, 7} < set(choice.order[:4].tolist())


@pytest.mark.parametrize(
    ("changes", "named"),
    [({"model": "coca_ViT-B-32"}, "CoCa"), ({"distill_model": "a", "distill_pretrained": "b"}, "--distill-model")],
)
def test_it_is_refused_with_losses_that_cannot_be_weighted(changes: dict[str, str], named: str):
    config = Config.of(select=True, select_strategy="infobatch", **changes)  # type: ignore[arg-type]
    with pytest.raises(SetupError, match=rf"--select-strategy infobatch weights .*{named}"):
        build_selection(config, SAMPLES, World())
    unweighted = config.replace(select_rescale="off")
    assert build_selection(unweighted, SAMPLES, World()) is not None


def saved(**changes: object) -> dict[str, object]:
    return {**make_selector().state_dict(), **changes}


def test_a_survey_of_other_numbers_is_refused():
    with pytest.raises(ValueError, match=r"it holds 3 numbers .* about the whole dataset, this run expects 2"):
        make_selector().load_state_dict(saved(survey=(1.0, 2.0, 3.0)))


def test_a_survey_of_another_kind_is_refused():
    selector, numbers = make_selector(), (1.0, 0.5)
    with pytest.raises(ValueError, match=r"it holds 2 numbers by --clean-model beta .*, this run expects 2"):
        selector.load_state_dict(saved(survey=numbers, survey_of="--clean-model beta"))
    selector.load_state_dict(saved(survey=numbers))
    assert selector.survey == numbers
