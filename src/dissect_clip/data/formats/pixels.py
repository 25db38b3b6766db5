"""From the bytes of a training image to its pixels, and what of a transform is left to the device.

open_clip's training transform ends by turning 8-bit pixels into normalised floats. Loader workers stop before that:
bytes are a quarter of the floats to copy between processes and to the device, and the arithmetic costs nothing there.

Shapes: N pairs of this rank, H, W height and width of a transformed image.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image, JpegImagePlugin
from torch import Tensor
from torch.nn import functional
from torch.utils.data import get_worker_info
from torchvision.transforms import Compose, Normalize, RandomResizedCrop, ToTensor

from dissect_clip.data.formats.decode import decode_image, transform_image
from dissect_clip.data.skips import BadSampleError
from dissect_clip.errors import SetupError
from dissect_clip.models.openclip_compat import shared_tensor

Pixels = Tensor | NDArray[np.uint8]
"""An image as a loader worker leaves it: floats [3, H, W], or bytes [H, W, 3] that the device is to normalise."""

_DCT_SCALES = (8, 4, 2)
"""Into how many times fewer pixels a side a JPEG can be decoded."""


# ---- splitting a transform


def _ends_in_normalize(transform: Any) -> bool:
    if type(transform) is not Compose or len(transform.transforms) < 2:
        return False
    to_tensor, normalize = transform.transforms[-2:]
    # MaybeToTensor is what open_clip and timm call theirs, which leaves tensors alone.
    known = isinstance(to_tensor, ToTensor) and type(to_tensor).__name__ in ("ToTensor", "MaybeToTensor")
    return known and type(normalize) is Normalize


def split_normalize(transform: Callable[[Any], Any]) -> tuple[Callable[[Any], Any], Tensor | None]:
    """What a loader worker runs of a transform, and what :meth:`Batch.to` does after it.

    Where the transform ends in ToTensor and Normalize, these are left out of the first, which then gives an RGB image,
    and the second is their mean and standard deviation, [2, 3] float32. Otherwise: the transform itself, and None.
    """
    if not _ends_in_normalize(transform):
        return transform, None
    *before, _, normalize = transform.transforms  # type: ignore[attr-defined]
    numbers = [torch.as_tensor(part, dtype=torch.float32).expand(3) for part in (normalize.mean, normalize.std)]
    return Compose(before), torch.stack(numbers)


# ---- --fast-decode


class Region(NamedTuple):
    """A rectangle of an image, in its pixels."""

    left: int
    top: int
    right: int
    bottom: int

    def divide(self, by: int) -> Region:
        """The same rectangle in an image of ``by`` times fewer pixels a side, to the nearest of its pixels."""
        return Region(*(math.floor(place / by + 0.5) for place in self))


class CropBeforeDecoding:
    """torchvision's RandomResizedCrop, drawn before the image is decoded, so that a JPEG need not be decoded in full.

    The draws are torchvision's own, in its order. The crop is resized by torch, which takes a fifth of Pillow's time;
    its levels are Pillow's except for rounding.
    """

    def __init__(self, crop: RandomResizedCrop) -> None:
        self._crop = crop
        height, width = crop.size
        self._size = (width, height)
        self._region: Region | None = None

    def prepare(self, image: Image.Image) -> None:
        """Draw the crop of an opened image, and have a JPEG decoded at the lowest resolution that still fills it."""
        top, left, height, width = self._crop.get_params(image, self._crop.scale, self._crop.ratio)
        scale = 1
        if isinstance(image, JpegImagePlugin.JpegImageFile):
            fits = (s for s in _DCT_SCALES if width >= s * self._size[0] and height >= s * self._size[1])
            scale = _decode_smaller(image, next(fits, 1))
        self._region = Region(left, top, left + width, top + height).divide(scale)

    def __call__(self, image: Image.Image) -> Image.Image:
        """The crop that was drawn, of the decoded image."""
        assert self._region is not None
        left, top, right, bottom = self._region
        pixels = torch.from_numpy(np.array(image)[top:bottom, left:right])
        resized = functional.interpolate(
            pixels.permute(2, 0, 1)[None], self._crop.size, mode=self._crop.interpolation.value, antialias=True
        )
        return Image.fromarray(resized[0].permute(1, 2, 0).numpy())


def _decode_smaller(image: JpegImagePlugin.JpegImageFile, scale: int) -> int:
    """Have an opened JPEG decoded with ``scale`` times fewer pixels a side; returns by how many it will be."""
    width, height = image.size
    drafted = image.draft(None, (width // scale, height // scale)) if scale > 1 else None
    return 1 if drafted is None else round(width / drafted[1][2])


# ---- images of a loader worker


class ImageReader:
    """Makes pixels of a sample's files, by a transform. Picklable.

    ``fast``: decode JPEGs at a lower resolution where the crop allows it, and resize with torch.

    Raises:
        SetupError: ``fast``, with a transform that does not begin with torchvision's RandomResizedCrop.
    """

    def __init__(self, transform: Callable[[Any], Any], fast: bool = False) -> None:
        self._transform, self.normalization = split_normalize(transform)
        self._crop: CropBeforeDecoding | None = None
        if fast:
            steps = getattr(self._transform, "transforms", [None])
            if type(steps[0]) is not RandomResizedCrop:
                raise SetupError("--fast-decode works with open_clip's own augmentation: leave it or use_timm out")
            self._crop = CropBeforeDecoding(steps[0])
            self._transform = Compose([self._crop, *steps[1:]])

    def __call__(self, files: Mapping[str, bytes]) -> Pixels:
        """The pixels of a sample's image.

        Raises:
            BadSampleError: there is none, it cannot be decoded, or the transform fails.
        """
        image = decode_image(files) if self._crop is None else self._decode_fast(files, self._crop)
        made = transform_image(self._transform, image)
        return made if self.normalization is None else np.asarray(made)

    @staticmethod
    def _decode_fast(files: Mapping[str, bytes], crop: CropBeforeDecoding) -> Image.Image:
        before = torch.get_rng_state()
        try:
            return decode_image(files, crop.prepare)
        except BadSampleError:
            torch.set_rng_state(before)  # as if it had been decoded before a crop was drawn
            raise


# ---- batches of a loader worker


def _empty(shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """A tensor to be filled; in a worker in shared memory, so that it need not be copied to be handed over."""
    if get_worker_info() is None:
        return torch.empty(shape, dtype=dtype)
    return shared_tensor(shape, dtype, math.prod(shape) * dtype.itemsize)


def stack_pixels(images: Sequence[Pixels]) -> Tensor:
    """N images of one size -> [N, 3, H, W]: float of floats, uint8 of bytes.

    Bytes lie as they do in an image, the colors of a pixel side by side: it is the device that puts them in order.
    """
    first = images[0]
    if isinstance(first, Tensor):
        floats = _empty((len(images), *first.shape), first.dtype)
        return torch.stack([image for image in images if isinstance(image, Tensor)], out=floats)
    stacked = _empty((len(images), *first.shape), torch.uint8)
    places = stacked.numpy()
    for place, image in zip(places, images, strict=True):
        place[...] = image
    return stacked.permute(0, 3, 1, 2)
