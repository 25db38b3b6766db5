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

from dissect_clip.dist import World

T = TypeVar("T")

NOT_FINITE = (
    "Look at the training loss before this; try --precision fp32 or amp_bf16, a smaller --lr or --grad-clip-norm 1, "
    "and go on from an earlier checkpoint with --resume"
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
        world.watch.alive()
        yield item
