"""Every way in which a sample may be odd or damaged, under the name that it has in docs/reference/data.md."""

import io
import json
import struct
import tarfile
import zlib
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from dissect_clip.data.formats.decode import MAX_FILE_SIZE, MAX_TEXT_SIZE


@dataclass(frozen=True)
class Special:
    """A member that is no plain file: a link, a device, or zeros that take no place on the disk."""

    kind: bytes = tarfile.REGTYPE
    target: str = ""
    size: int = 0


Content = bytes | Special
Files = Mapping[str, Content | None]
"""Members of a sample by suffix; None for one that is not there."""


# ---- images


def encoded(image: Image.Image, kind: str, **options: Any) -> bytes:
    """An image file."""
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


def jpeg(image: Image.Image, **options: Any) -> bytes:
    """A good JPEG."""
    return encoded(image, "JPEG", quality=95, **options)


def sixteen_bits(image: Image.Image) -> bytes:
    """A PNG with gray levels from 0 to 65535."""
    return encoded(Image.fromarray(np.asarray(image.convert("L")).astype(np.uint16) * 257), "PNG")


def floating(image: Image.Image) -> bytes:
    """A TIFF with gray levels from 0 to 1."""
    return encoded(Image.fromarray(np.asarray(image.convert("L")).astype(np.float32) / 255), "TIFF")


def half_transparent(image: Image.Image) -> bytes:
    """A PNG of the same colors with transparency."""
    image = image.convert("RGBA")
    image.putalpha(100)
    return encoded(image, "PNG")


def palette(image: Image.Image) -> bytes:
    """A PNG with a palette, some of whose colors are transparent."""
    return encoded(image.quantize(16), "PNG", transparency=bytes(range(0, 256, 16)))


def animation(image: Image.Image) -> bytes:
    """A GIF of the image, then of black."""
    return encoded(image.quantize(256), "GIF", save_all=True, append_images=[Image.new("RGB", image.size)])


def turned(image: Image.Image) -> bytes:
    """A JPEG that says it is to be turned by 90 degrees."""
    exif = Image.Exif()
    exif[0x0112] = 6
    return jpeg(image, exif=exif)


def _chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def claimed_png(width: int, height: int, *extra: bytes) -> bytes:
    """A PNG of some bytes that claims a size."""
    header = _chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0))
    pixels = _chunk(b"IDAT", zlib.compress(b"\0" * 4))
    return b"\x89PNG\r\n\x1a\n" + header + b"".join(extra) + pixels + _chunk(b"IEND", b"")


def text_bomb() -> bytes:
    """A PNG of one pixel whose comment has 10 MB when unpacked."""
    return claimed_png(1, 1, _chunk(b"zTXt", b"Comment\0\0" + zlib.compress(b"\0" * 10_000_000)))


# ---- samples


@dataclass(frozen=True)
class Way:
    """What becomes of a good sample."""

    change: Callable[[Image.Image, str], Files] = lambda image, caption: {}
    """Image and caption -> the members that are not those of a good sample."""
    kind: str | None = None
    """As what it is counted; None where it is used."""
    name: str = "{}"
    """What becomes of the key."""
    in_json: bool = False
    """Whether captions are read from json, else from txt."""


def image(make: Callable[[Image.Image], Content | None], kind: str | None = None) -> Way:
    """Another image file."""
    return Way(lambda picture, caption: {"jpg": make(picture)}, kind)


def txt(make: Callable[[str], Content | None], kind: str | None = None) -> Way:
    """Another caption file."""
    return Way(lambda picture, caption: {"txt": make(caption)}, kind)


def record(make: Callable[[str], Content | None], kind: str | None = None) -> Way:
    """Another json file."""
    return Way(lambda picture, caption: {"json": make(caption)}, kind, in_json=True)


def named(name: str) -> Way:
    """Another key."""
    return Way(name=name)


