#!/usr/bin/env python3
"""Make a small image-caption set of drawn scenes, with a known share of wrong captions.

A scene is one or two objects (shape, colour, size, texture) in an arrangement on a coloured background; its caption
says all of that in one of several wordings. No scene occurs twice, neither in training nor in validation. A share of
the training captions is then moved among their scenes so that none of them stays: what is right and wrong is written
to KEY.json ({"clean": false, "caption_true": ..., "scene": ...}), which training never reads.

Writes OUT/train-NNNNNN.tar, OUT/val-NNNNNN.tar (KEY.jpg, KEY.txt, KEY.json) and OUT/sizes.json. The same settings give
the same bytes.
"""

from __future__ import annotations

import argparse
import io
import json
import sys
import tarfile
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from PIL import Image, ImageDraw

Pixels = npt.NDArray[np.float32]  # [H, W] or [H, W, 3]

SHAPES = ("circle", "square", "triangle", "diamond", "star", "cross", "ring", "heart")
COLOURS = {
    "red": (215, 40, 40),
    "green": (50, 165, 70),
    "blue": (45, 80, 210),
    "yellow": (240, 205, 40),
    "orange": (245, 130, 30),
    "purple": (130, 50, 165),
    "pink": (245, 130, 185),
    "brown": (120, 75, 40),
}
SIZES = {"small": ("small", "little"), "large": ("large", "big")}
TEXTURES = ("plain", "striped")
BACKGROUNDS = {
    "white": (245, 245, 245),
    "black": (20, 20, 20),
    "grey": (130, 130, 130),
    "beige": (225, 205, 170),
    "navy": (25, 30, 80),
    "turquoise": (90, 200, 190),
}
PLACES = {
    "centre": (0.5, 0.5),
    "top left corner": (0.28, 0.28),
    "top right corner": (0.72, 0.28),
    "bottom left corner": (0.28, 0.72),
    "bottom right corner": (0.72, 0.72),
}
THINGS = len(SHAPES) * len(COLOURS) * len(SIZES) * len(TEXTURES)
SCENES = len(BACKGROUNDS) * (len(PLACES) * THINGS + 2 * THINGS**2)  # one thing in a place, or two in a row or column
DRAWN_LARGER = 4  # shapes are drawn this many times larger, then reduced: smooth edges


@dataclass(frozen=True)
class Thing:
    """One object of a scene."""

    shape: str
    colour: str
    size: str
    texture: str


@dataclass(frozen=True)
class Scene:
    """What an image shows, and all that its caption says.

    ``layout`` is a place for one object, and "row" (left to right) or "column" (top to bottom) for two.
    """

    things: tuple[Thing, ...]
    layout: str
    background: str


@dataclass(frozen=True)
class Pair:
    """An image with its caption, and the truth about it."""

    scene: Scene
    caption: str
    caption_true: str
    noise_seed: int

    @property
    def clean(self) -> bool:
        """Whether the caption is the scene's own."""
        return self.caption == self.caption_true


def choose(rng: np.random.Generator, options: Any) -> str:
    """One of the options (a sequence, or the keys of a mapping), uniformly."""
    options = tuple(options)
    return str(options[rng.integers(len(options))])


# ---- scenes and captions


def draw_scene(rng: np.random.Generator) -> Scene:
    """A random scene."""
    count = 1 if rng.random() < 0.25 else 2
    things = tuple(
        Thing(choose(rng, SHAPES), choose(rng, COLOURS), choose(rng, SIZES), choose(rng, TEXTURES))
        for _ in range(count)
    )
    layout = choose(rng, PLACES) if count == 1 else choose(rng, ("row", "column"))
    return Scene(things, layout, choose(rng, BACKGROUNDS))


def describe_thing(thing: Thing, rng: np.random.Generator) -> str:
    """As in "a large striped blue square"."""
    words = [choose(rng, SIZES[thing.size]), thing.texture, thing.colour, thing.shape]
    return "a " + " ".join(word for word in words if word != "plain")


def describe(scene: Scene, rng: np.random.Generator) -> str:
    """A true caption of a scene; it tells the scene apart from every other one."""
    names = [describe_thing(thing, rng) for thing in scene.things]
    if len(names) == 1:
        text = f"{names[0]} in the {scene.layout}"
    else:
        forward, backward = {"row": ("left of", "right of"), "column": ("above", "below")}[scene.layout]
        in_order = rng.random() < 0.5
        text = f"{names[0]} {forward} {names[1]}" if in_order else f"{names[1]} {backward} {names[0]}"
    ending = f"a {scene.background} background" if rng.random() < 0.5 else scene.background
    return f"{text} on {ending}"


def make_pairs(count: int, rng: np.random.Generator) -> list[Pair]:
    """Pairs of distinct scenes with true captions."""
    scenes: dict[Scene, None] = {}
    while len(scenes) < count:
        scenes[draw_scene(rng)] = None
    pairs = []
    for scene in scenes:
        caption = describe(scene, rng)
        pairs.append(Pair(scene, caption, caption, int(rng.integers(2**31))))
    return pairs


