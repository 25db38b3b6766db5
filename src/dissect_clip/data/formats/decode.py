"""From the bytes of a sample to an image and its captions, and what is skipped on the way.

Shapes: H, W height and width of a transformed image.
"""

from __future__ import annotations

import functools
import io
import json
import os
import warnings
from collections.abc import Callable, Mapping
from typing import NamedTuple

import numpy as np
from PIL import Image, UnidentifiedImageError
from torch import Tensor

from dissect_clip.data.skips import BadSampleError, Skip

IMAGE_SUFFIXES = ("jpg", "jpeg", "png", "webp")

MAX_FILE_SIZE = 256 << 20
"""Bytes of a sample's file; larger ones are not read."""
MAX_TEXT_SIZE = 4 << 20
"""Bytes of a txt or json; larger ones are not decoded."""
MAX_CAPTION = 8192
"""Characters of a caption that are tokenized: 16 for each of 512 tokens. open_clip's tokenizer takes up to 2 s for so
many, and its time grows with the square of a word's length."""

_FORMATS = ("AVIF", "BMP", "GIF", "ICO", "JPEG", "JPEG2000", "MPO", "PNG", "PPM", "TIFF", "WEBP")
"""What images may be, whatever their suffix says. Not all that Pillow knows: for EPS it starts Ghostscript."""


class RawSample(NamedTuple):
    """A sample as it was read, before decoding."""

    sample_id: int  # number in the dataset, or -1 without numbering
    shard: str  # file it came from
    key: str
    files: Mapping[str, bytes]  # by suffix, in lower case
    problem: BadSampleError | None = None  # found before decoding: the sample cannot be used
    is_repeat: bool = False  # whether it comes a second time in the epoch, to fill it up, and so is not counted
    has_repeat: bool = False  # whether it is the first of two visits, and need not be read before the second


def read_file(path: str | bytes) -> bytes:
    """An image file that a table or a folder names.

    Raises:
        BadSampleError: it cannot be read, is no regular file, or is larger than MAX_FILE_SIZE.
    """
    try:
        if not os.path.isfile(path):
            raise BadSampleError(Skip.NO_IMAGE, f"there is no file {os.fsdecode(path)!r}")
        with open(path, "rb") as file:
            data = file.read(MAX_FILE_SIZE + 1)
    except (OSError, ValueError) as error:
        raise BadSampleError(Skip.NO_IMAGE, str(error)) from error
    if len(data) > MAX_FILE_SIZE:
        raise BadSampleError(Skip.TOO_LARGE_FILE, f"the file has more than {MAX_FILE_SIZE} bytes")
    return data


# ---- images


@functools.cache
def _formats() -> tuple[str, ...]:
    Image.init()
    return tuple(name for name in _FORMATS if name in Image.OPEN)


def _to_eight_bits(image: Image.Image) -> Image.Image:
    """Gray levels of 16 bits, and floating-point ones from 0 to 1, as 0 to 255; Pillow would clip them."""
    levels = np.nan_to_num(np.array(image, np.float32))
    white = 65535.0 if image.mode != "F" else 1.0 if levels.max() <= 1 else 255.0
    return Image.fromarray((levels * (255 / white)).round().clip(0, 255).astype(np.uint8))


def _to_rgb(image: Image.Image) -> Image.Image:
    if image.mode == "F" or image.mode.startswith("I"):
        image = _to_eight_bits(image)
    return image if image.mode == "RGB" else image.convert("RGB")


def decode_image(files: Mapping[str, bytes], prepare: Callable[[Image.Image], None] | None = None) -> Image.Image:
    """The sample's image as RGB: its first frame, as it lies in the file, without its transparency.

    ``prepare`` is called with the opened image, of which no pixel has been decoded.

    Raises:
        BadSampleError: there is no image, it cannot be decoded, or it has more pixels than Pillow's MAX_IMAGE_PIXELS.
    """
    found = [files[suffix] for suffix in IMAGE_SUFFIXES if suffix in files]
    if not found:
        raise BadSampleError(Skip.NO_IMAGE, f"it has no image ({', '.join(IMAGE_SUFFIXES)})")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            image = Image.open(io.BytesIO(found[0]), formats=_formats())
            if prepare is not None:
                prepare(image)
            image.load()
            return _to_rgb(image)
    except (Image.DecompressionBombWarning, Image.DecompressionBombError) as error:
        raise BadSampleError(Skip.TOO_LARGE_IMAGE, str(error)) from error
    except UnidentifiedImageError as error:
        raise BadSampleError(Skip.BAD_IMAGE, "its image is of no known format") from error
    except Exception as error:  # decoders raise whatever their format's library raises
        raise BadSampleError(Skip.BAD_IMAGE, f"its image cannot be decoded: {error}") from error


