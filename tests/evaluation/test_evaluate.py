import dataclasses
from functools import partial

import pytest
import torch
from processes import run_on_ranks
from toy_evaluation import (
    CLASSNAMES,
    ClassificationToy,
    RetrievalToy,
    run_evaluation,
    toy_clip,
    toy_coca,
    toy_images,
    toy_labelled,
)

from dissect_clip.data.batch import LabelledBatch
from dissect_clip.distributed.world import World
from dissect_clip.errors import TrainingError
from dissect_clip.evaluation.common import share

CAPTIONS = (1, 5, 2, 3, 5, 1, 4, 5, 2, 1, 3)
SHARES = {"uneven": ([4, 9, 0, 10, 2, 7, 8], [1, 3, 5, 6]), "empty": (range(11), []), "rank 0 empty": ([], range(11))}


def test_nothing_to_evaluate_on():
    assert run_evaluation(toy_clip()) == {}


def test_every_submodule_is_left_in_its_mode():
    model = toy_clip()
    model.visual.eval()
    before = [module.training for module in model.modules()]
    run_evaluation(model, toy_images([1] * 4).whole(), [ClassificationToy([toy_labelled(3)])])
    assert [module.training for module in model.modules()] == before
    assert len(set(before)) == 2


def test_modes_come_back_after_an_error():
    model = toy_clip()
    with pytest.raises(TrainingError):
        run_evaluation(model, RetrievalToy([]))
    assert all(module.training for module in model.modules())


def test_batch_norm_statistics_stay():
    model = toy_clip(layers=(1, 1, 1, 1), width=8, image_size=32)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    assert any("running_mean" in name for name in before)
    run_evaluation(model, toy_images([2] * 4, size=32).whole())
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_training_goes_on_after_an_evaluation():
    model, images = toy_clip(), toy_images([1] * 4)
    run_evaluation(model, images.whole())
    output = model(images.image, torch.cat(images.texts))
    (output["image_features"] * output["text_features"]).sum().backward()
    assert model.visual.proj.grad is not None


def test_autocast_moves_metrics_little():
    images, toy = toy_images([3] * 8), ClassificationToy([toy_labelled(8)])
    autocast = partial(torch.amp.autocast, device_type="cpu", dtype=torch.bfloat16)
    full = run_evaluation(toy_clip(), images.whole(), [toy])
    cast = run_evaluation(toy_clip(), images.whole(), [toy], autocast=autocast)
    assert cast["clip_val_loss"] == pytest.approx(full["clip_val_loss"], rel=0.05)
    assert cast["rsum"] == pytest.approx(full["rsum"], abs=30)


def test_a_model_in_bfloat16():
    images, toy = toy_images([3] * 8), ClassificationToy([toy_labelled(8)])
    full = run_evaluation(toy_clip(), images.whole(), [toy])
    pure = run_evaluation(toy_clip().bfloat16(), images.whole(), [toy], input_dtype=torch.bfloat16)
    assert pure.keys() == full.keys()
    assert pure["clip_val_loss"] == pytest.approx(full["clip_val_loss"], rel=0.05)


def test_shares_join_to_the_whole_in_order():
    for count in (0, 1, 7, 8):
        shares = [share(count, World(rank=rank, size=3)) for rank in range(3)]
        assert [piece for part in shares for piece in part] == list(range(count))


def spread(world: World, name: str, num_labelled: int) -> dict[str, float]:
    """This rank's metrics, on its share of the sets."""
    places, batch = SHARES[name][world.rank], toy_labelled(20)
    rows = slice(0, num_labelled) if world.rank == 0 else slice(num_labelled, None)
    mine = LabelledBatch(batch.image[rows], batch.label[rows], batch.order[rows])
    labelled = ClassificationToy([mine] if len(mine.label) else [])
    few = ClassificationToy([dataclasses.replace(b, label=b.label % 3) for b in labelled.loader], "few", CLASSNAMES[:3])
    return run_evaluation(toy_clip(), RetrievalToy(toy_images(CAPTIONS).loader(places)), [labelled, few], world)


def spread_coca(world: World) -> dict[str, float]:
    places = SHARES["empty"][world.rank]
    return run_evaluation(toy_coca(), RetrievalToy(toy_images(CAPTIONS).loader(places)), world=world)


def spread_error(world: World) -> str:
    model, places = toy_clip(), SHARES["empty"][world.rank]
    with torch.no_grad():
        model.visual.proj[0, 0] = torch.inf
    with pytest.raises(TrainingError) as caught:
        run_evaluation(model, RetrievalToy(toy_images(CAPTIONS).loader(places)), world=world)
    return str(caught.value)


def everything(world: World) -> dict[str, dict[str, float] | str]:
    results: dict[str, dict[str, float] | str] = {
        "uneven": spread(world, "uneven", 13),
        "empty": spread(world, "empty", 20),
        "rank 0 empty": spread(world, "rank 0 empty", 0),
    }
    return results | {"coca": spread_coca(world), "error": spread_error(world)}


@pytest.fixture(scope="module")
def on_two_ranks() -> list[dict[str, dict[str, float] | str]]:
    return run_on_ranks(2, everything)


@pytest.mark.dist
@pytest.mark.parametrize("name", list(SHARES))
def test_two_ranks_report_what_one_reports(on_two_ranks, name):
    batch = toy_labelled(20)
    few = ClassificationToy([dataclasses.replace(batch, label=batch.label % 3)], "few", CLASSNAMES[:3])
    one = run_evaluation(toy_clip(), toy_images(CAPTIONS).whole(), [ClassificationToy([batch]), few])
    assert on_two_ranks[0][name] == on_two_ranks[1][name]
    assert on_two_ranks[0][name] == pytest.approx(one, abs=1e-5)


@pytest.mark.dist
def test_a_rank_without_images_joins_in_the_captioning_loss(on_two_ranks):
    one = run_evaluation(toy_coca(), toy_images(CAPTIONS).whole())
    assert on_two_ranks[0]["coca"] == on_two_ranks[1]["coca"] == pytest.approx(one, abs=1e-5)


@pytest.mark.dist
def test_every_rank_stops_at_features_that_are_not_finite(on_two_ranks):
    assert "11 of 11 images" in on_two_ranks[0]["error"]
    assert on_two_ranks[0]["error"] == on_two_ranks[1]["error"]