def mismatch(pairs: list[Pair], rate: float, rng: np.random.Generator) -> list[Pair]:
    """Move the captions of a share ``rate`` of the pairs in a random circle, so that none of them keeps its own."""
    chosen = rng.permutation(len(pairs))[: round(rate * len(pairs))]
    if len(chosen) == 1:
        raise ValueError("one caption cannot be moved alone: give a larger --mismatched or --train")
    moved = list(pairs)
    for place, donor in zip(chosen, np.roll(chosen, 1), strict=True):
        pair = pairs[place]
        moved[place] = Pair(pair.scene, pairs[donor].caption_true, pair.caption_true, pair.noise_seed)
    return moved


# ---- images


def outline(shape: str, side: int) -> Image.Image:
    """The shape as a mask that fills a square of ``side`` pixels."""
    mask = Image.new("L", (side, side))
    draw, end, third = ImageDraw.Draw(mask), side - 1, side // 3
    if shape == "circle":
        draw.ellipse((0, 0, end, end), fill=255)
    elif shape == "square":
        draw.rectangle((0, 0, end, end), fill=255)
    elif shape == "triangle":
        draw.polygon([(0, end), (end, end), (end / 2, 0)], fill=255)
    elif shape == "diamond":
        draw.polygon([(end / 2, 0), (end, end / 2), (end / 2, end), (0, end / 2)], fill=255)
    elif shape == "star":
        angles = np.pi * (np.arange(10) / 5 - 0.5)
        radius = np.where(np.arange(10) % 2 == 0, 0.5, 0.2) * end
        draw.polygon(
            [(end / 2 + r * np.cos(a), end / 2 + r * np.sin(a)) for r, a in zip(radius, angles, strict=True)], fill=255
        )
    elif shape == "cross":
        draw.rectangle((third, 0, end - third, end), fill=255)
        draw.rectangle((0, third, end, end - third), fill=255)
    elif shape == "ring":
        draw.ellipse((0, 0, end, end), fill=255)
        draw.ellipse((third * 0.8, third * 0.8, end - third * 0.8, end - third * 0.8), fill=0)
    elif shape == "heart":
        draw.ellipse((0, 0, end / 2, end * 0.55), fill=255)
        draw.ellipse((end / 2, 0, end, end * 0.55), fill=255)
        draw.polygon([(end * 0.03, end * 0.38), (end * 0.97, end * 0.38), (end / 2, end)], fill=255)
    else:
        raise ValueError(f"unknown shape {shape!r}: known are {', '.join(SHAPES)}")
    return mask


def darkened(texture: str, side: int, unit: float) -> Pixels:
    """[side, side] in {0, 1}: where a texture of ``unit`` pixels a step darkens the object."""
    y, x = np.mgrid[:side, :side] / unit
    if texture == "plain":
        pattern = np.zeros((side, side), bool)
    elif texture == "striped":
        pattern = (x + y) % 2 < 0.9
    else:
        raise ValueError(f"unknown texture {texture!r}: known are {', '.join(TEXTURES)}")
    return pattern.astype(np.float32)


def places(scene: Scene) -> list[tuple[float, float]]:
    """The objects' centres, as shares of the image's width and height."""
    if len(scene.things) == 1:
        return [PLACES[scene.layout]]
    return [(a, 0.5) if scene.layout == "row" else (0.5, a) for a in (0.28, 0.72)]


def paint(canvas: Pixels, thing: Thing, centre: tuple[float, float], diameter: float) -> None:
    """Put an object on the canvas [H, W, 3], in place; parts outside are cut off."""
    image_size = canvas.shape[0]
    side = max(4, round(diameter * image_size))
    large = side * DRAWN_LARGER
    mask = np.asarray(outline(thing.shape, large), np.float32) / 255
    dark = darkened(thing.texture, large, DRAWN_LARGER * image_size / 21)
    colour = np.asarray(COLOURS[thing.colour], np.float32) * (1 - 0.65 * dark[..., None])
    # Averages over squares of DRAWN_LARGER pixels; colour is weighted by the mask, so edges take no background in.
    blocks = (side, DRAWN_LARGER, side, DRAWN_LARGER)
    cover = mask.reshape(blocks).mean((1, 3))[..., None]
    colour = (colour * mask[..., None]).reshape(*blocks, 3).mean((1, 3))
    left, top = (round(c * image_size - side / 2) for c in centre)
    rows = slice(max(top, 0), min(top + side, image_size))
    columns = slice(max(left, 0), min(left + side, image_size))
    inner = (slice(rows.start - top, rows.stop - top), slice(columns.start - left, columns.stop - left))
    canvas[rows, columns] = canvas[rows, columns] * (1 - cover[inner]) + colour[inner]


