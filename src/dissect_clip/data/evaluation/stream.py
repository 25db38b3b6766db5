"""What the evaluation loaders of all formats share. Every sample is read once by one worker of one rank.

Shapes: M images, T captions, L tokens. Workers make batches of up to ``--batch-size`` images; their
number may differ by rank, so no collective may be called in a loop over them.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple, Protocol, TypeVar

import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader, IterableDataset
from torchvision.transforms import CenterCrop, Compose

from dissect_clip.config.settings import Config
from dissect_clip.data.batch import LabelledBatch, RetrievalBatch
from dissect_clip.data.formats.decode import (
    RawSample,
    decode_captions,
    decode_image,
    decode_label,
    decode_label_vector,
    transform_image,
)
from dissect_clip.data.loaders import Tokenizer, Transform, make_loader
from dissect_clip.data.sampling.workers import WorkerInfo, current_worker
from dissect_clip.data.skips import BadSampleError, SharedSkipCounts, SkipCounter
from dissect_clip.distributed.world import World
from dissect_clip.seeding import Stream, derive_seed, seeded

B = TypeVar("B")

_MAX_RATIO = 100


class EvaluationSource(Protocol):
    """Where a worker's share of the raw samples comes from. Picklable."""

    def samples(self, worker: WorkerInfo, skips: SkipCounter) -> Iterator[RawSample]:
        """This worker's share; ``sample_id`` is the sample's place in the set, the same for any number of workers."""
        ...


class EvaluationSample(NamedTuple):
    """An image and what belongs to it."""

    image: Tensor  # [3, H, W]
    captions: list[str]
    position: int  # in the set
    label: int | list[int]  # its class, or 0 or 1 for each class; -1 where images have captions


class EvaluationStream(IterableDataset[B]):
    """Batches of a worker's share. ``decode`` makes an image of a sample, ``collate`` a batch of images."""

    def __init__(
        self,
        source: EvaluationSource,
        decode: Callable[[RawSample], EvaluationSample],
        collate: Callable[[list[EvaluationSample]], B],
        config: Config,
        world: World,
    ) -> None:
        self.skips = SharedSkipCounts(config.data.workers)
        self._source, self._decode, self._collate = source, decode, collate
        self._rank, self._world_size = world.rank, world.size
        self._batch_size, self._seed = config.training.batch_size, config.training.seed

    def __iter__(self) -> Iterator[B]:
        worker = current_worker(self._rank, self._world_size)
        self.skips.clear(worker.id)
        images = self._images(worker)
        for number in itertools.count():
            # Some tokenizers and transforms draw random numbers even here.
            with seeded(derive_seed(self._seed, Stream.AUGMENT, worker.global_id, number)):
                chosen = list(itertools.islice(images, self._batch_size))
                batch = self._collate(chosen) if chosen else None
            if batch is None:
                return
            yield batch

    def _images(self, worker: WorkerInfo) -> Iterator[EvaluationSample]:
        skips = self.skips.counter(worker.id)
        for sample in self._source.samples(worker, skips):
            try:
                image = self._decode(sample)
            except BadSampleError as bad:
                skips.add(bad.kind, sample.shard, sample.key, str(bad))
            else:
                yield image


def _keeps_the_middle(transform: Transform) -> bool:
    """Whether the transform resizes the shorter side, then keeps the middle, as open_clip's does by default."""
    return isinstance(transform, Compose) and any(isinstance(step, CenterCrop) for step in transform.transforms)


