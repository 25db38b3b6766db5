"""From the bytes of a sample to an image and its captions, and what is skipped on the way."""

from __future__ import annotations

import io
import json
from collections.abc import Mapping
from typing import NamedTuple

from PIL import Image, UnidentifiedImageError

from dissect_clip.data.skips import BadSampleError, Skip

IMAGE_SUFFIXES = ("jpg", "jpeg", "png", "webp")

MAX_FILE_SIZE = 256 << 20
"""Bytes of an image or caption file; larger ones are not read."""


class RawSample(NamedTuple):
    """A sample as it was read, before decoding."""

    sample_id: int  # number in the data set, or -1 where there is no numbering
    shard: str  # file it came from
    key: str
    files: dict[str, bytes]  # by suffix, in lower case


def decode_image(files: Mapping[str, bytes]) -> Image.Image:
    """The sample's image as RGB.

    Raises:
        BadSampleError: there is no image, or it cannot be decoded.
    """
    found = [files[suffix] for suffix in IMAGE_SUFFIXES if suffix in files]
    if not found:
        raise BadSampleError(Skip.NO_IMAGE, f"it has no image ({', '.join(IMAGE_SUFFIXES)})")
    try:
        image = Image.open(io.BytesIO(found[0]))
        image.load()
        return image if image.mode == "RGB" else image.convert("RGB")
    except UnidentifiedImageError as error:
        raise BadSampleError(Skip.BAD_IMAGE, "its image is of no known format") from error
    except Exception as error:  # decoders raise whatever their format's library raises
        raise BadSampleError(Skip.BAD_IMAGE, f"its image cannot be decoded: {error}") from error


def _json_captions(data: bytes, field: str) -> list[str]:
    try:
        record = json.loads(data)
    except ValueError as error:
        raise BadSampleError(Skip.BAD_CAPTION, f"its json cannot be read: {error}") from error
    value = record.get(field) if isinstance(record, dict) else None
    if value is None or value == []:
        raise BadSampleError(Skip.NO_CAPTION, f"its json has no field {field!r}")
    captions = value if isinstance(value, list) else [value]
    if not all(isinstance(caption, str) for caption in captions):
        raise BadSampleError(Skip.BAD_CAPTION, f"the field {field!r} of its json is neither a text nor a list of texts")
    return captions


def decode_captions(files: Mapping[str, bytes], json_field: str | None) -> list[str]:
    """The sample's captions, at least one: the text of its txt, or the field of its json where one is named.

    Raises:
        BadSampleError: there is no caption, or it cannot be decoded.
    """
    suffix = "txt" if json_field is None else "json"
    if suffix not in files:
        raise BadSampleError(Skip.NO_CAPTION, f"it has no {suffix}")
    if json_field is not None:
        return _json_captions(files[suffix], json_field)
    try:
        return [files[suffix].decode("utf-8")]
    except UnicodeDecodeError as error:
        raise BadSampleError(Skip.BAD_CAPTION, f"its caption is not UTF-8: {error}") from error


def caption_suffixes(json_field: str | None) -> frozenset[str]:
    """The suffixes of the files that an image-caption pair needs."""
    return frozenset((*IMAGE_SUFFIXES, "txt" if json_field is None else "json"))


def split_lines(captions: list[str]) -> list[str]:
    """Captions that stand one on each line, without the empty lines.

    Raises:
        BadSampleError: nothing is left.
    """
    lines = [line.strip("\r") for caption in captions for line in caption.split("\n") if line.strip()]
    if not lines:
        raise BadSampleError(Skip.NO_CAPTION, "its caption is empty")
    return lines


def decode_label(files: Mapping[str, bytes]) -> int:
    """The sample's class, from its ``cls`` file.

    Raises:
        BadSampleError: there is no label, or it is not a number.
    """
    if "cls" not in files:
        raise BadSampleError(Skip.NO_LABEL, "it has no cls")
    try:
        return int(files["cls"])
    except ValueError:
        raise BadSampleError(Skip.BAD_LABEL, f"its label {files['cls'][:20]!r} is not a number") from None
