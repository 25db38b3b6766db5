"""Zero-shot classification, spread over the ranks: each encodes a share of the classes, then of the images.

Shapes: M images, C classes, D features.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from functools import partial
from typing import Protocol, TypeAlias

import torch
from open_clip import build_zero_shot_classifier
from torch import Tensor

from dissect_clip.data.batch import LabelledBatch
from dissect_clip.distributed.world import World
from dissect_clip.errors import TrainingError
from dissect_clip.evaluation.common import NOT_FINITE, Encoder, gather_images, progress, share
from dissect_clip.evaluation.metrics import Accuracy, accuracy, average_precision, best_rank, class_counts, similarity

Tokenizer: TypeAlias = Callable[[list[str]], Tensor]
Templates: TypeAlias = Sequence[str] | Sequence[Callable[[str], str]]

CLASSES_PER_BATCH = 10  # with the 80 templates of ImageNet, 800 captions in one pass
OPENCLIP_PREFIX = {"imagenet": "imagenet-zeroshot-val", "imagenetv2": "imagenetv2-zeroshot-val"}


class ClassificationSet(Protocol):
    """A labelled set with the names of its classes and the captions they are put in."""

    @property
    def name(self) -> str: ...
    @property
    def loader(self) -> Iterable[LabelledBatch]: ...  # this rank's share; any size, also none
    @property
    def classnames(self) -> Sequence[str]: ...
    @property
    def templates(self) -> Templates: ...  # functions of a class name, or strings with {c} or {}


def evaluate_zeroshot(
    encoder: Encoder, sets: Sequence[ClassificationSet], tokenizer: Tokenizer, *, world: World
) -> dict[str, float]:
    """Top-1 and top-5 accuracy on each set, as fractions. Collective; equal on all ranks.

    The names are OpenCLIP's for ImageNet and ImageNet-V2, ``NAME-zeroshot-top1`` and ``-top5`` otherwise. With fewer
    than five classes top-5 is 1.

    Raises:
        TrainingError: a set is empty, features are not finite, or a label has no class name.
    """
    metrics: dict[str, float] = {}
    classifiers: dict[tuple[object, ...], Tensor] = {}
    for data in sets:
        key = (tuple(data.classnames), tuple(data.templates))  # ImageNet and ImageNet-V2 share theirs
        if key not in classifiers:
            classifiers[key] = build_classifier(encoder, data.classnames, data.templates, tokenizer, world)
        prefix = OPENCLIP_PREFIX.get(data.name, f"{data.name}-zeroshot")
        found = classify(encoder, classifiers[key], data, world)
        metrics |= {f"{prefix}-top1": found.top1, f"{prefix}-top5": found.top5}
    return metrics


def build_classifier(
    encoder: Encoder, classnames: Sequence[str], templates: Templates, tokenizer: Tokenizer, world: World
) -> Tensor:
    """One unit vector a class, [C, D] float32: the mean of its captions' features. Collective; equal on all ranks."""
    num_batches = -(-len(classnames) // CLASSES_PER_BATCH)
    mine = share(num_batches, world)
    names = classnames[mine.start * CLASSES_PER_BATCH : mine.stop * CLASSES_PER_BATCH]
    weights = torch.zeros(0, 0, device=world.device)

    def alive_tokenizer(texts: list[str]) -> Tensor:
        world.watchdog.report_progress()
        return tokenizer(texts)

    if names:
        with encoder.autocast():
            columns = build_zero_shot_classifier(
                encoder.module,
                tokenizer=alive_tokenizer,
                classnames=names,
                templates=[partial(fill, template) for template in templates],
                num_classes_per_batch=CLASSES_PER_BATCH,
                device=world.device,
            )
        weights = columns.T.float()
    width = int(world.max(torch.tensor(weights.shape[1], device=world.device)))
    return world.all_gather_uneven(weights if names else weights.new_zeros(0, width))


def fill(template: str | Callable[[str], str], classname: str) -> str:
    """A template's caption for a class; strings are CLIP_benchmark's with ``{c}`` or open_clip's with ``{}``."""
    return template.format(classname, c=classname) if isinstance(template, str) else template(classname)


def classify(encoder: Encoder, classifier: Tensor, data: ClassificationSet, world: World) -> Accuracy:
    """Give each image the class of a classifier [C, D] with the largest cosine. Collective; equal on all ranks.

    Of classes that score the same, the earlier one counts as the model's answer.

    Raises:
        TrainingError: the set is empty, features are not finite, or a label has no class name.
    """
    classes = torch.arange(len(classifier), device=world.device)
    counts = torch.zeros(len(classifier), 3, dtype=torch.int64, device=world.device)
    problems = torch.zeros(2, dtype=torch.int64, device=world.device)
    for batch in progress(data.loader, world, f"zero-shot on {data.name}"):
        moved = batch.to(world.device, encoder.input_dtype)
        logits = similarity(encoder.images(moved.image), classifier)  # [M, C]
        rank = best_rank(logits, moved.label[:, None] == classes)
        unknown = (moved.label < 0) | (moved.label >= len(classes))
        bad = ~logits.isfinite().all(dim=1)
        counts += class_counts(rank, moved.label.clamp(0, len(classes) - 1), len(classes))
        problems += torch.stack([unknown, bad]).sum(dim=1)
    counts, problems = world.sum(counts), world.sum(problems)
    num_unknown, num_bad = problems.tolist()
    _check(data.name, len(classes), int(counts[:, 0].sum()), num_unknown, num_bad)
    return accuracy(counts)


def mean_average_precision(
    encoder: Encoder, classifier: Tensor, data: ClassificationSet, world: World
) -> tuple[float, int]:
    """Over the classes of a classifier [C, D], on a multi-label set; and its images. Collective; equal on all ranks.

    Raises:
        TrainingError: the set is empty, or features are not finite.
    """
    found = gather_images(encoder, data, world)
    scores = similarity(found.image, classifier)
    _check(data.name, len(classifier), len(scores), 0, int((~scores.isfinite().all(dim=1)).sum()))
    return average_precision(scores, found.label.bool()).mean().item(), len(scores)


def _check(name: str, num_classes: int, total: int, unknown: int, bad: int) -> None:
    if not total:
        raise TrainingError(f"zero-shot on {name}: not one image could be read, look at the data")
    if unknown:
        raise TrainingError(
            f"zero-shot on {name}: {unknown} of {total} labels are outside 0..{num_classes - 1}. The class names "
            "do not fit the labels: look at classnames.txt"
        )
    if bad:
        raise TrainingError(
            f"zero-shot on {name}: the scores of {bad} of {total} images are NaN or infinite. {NOT_FINITE}"
        )