def middle(image: Image.Image) -> Image.Image:
    """The middle of an image whose sides are in a ratio above 100, as much of it as has a ratio of about 100.

    Resizing the shorter side to 224 would make a gigabyte of 20000 x 3 pixels. Whole multiples of 4 shorter sides go,
    so that the middle of the resized image stays where it was: some of its pixels change by a level or two.
    """
    short, long = sorted(image.size)
    cut = 2 * short * max(0, -(-(long - _MAX_RATIO * short) // (4 * short)))  # on both sides
    if cut == 0:
        return image
    if image.width == long:
        return image.crop((cut, 0, image.width - cut, image.height))
    return image.crop((0, cut, image.width, image.height - cut))


def _eval_image(transform: Transform, sample: RawSample) -> Tensor:
    image = decode_image(sample.files)
    return transform_image(transform, middle(image) if _keeps_the_middle(transform) else image)


@dataclass(frozen=True)
class DecodeRetrieval:
    """Images with all their captions."""

    transform: Transform
    json_field: str | None
    by_line: bool  # each line of a txt is a caption

    def __call__(self, sample: RawSample) -> EvaluationSample:
        """Raises BadSampleError where the image or every caption is missing or broken."""
        captions = decode_captions(sample.files, self.json_field, self.by_line)
        return EvaluationSample(_eval_image(self.transform, sample), captions, sample.sample_id, -1)


@dataclass(frozen=True)
class CollateRetrieval:
    """Images -> a batch; all captions are tokenized at once."""

    tokenizer: Tokenizer

    def __call__(self, images: list[EvaluationSample]) -> RetrievalBatch:
        """At least one image."""
        return RetrievalBatch(
            image=torch.stack([image.image for image in images]),
            text=self.tokenizer([caption for image in images for caption in image.captions]),
            captions=torch.tensor([len(image.captions) for image in images]),
            order=torch.tensor([image.position for image in images]),
        )


@dataclass(frozen=True)
class DecodeLabelled:
    """Images with their class, or all their classes."""

    transform: Transform
    num_classes: int
    multilabel: bool = False

    def __call__(self, sample: RawSample) -> EvaluationSample:
        """Raises BadSampleError where image or label is missing or broken."""
        decode = decode_label_vector if self.multilabel else decode_label
        label = decode(sample.files, self.num_classes)
        return EvaluationSample(_eval_image(self.transform, sample), [], sample.sample_id, label)


def collate_labelled(images: list[EvaluationSample]) -> LabelledBatch:
    """Images -> a batch; at least one image."""
    return LabelledBatch(
        image=torch.stack([image.image for image in images]),
        label=torch.tensor([image.label for image in images]),
        order=torch.tensor([image.position for image in images]),
    )


@dataclass
class RetrievalData:
    """A validation set of images with captions; the loader gives this rank's share."""

    name: str
    loader: DataLoader[RetrievalBatch]
    stream: EvaluationStream[RetrievalBatch]

    def skip_counts(self) -> dict[str, int]:
        """Samples of this rank left out in the last pass, by reason. Not collective."""
        return self.stream.skips.totals()


@dataclass
class ClassificationData:
    """A set of images with classes, for zero-shot classification; the loader gives this rank's share."""

    name: str
    loader: DataLoader[LabelledBatch]
    stream: EvaluationStream[LabelledBatch]
    classnames: list[str]
    templates: Sequence[Callable[[str], str]]
    """Each makes a prompt of a class name; as open_clip.build_zero_shot_classifier takes them."""

    def skip_counts(self) -> dict[str, int]:
        """Samples of this rank left out in the last pass, by reason. Not collective."""
        return self.stream.skips.totals()


def count_skips(data: RetrievalData | ClassificationData, world: World) -> dict[str, int]:
    """Samples that any rank left out in the last pass, by kind. Collective, and equal on all ranks."""
    kinds, counts = zip(*data.skip_counts().items(), strict=True)
    totals = world.sum(torch.tensor(counts, device=world.device)).tolist()
    return {kind: total for kind, total in zip(kinds, totals, strict=True) if total}


def describe_skips(counts: Mapping[str, int]) -> str:
    """How many of each kind, for messages."""
    return ", ".join(f"{count} {kind}" for kind, count in counts.items())


def retrieval_data(
    source: EvaluationSource,
    config: Config,
    world: World,
    transform: Transform,
    tokenizer: Tokenizer,
    name: str = "val",
) -> RetrievalData:
    """Image-caption pairs of a source as a validation set."""
    decode = DecodeRetrieval(transform, config.data.json_caption_key, config.evaluation.val_captions == "lines")
    stream = EvaluationStream(source, decode, CollateRetrieval(tokenizer), config, world)
    return RetrievalData(name, make_loader(stream, config.data.workers, world), stream)


def classification_data(
    name: str,
    source: EvaluationSource,
    classnames: list[str],
    templates: Sequence[Callable[[str], str]],
    config: Config,
    world: World,
    transform: Transform,
    multilabel: bool = False,
) -> ClassificationData:
    """Labelled images of a source as a set for zero-shot classification."""
    decode = DecodeLabelled(transform, len(classnames), multilabel)
    stream = EvaluationStream(source, decode, collate_labelled, config, world)
    return ClassificationData(name, make_loader(stream, config.data.workers, world), stream, classnames, templates)
