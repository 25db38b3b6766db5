"""What retrieval and classification share: the model in the run's precision, and how work is spread over ranks."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from typing import Any, Protocol, TypeVar, cast

import torch
from torch import Tensor, nn
from tqdm import tqdm

from dissect_clip.data.batch import LabelledBatch
from dissect_clip.distributed.world import World
from dissect_clip.errors import TrainingError

T = TypeVar("T")

NOT_FINITE = (
    "Look at the training loss before this; try --precision fp32 or amp_bf16, a smaller --lr or --grad-clip-norm 1, "
    "and continue from an earlier checkpoint with --resume"
)


class ContrastiveModel(Protocol):
    """What is used of an open_clip model: CLIP, CustomTextCLIP, CoCa, built with ``output_dict=True``."""

    logit_scale: Tensor

    def __call__(self, image: Tensor, text: Tensor) -> dict[str, Tensor]: ...
    def encode_image(self, image: Tensor, normalize: bool) -> Tensor: ...
    def encode_text(self, text: Tensor, normalize: bool) -> Tensor: ...


@dataclass(frozen=True, slots=True)
class Encoder:
    """A model and the precision it runs in."""

    module: nn.Module
    autocast: Callable[[], AbstractContextManager[Any]]
    input_dtype: torch.dtype | None  # of the images; None leaves them as they are

    @property
    def model(self) -> ContrastiveModel:
        """The module, typed as what is used of it."""
        return cast(ContrastiveModel, self.module)

    def images(self, image: Tensor) -> Tensor:
        """Unit features [M, D] float32 of images on the model's device."""
        with self.autocast():
            features = self.model.encode_image(image, normalize=True)
        return features.float()

    def texts(self, text: Tensor) -> Tensor:
        """Unit features [T, D] float32 of token rows on the model's device."""
        with self.autocast():
            features = self.model.encode_text(text, normalize=True)
        return features.float()

    def pairs(self, image: Tensor, text: Tensor) -> dict[str, Tensor]:
        """The model's own output for image-caption pairs."""
        with self.autocast():
            return self.model(image, text)


@contextmanager
def eval_mode(module: nn.Module) -> Iterator[None]:
    """Evaluation mode within the block; afterwards every submodule is in the mode it was in."""
    modes = [(part, part.training) for part in module.modules()]
    module.eval()
    try:
        yield
    finally:
        for part, training in modes:
            # Not part.train(): it would also switch the parts below, which may have been in another mode.
            part.training = training


def share(count: int, world: World) -> range:
    """This rank's share of ``count`` pieces of work: consecutive, and rank by rank, as results are gathered."""
    return range(count * world.rank // world.size, count * (world.rank + 1) // world.size)


def progress(items: Iterable[T], world: World, title: str) -> Iterator[T]:
    """The items, each a sign of life, with a progress bar on rank 0 where a terminal shows it."""
    shown = world.is_main and sys.stderr.isatty()
    for item in tqdm(items, desc=title, unit="batch", leave=False, disable=not shown):
        world.watchdog.report_progress()
        yield item


class LabelledSet(Protocol):
    """A labelled set of images."""

    @property
    def name(self) -> str: ...
    @property
    def loader(self) -> Iterable[LabelledBatch]: ...  # this rank's share; any size, also none


@dataclass(frozen=True, slots=True)
class LabelledFeatures:
    """A labelled set as the model sees it, in the order of the dataset."""

    image: Tensor  # [M, D] float32, of length one
    label: Tensor  # [M] int64, or [M, C] of a multi-label set


def gather_images(encoder: Encoder, data: LabelledSet, world: World) -> LabelledFeatures:
    """The features of all images of a set. Collective; the same on all ranks, in the same order on any number of them.

    Each rank holds all of them, M x D x 4 bytes, and up to three times that for a moment.

    Raises:
        TrainingError: the set is empty.
    """
    images, labels, orders = [], [], []
    for batch in progress(data.loader, world, f"features of {data.name}"):
        moved = batch.to(world.device, encoder.input_dtype)
        images.append(encoder.images(moved.image))
        labels.append(moved.label)
        orders.append(moved.order.to(world.device))
    # A rank without images knows neither D nor C, which is 0 where images have one label.
    widths = [images[0].shape[1], labels[0].shape[1] if labels[0].dim() == 2 else 0] if images else [0, 0]
    width, num_classes = world.max(torch.tensor(widths, device=world.device)).tolist()
    if width == 0:
        raise TrainingError(f"evaluation on {data.name}: not one image could be read, look at the data")
    no_label = torch.zeros((0, num_classes) if num_classes else 0, dtype=torch.int64, device=world.device)
    order = world.all_gather_uneven(torch.cat([no_label.new_zeros(0), *orders])).argsort()
    return LabelledFeatures(
        image=world.all_gather_uneven(torch.cat([torch.zeros(0, width, device=world.device), *images]))[order],
        label=world.all_gather_uneven(torch.cat([no_label, *labels]))[order],
    )