def transform_image(transform: Callable[[Image.Image], Tensor], image: Image.Image) -> Tensor:
    """[3, H, W] of an image.

    Raises:
        BadSampleError: the transform fails, as some do on images of odd shapes.
    """
    try:
        return transform(image)
    except Exception as error:
        size = f"{image.width} x {image.height}"
        raise BadSampleError(Skip.BAD_IMAGE, f"its image of {size} pixels cannot be transformed: {error}") from error


# ---- captions and labels


def caption_suffixes(json_field: str | None) -> frozenset[str]:
    """The suffixes of the files that an image-caption pair needs."""
    return frozenset((*IMAGE_SUFFIXES, "txt" if json_field is None else "json"))


def _json_captions(data: bytes, field: str) -> list[str]:
    try:
        record = json.loads(data)
    except (ValueError, RecursionError) as error:
        raise BadSampleError(Skip.BAD_CAPTION, f"its json cannot be read: {error}") from error
    value = record.get(field) if isinstance(record, dict) else None
    if value is None or value == []:
        raise BadSampleError(Skip.NO_CAPTION, f"its json has no field {field!r}")
    captions = value if isinstance(value, list) else [value]
    if not all(isinstance(caption, str) for caption in captions):
        raise BadSampleError(Skip.BAD_CAPTION, f"the field {field!r} of its json is neither a text nor a list of texts")
    try:
        "".join(captions).encode("utf-8")
    except UnicodeEncodeError as error:
        raise BadSampleError(Skip.BAD_CAPTION, f"the field {field!r} of its json is no text: {error}") from error
    return captions


def _txt_captions(data: bytes, by_line: bool) -> list[str]:
    try:
        text = data.decode("utf-8")
    except UnicodeDecodeError as error:
        raise BadSampleError(Skip.BAD_CAPTION, f"its caption is not UTF-8: {error}") from error
    return [line.strip("\r") for line in text.split("\n")] if by_line else [text]


def decode_captions(files: Mapping[str, bytes], json_field: str | None, by_line: bool = False) -> list[str]:
    """The sample's captions, at least one: the text of its txt, or the field of its json where one is named.

    ``by_line``: each line of the txt is a caption. Captions of white space alone are left out, and what is longer than
    MAX_CAPTION characters is cut.

    Raises:
        BadSampleError: there is no caption, all are empty, or they cannot be decoded.
    """
    suffix = "txt" if json_field is None else "json"
    if suffix not in files:
        raise BadSampleError(Skip.NO_CAPTION, f"it has no {suffix}")
    data = files[suffix]
    if len(data) > MAX_TEXT_SIZE:
        raise BadSampleError(Skip.TOO_LARGE_FILE, f"its {suffix} has more than {MAX_TEXT_SIZE} bytes")
    captions = _txt_captions(data, by_line) if json_field is None else _json_captions(data, json_field)
    usable = [c if len(c) <= MAX_CAPTION else c.lstrip()[:MAX_CAPTION] for c in captions if c.strip()]
    if not usable:
        raise BadSampleError(Skip.EMPTY_CAPTION, "its caption is empty")
    return usable


def decode_label(files: Mapping[str, bytes], num_classes: int) -> int:
    """The sample's class, from its ``cls`` file.

    Raises:
        BadSampleError: there is no label, or it is not the number of a class.
    """
    if "cls" not in files:
        raise BadSampleError(Skip.NO_LABEL, "it has no cls")
    try:
        label = int(files["cls"])
    except ValueError:
        label = -1
    if not 0 <= label < num_classes:
        raise BadSampleError(
            Skip.BAD_LABEL, f"its label {files['cls'][:20]!r} is not a class from 0 to {num_classes - 1}"
        )
    return label


def decode_label_vector(files: Mapping[str, bytes], num_classes: int) -> list[int]:
    """Which classes a multi-label sample has, num_classes times 0 or 1, from its ``npy`` file.

    Raises:
        BadSampleError: there is no such file, or it is no vector of as many zeros and ones.
    """
    if "npy" not in files:
        raise BadSampleError(Skip.NO_LABEL, "it has no npy")
    file = io.BytesIO(files["npy"])
    try:
        # The header first: numpy would ask for as much memory as it claims.
        np.lib.format.read_magic(file)
        shape, _, dtype = np.lib.format.read_array_header_1_0(file)
        if shape != (num_classes,) or dtype.kind not in "biuf":
            raise ValueError(f"it holds {dtype} of shape {shape}")
        vector = np.frombuffer(file.read(), dtype)
        if len(vector) != num_classes or not np.isin(vector, (0, 1)).all():
            raise ValueError("it holds other values than 0 and 1, or too few")
    except (ValueError, SyntaxError) as error:
        raise BadSampleError(
            Skip.BAD_LABEL, f"its npy is not a 0 or 1 for each of {num_classes} classes: {error}"
        ) from error
    labels: list[int] = vector.astype(np.int64).tolist()
    return labels