def render(scene: Scene, image_size: int, noise_seed: int) -> Image.Image:
    """The scene as an image, with places, sizes, light and pixels a little at random."""
    rng = np.random.default_rng(noise_seed)
    light = np.linspace(-12, 12, image_size, dtype=np.float32) * rng.uniform(-1, 1)
    canvas = np.empty((image_size, image_size, 3), np.float32)
    canvas[:] = np.asarray(BACKGROUNDS[scene.background], np.float32) + light[:, None, None]
    for thing, (x, y) in zip(scene.things, places(scene), strict=True):
        diameter = 0.4 * (1.0 if thing.size == "large" else 0.55) * rng.uniform(0.9, 1.1)
        shift_x, shift_y = rng.uniform(-0.04, 0.04, 2)
        paint(canvas, thing, (x + shift_x, y + shift_y), diameter)
    canvas += rng.normal(0, 6, canvas.shape)
    return Image.fromarray(canvas.clip(0, 255).astype(np.uint8))


# ---- shards


def add_file(shard: tarfile.TarFile, name: str, content: bytes) -> None:
    """One member, without time or owner: the same settings give the same bytes."""
    entry = tarfile.TarInfo(name)
    entry.size = len(content)
    shard.addfile(entry, io.BytesIO(content))


def _shard_names(split: str, pairs: int, per_shard: int) -> list[str]:
    return [f"{split}-{number:06d}.tar" for number in range(-(-pairs // per_shard))]


def write_shards(folder: Path, split: str, pairs: list[Pair], image_size: int, per_shard: int) -> dict[str, int]:
    """Write a split's shards; returns the number of samples of each."""
    sizes: dict[str, int] = {}
    for name, start in zip(_shard_names(split, len(pairs), per_shard), range(0, len(pairs), per_shard), strict=True):
        chunk = pairs[start : start + per_shard]
        with tarfile.open(folder / name, "w", format=tarfile.USTAR_FORMAT) as shard:
            for place, pair in enumerate(chunk, start):
                key, jpeg = f"{split}{place:07d}", io.BytesIO()
                render(pair.scene, image_size, pair.noise_seed).save(jpeg, "JPEG", quality=92)
                truth = {"clean": pair.clean, "caption_true": pair.caption_true, "scene": asdict(pair.scene)}
                add_file(shard, f"{key}.jpg", jpeg.getvalue())
                add_file(shard, f"{key}.txt", pair.caption.encode())
                add_file(shard, f"{key}.json", json.dumps(truth).encode())
        sizes[name] = len(chunk)
    return sizes


def make_dataset(
    folder: Path, train: int, val: int, mismatched: float, image_size: int, per_shard: int, seed: int
) -> None:
    """Write the whole data set; see the module's description."""
    folder.mkdir(parents=True, exist_ok=True)
    written = {*_shard_names("train", train, per_shard), *_shard_names("val", val, per_shard)}
    found = {path.name for split in ("train", "val") for path in folder.glob(f"{split}-*.tar")}
    if left := sorted(found - written):
        sys.exit(f"error: {folder} holds shards of another data set, as {left[0]}: delete them or give another folder")
    rng = np.random.default_rng(seed)
    pairs = make_pairs(train + val, rng)
    sizes = write_shards(folder, "train", mismatch(pairs[:train], mismatched, rng), image_size, per_shard)
    sizes |= write_shards(folder, "val", pairs[train:], image_size, per_shard)
    (folder / "sizes.json").write_text(json.dumps(sizes, indent=2) + "\n")


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    """The command line."""
    formatter = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=formatter)
    parser.add_argument("--out", type=Path, required=True, help="folder to write to")
    parser.add_argument("--train", type=int, default=4096, help="training pairs (default: %(default)s)")
    parser.add_argument("--val", type=int, default=1000, help="validation pairs (default: %(default)s)")
    parser.add_argument(
        "--mismatched", type=float, default=0.4, help="share of wrong training captions (default: %(default)s)"
    )
    parser.add_argument("--image-size", type=int, default=64, help="pixels a side (default: %(default)s)")
    parser.add_argument("--per-shard", type=int, default=512, help="pairs in a shard (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="seed of every choice (default: %(default)s)")
    args = parser.parse_args(argv)
    if not 0 <= args.mismatched <= 1:
        parser.error(f"--mismatched {args.mismatched} is out of range: it must be from 0 to 1")
    for name, least in (("train", 1), ("val", 1), ("image_size", 16), ("per_shard", 1), ("seed", 0)):
        if getattr(args, name) < least:
            flag = "--" + name.replace("_", "-")
            parser.error(f"{flag} {getattr(args, name)} is out of range: it must be at least {least}")
    if args.train + args.val > SCENES:
        parser.error(f"--train {args.train} and --val {args.val} are too many: there are {SCENES:,} scenes")
    return args


def main() -> None:
    """Write the data set that the command line asks for."""
    args = parse_args()
    make_dataset(args.out, args.train, args.val, args.mismatched, args.image_size, args.per_shard, args.seed)
    print(f"{args.train} training and {args.val} validation pairs in {args.out}")


if __name__ == "__main__":
    main()