WAYS: dict[str, Way] = {
    "no image": image(lambda _: None, "no_image"),
    "image of zero bytes": image(lambda _: b"", "bad_image"),
    "truncated JPEG": image(lambda picture: jpeg(picture)[:-300], "bad_image"),
    "not an image": image(lambda _: b"<html>404 Not Found</html>", "bad_image"),
    "image of an unlisted format": image(lambda picture: encoded(picture, "EPS"), "bad_image"),
    "decompression bomb": image(lambda _: claimed_png(50_000, 50_000), "too_large_image"),
    "image just above the limit": image(lambda _: claimed_png(10_000, 9_000), "too_large_image"),
    "bomb in the text of a PNG": image(lambda _: text_bomb(), "bad_image"),
    "image file above 256 MiB": image(lambda _: Special(size=MAX_FILE_SIZE + 1), "too_large_file"),
    "1 x 1 image": image(lambda picture: jpeg(picture.resize((1, 1)))),
    "20000 x 3 image": image(lambda picture: jpeg(picture.resize((20_000, 3)))),
    "CMYK image": image(lambda picture: jpeg(picture.convert("CMYK"))),
    "16-bit image": image(sixteen_bits),
    "floating-point image": image(floating),
    "image with a palette": image(palette),
    "image with transparency": image(half_transparent),
    "animated image": image(animation),
    "EXIF-rotated image": image(turned),
    "no caption": txt(lambda _: None, "no_caption"),
    "empty caption": txt(lambda _: b"", "empty_caption"),
    "caption of spaces": txt(lambda _: " \t\r\n \u3000".encode(), "empty_caption"),
    "caption that is not UTF-8": txt(lambda caption: caption.encode() + b"\xe9", "bad_caption"),
    "caption of 1 MB": txt(lambda caption: caption.encode() + b" and on" * 150_000),
    "caption file above 4 MiB": txt(lambda _: Special(size=MAX_TEXT_SIZE + 1), "too_large_file"),
    "caption with control characters": txt(lambda caption: b"\x1b]0;gone\x07\x1b[2J\r\0" + caption.encode()),
    "json that is not json": record(lambda caption: b'{"text": ' + caption.encode(), "bad_caption"),
    "json nested too deep": record(lambda _: b"[" * 1_000_000, "bad_caption"),
    "json whose caption is no text": record(lambda _: b'{"text": NaN}', "bad_caption"),
    "json whose caption has half a character": record(lambda _: b'{"text": "\\ud83d"}', "bad_caption"),
    "json without the field": record(lambda _: b"{}", "no_caption"),
    "json with NaN elsewhere": record(lambda caption: b'{"x": NaN, "text": %b}' % json.dumps(caption).encode()),
    "symbolic link": image(lambda _: Special(tarfile.SYMTYPE, "/etc/passwd"), "no_image"),
    "hard link": image(lambda _: Special(tarfile.LNKTYPE, "/etc/passwd"), "no_image"),
    "device": image(lambda _: Special(tarfile.CHRTYPE), "no_image"),
    "absolute name": named("/etc/{}"),
    "name with ..": named("../../../{}"),
    "name with line breaks and escapes": named("a\n\x1b[2J{}"),
    "name that is not UTF-8": named("\udcff{}"),
    "name of 100 kB": named("{}" + "x" * 100_000),
}


def damaged(way: Way, key: str, picture: Image.Image, caption: str) -> dict[str, Content]:
    """The members of a sample, by name."""
    good: dict[str, Content] = {
        "jpg": jpeg(picture),
        "txt": caption.encode(),
        "json": json.dumps({"text": caption}).encode(),
    }
    files = {**good, **way.change(picture, caption)}
    return {f"{way.name.format(key)}.{suffix}": data for suffix, data in files.items() if data is not None}


def write_members(path: Path, members: Iterable[tuple[str, Content]]) -> Path:
    """A tar in GNU's format."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w", format=tarfile.GNU_FORMAT, errors="surrogateescape") as tar:
        assert tar.fileobj is not None
        for name, content in members:
            info = tarfile.TarInfo(name)
            if isinstance(content, bytes):
                info.size = len(content)
                tar.addfile(info, io.BytesIO(content))
                continue
            info.type, info.linkname, info.size = content.kind, content.target, content.size
            tar.addfile(info)
            tar.fileobj.seek(-(-content.size // 512) * 512, io.SEEK_CUR)
            tar.offset += -(-content.size // 512) * 512
    return path
