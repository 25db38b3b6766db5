import dataclasses
from contextlib import nullcontext

import pytest
import torch
from toy_evaluation import (
    CLASSNAMES,
    TEMPLATES,
    ClassificationToy,
    run_evaluation,
    toy_clip,
    toy_labelled,
    toy_tokenizer,
)

from dissect_clip.data.batch import LabelledBatch
from dissect_clip.distributed.world import World
from dissect_clip.errors import TrainingError
from dissect_clip.evaluation.common import Encoder
from dissect_clip.evaluation.zeroshot import build_classifier


def expected_logits(model: torch.nn.Module, batch: LabelledBatch) -> torch.Tensor:
    """Scores [M, C]: the cosine with the mean of each class's unit caption features."""
    model.eval()
    columns = []
    with torch.no_grad():
        for name in CLASSNAMES:
            texts = model.encode_text(toy_tokenizer([template(name) for template in TEMPLATES]))
            column = (texts / texts.norm(dim=1, keepdim=True)).mean(dim=0)
            columns.append(column / column.norm())
        image = model.encode_image(batch.image)
    return image @ torch.stack(columns, dim=1)


def halves(batch: LabelledBatch) -> list[LabelledBatch]:
    """One image, then the others."""
    return [
        LabelledBatch(batch.image[rows], batch.label[rows], batch.order[rows]) for rows in (slice(1), slice(1, None))
    ]


def test_top1_and_top5_are_shares_of_the_images():
    model, batch = toy_clip(), toy_labelled(40)
    logits = expected_logits(model, batch)
    batch.label[:11] = logits[:11].argmax(dim=1)
    order = logits.argsort(dim=1, descending=True, stable=True)
    hit = order == batch.label[:, None]
    metrics = run_evaluation(model, classification=[ClassificationToy(halves(batch))])
    assert metrics == pytest.approx(
        {"toy-zeroshot-top1": hit[:, :1].sum().item() / 40, "toy-zeroshot-top5": hit[:, :5].sum().item() / 40}
    )


def test_imagenet_has_openclips_names():
    batch = toy_labelled(4)
    sets = [ClassificationToy([batch], name) for name in ("imagenet", "imagenetv2")]
    assert list(run_evaluation(toy_clip(), classification=sets)) == [
        "imagenet-zeroshot-val-top1",
        "imagenet-zeroshot-val-top5",
        "imagenetv2-zeroshot-val-top1",
        "imagenetv2-zeroshot-val-top5",
    ]


def test_sets_with_the_same_classes_share_a_classifier():
    batch, calls = toy_labelled(4), []

    def tokenizer(texts: list[str]) -> torch.Tensor:
        calls.append(len(texts))
        return toy_tokenizer(texts)

    sets = [ClassificationToy([batch], "a"), ClassificationToy([batch], "b")]
    run_evaluation(toy_clip(), classification=sets, tokenizer=tokenizer)
    assert sum(calls) == len(CLASSNAMES) * len(TEMPLATES)


@pytest.mark.parametrize("templates", [["a {}.", "the {}!"], ["a {c}.", "the {c}!"]])
def test_templates_may_be_strings(templates):
    encoder = Encoder(toy_clip().eval(), nullcontext, None)
    with torch.no_grad():
        from_strings, from_functions = (
            build_classifier(encoder, CLASSNAMES, given, toy_tokenizer, World()) for given in (templates, TEMPLATES)
        )
    assert torch.equal(from_strings, from_functions)


def test_classifier_has_a_unit_vector_a_class():
    encoder = Encoder(toy_clip().eval(), nullcontext, None)
    with torch.no_grad():
        classifier = build_classifier(encoder, CLASSNAMES, TEMPLATES, toy_tokenizer, World())
    assert classifier.shape == (len(CLASSNAMES), 16)
    torch.testing.assert_close(classifier.norm(dim=1), torch.ones(len(CLASSNAMES)))


def test_fewer_than_five_classes():
    batch = toy_labelled(6)
    toy = ClassificationToy([dataclasses.replace(batch, label=batch.label % 3)], classnames=CLASSNAMES[:3])
    assert run_evaluation(toy_clip(), classification=[toy])["toy-zeroshot-top5"] == 1.0


def test_equal_features_are_at_chance():
    model, batch = toy_clip(), toy_labelled(13)
    with torch.no_grad():
        model.visual.proj.zero_()
    batch.label[:] = torch.arange(13)
    metrics = run_evaluation(model, classification=[ClassificationToy([batch])])
    assert metrics == pytest.approx({"toy-zeroshot-top1": 1 / 13, "toy-zeroshot-top5": 5 / 13})


def test_labels_without_a_class_name_stop_the_run():
    toy = ClassificationToy([toy_labelled(30)], classnames=CLASSNAMES[:7])
    with pytest.raises(TrainingError, match=r"of 30 labels are outside 0\.\.6"):
        run_evaluation(toy_clip(), classification=[toy])


def test_features_that_are_not_finite_stop_the_run():
    model = toy_clip()
    with torch.no_grad():
        model.visual.proj[0, 0] = torch.nan
    with pytest.raises(TrainingError, match="scores of 5 of 5 images are NaN"):
        run_evaluation(model, classification=[ClassificationToy([toy_labelled(5)])])


def test_an_empty_set_stops_the_run():
    with pytest.raises(TrainingError, match="not one image"):
        run_evaluation(toy_clip(), classification=[ClassificationToy([])])
