"""Pixels of training images: what is left to the device, and JPEGs decoded at a lower resolution."""

import io
import random
import warnings
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from open_clip.transform import image_transform
from PIL import Image
from shards_util import caption_of, data_config, make_shard, to_tensor, tokenize
from torchvision.transforms import Compose, Normalize, RandomErasing, ToTensor

from dissect_clip.config.validation import contradictions
from dissect_clip.data import build_train
from dissect_clip.data.batch import Batch
from dissect_clip.data.formats.decode import decode_image
from dissect_clip.data.formats.pixels import CropBeforeDecoding, ImageReader, split_normalize, stack_pixels
from dissect_clip.data.skips import BadSampleError
from dissect_clip.distributed.world import World
from dissect_clip.errors import SetupError
from dissect_clip.selection import STRATEGIES

CPU = torch.device("cpu")
SIZES = {"small": (375, 500), "large": (768, 1024)}


def natural(height: int, width: int, seed: int = 0) -> Image.Image:
    """An image as photographs are: smooth, with less and less contrast the finer the detail."""
    generator = np.random.default_rng(seed)
    total = np.zeros((height, width, 3), np.float32)
    for cells in (2, 8, 32, 128, 512):
        noise = generator.normal(size=(cells, cells, 3)).astype(np.float32)
        noise = 0.75 * noise.mean(axis=2, keepdims=True) + 0.25 * noise  # colors change less than brightness
        for channel in range(3):
            layer = Image.fromarray(noise[..., channel]).resize((width, height), Image.Resampling.BICUBIC)
            total[..., channel] += np.asarray(layer) * 3 / cells**0.5
    return Image.fromarray((127 + 45 * total).clip(0, 255).astype(np.uint8))


def encode(image: Image.Image, kind: str = "JPEG", **options: Any) -> dict[str, bytes]:
    file = io.BytesIO()
    image.save(file, kind, **({"quality": 90} if kind == "JPEG" else {}) | options)
    return {"jpg": file.getvalue()}


@pytest.fixture(scope="module")
def photos() -> dict[str, Image.Image]:
    return {name: natural(*size) for name, size in SIZES.items()}


def seed(number: int) -> None:
    torch.manual_seed(number)
    random.seed(number)


def train_transform(size: int = 224, **options: Any) -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # open_clip names color_jitter and gray_scale_prob as unused
        return image_transform(size, True, **options)


def on_device(reader: ImageReader, files: Iterable[dict[str, bytes]]) -> torch.Tensor:
    """[N, 3, H, W] as a step gets it."""
    image = stack_pixels([reader(one) for one in files])
    ids = torch.arange(len(image))
    return Batch(image, ids[:, None], ids, normalization=reader.normalization).to(CPU).image


JITTER = {"color_jitter": (0.4, 0.4, 0.4, 0.1), "color_jitter_prob": 0.8, "gray_scale_prob": 0.3}


@pytest.mark.parametrize("aug", [{}, JITTER], ids=["plain", "jitter"])
@pytest.mark.parametrize(
    ("mean", "std"), [(None, None), ((0.5,), (0.25,)), ((0.1, 0.2, 0.3), (0.4, 0.5, 0.6))], ids=["own", "one", "three"]
)
def test_what_the_device_makes_of_bytes_is_what_the_transform_makes(photos: Any, aug: Any, mean: Any, std: Any):
    transform = train_transform(48, aug_cfg=aug, mean=mean, std=std)
    files = [encode(photos["small"])] * 6
    seed(1)
    expected = torch.stack([transform(decode_image(one)) for one in files])
    seed(1)
    reader = ImageReader(transform)
    made = on_device(reader, files)
    assert reader.normalization is not None
    assert made.dtype == torch.float32
    assert made.is_contiguous()
    assert torch.equal(made, expected)


def test_the_device_casts_after_normalising(photos: Any):
    reader = ImageReader(train_transform(16))
    seed(2)
    image = stack_pixels([reader(encode(photos["small"]))])
    batch = Batch(image, torch.zeros(1, 1), torch.zeros(1), normalization=reader.normalization)
    assert batch.image.dtype == torch.uint8
    assert torch.equal(batch.to(CPU, torch.bfloat16).image, batch.to(CPU).image.bfloat16())
    assert torch.equal(batch.take(torch.tensor([0])).to(CPU).image, batch.to(CPU).image)
    assert batch.to(CPU).normalization is None  # once only


@pytest.mark.parametrize(
    "transform",
    [
        to_tensor,
        Compose([to_tensor]),
        Compose([ToTensor()]),
        Compose([ToTensor(), Normalize(0.5, 0.5), RandomErasing()]),
        Compose([Normalize(0.5, 0.5), ToTensor()]),
    ],
)
def test_other_transforms_stay_whole(transform: Any):
    assert split_normalize(transform) == (transform, None)


def test_timm_augmentation_with_erasing_gives_floats(photos: Any):
    transform = train_transform(16, aug_cfg={"use_timm": True, "re_prob": 1.0})
    reader = ImageReader(transform)
    seed(3)
    expected = transform(photos["small"])
    seed(3)
    assert torch.equal(on_device(reader, [encode(photos["small"], "PNG")])[0], expected)


@pytest.mark.parametrize(
    ("aug", "fast"),
    [({}, False), ({}, True), ({"use_timm": True, "re_prob": 1.0}, False)],
    ids=["bytes", "fast", "floats"],
)
def test_workers_give_what_the_training_process_gives(tmp_path: Path, photos: Any, aug: Any, fast: bool):
    files = encode(photos["small"].resize((50, 40)))
    make_shard(tmp_path / "a.tar", {f"{i}": files | {"txt": caption_of(i).encode()} for i in range(8)})

    def load(workers: int) -> list[Batch]:
        config = data_config(train_data=str(tmp_path / "a.tar"), workers=workers, fast_decode=fast)
        return list(build_train(config, World(), train_transform(16, aug_cfg=aug), tokenize, tmp_path).loader)

    # One process: an order that both share.
    here, there = load(0), load(1)
    assert [len(batch) for batch in here] == [4, 4]
    for left, right in zip(here, there, strict=True):
        assert right.image.is_shared()
        assert not left.image.is_shared()
        assert left.image.shape == (4, 3, 16, 16)
        assert torch.equal(left.sample_id, right.sample_id)
        assert torch.equal(left.to(CPU).image, right.to(CPU).image)


# ---- --fast-decode


class Spy:
    """Stands behind the crop, and keeps what the draws after it would be."""

    def __init__(self) -> None:
        self.draws: list[float] = []

    def __call__(self, image: Image.Image) -> Image.Image:
        self.draws.append(torch.rand(()).item())
        return image


def levels(reader: ImageReader, files: dict[str, bytes], number: int) -> np.ndarray:
    seed(number)
    return np.asarray(reader(files)).astype(np.float32)


def test_pixels_are_near_those_of_the_full_resolution(photos: Any):
    transform = train_transform()
    plain, fast = ImageReader(transform), ImageReader(transform, fast=True)
    for photo in photos.values():
        files = encode(photo)
        apart = [np.abs(levels(plain, files, n) - levels(fast, files, n)) for n in range(6)]
        assert max(one.mean() for one in apart) < 2
        assert max(one.max() for one in apart) < 20


@pytest.mark.parametrize("size", [(100, 100), (500, 375), (1024, 768), (2003, 1001), (40, 2000)])
def test_it_decodes_no_more_than_it_needs_and_no_less(monkeypatch: pytest.MonkeyPatch, size: tuple[int, int]):
    """Crops of JPEGs are between one and two times the output, or not reduced (or as far as JPEG goes)."""
    crop = train_transform(64).transforms[0]
    files = encode(Image.new("RGB", size))
    for number in range(20):
        seed(number)
        before = CropBeforeDecoding(crop)
        image = decode_image(files, before.prepare)
        seed(number)
        top, left, height, width = crop.get_params(Image.new("RGB", size), crop.scale, crop.ratio)
        factor = round(size[0] / image.width) if image.width > 1 else 8
        assert image.size == (-(-size[0] // factor), -(-size[1] // factor))
        exact = np.array([left, top, left + width, top + height]) / factor
        assert np.abs(np.array(before._region) - exact).max() <= 0.5
        assert factor == 1 or (width / factor >= 64 and height / factor >= 64)
        assert factor == 8 or width < 128 * factor or height < 128 * factor


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP"])
def test_what_is_not_reduced_is_equal_but_for_roundings(photos: Any, kind: str):
    """A small JPEG, whose crops are never twice the output, and formats that know no other resolution."""
    photo = photos["small"].resize((250, 200)) if kind == "JPEG" else photos["small"]
    transform = train_transform(224 if kind == "JPEG" else 64)
    plain, fast = ImageReader(transform), ImageReader(transform, fast=True)
    for number in range(4):
        apart = np.abs(levels(plain, encode(photo, kind), number) - levels(fast, encode(photo, kind), number))
        assert apart.max() <= 1
        assert apart.mean() < 0.05


@pytest.mark.parametrize(
    ("mode", "options"),
    [("CMYK", {}), ("L", {}), ("RGB", {"progressive": True}), ("RGB", {"subsampling": 0}), ("RGB", {"quality": 40})],
)
def test_kinds_of_jpeg(photos: Any, mode: str, options: Any):
    files = encode(photos["large"].convert(mode), **options)
    transform = train_transform(96)
    plain, fast = ImageReader(transform), ImageReader(transform, fast=True)
    for number in range(3):
        left, right = levels(plain, files, number), levels(fast, files, number)
        assert right.shape == (96, 96, 3)
        assert 0 < np.abs(left - right).mean() < 2


def test_crops_coincide_and_so_does_what_is_drawn_after_them(photos: Any):
    """Also behind an image that turns out to be damaged when it is decoded."""
    good = encode(photos["large"])
    damaged = {"jpg": good["jpg"][: len(good["jpg"]) // 2]}
    draws = []
    for fast in (False, True):
        spy = Spy()
        transform = train_transform(64)
        transform.transforms.insert(1, spy)
        reader = ImageReader(transform, fast)
        seed(5)
        for files in (good, damaged, good, good):
            if files is damaged:
                with pytest.raises(BadSampleError, match="cannot be decoded"):
                    reader(files)
            else:
                reader(files)
        draws.append(spy.draws)
    assert draws[0] == draws[1]
    assert len(draws[0]) == 3


def test_a_bomb_is_no_image_either(monkeypatch: pytest.MonkeyPatch, photos: Any):
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 1000)
    with pytest.raises(BadSampleError, match="decompression bomb"):
        ImageReader(train_transform(), fast=True)(encode(photos["small"]))


def test_other_augmentation_cannot_be_drawn_ahead():
    with pytest.raises(SetupError, match="--fast-decode"):
        ImageReader(to_tensor, fast=True)
    assert any(
        "use_timm" in line
        for line in contradictions(data_config(fast_decode=True, aug_cfg={"use_timm": True}), STRATEGIES)
    )
    assert not any("fast" in line for line in contradictions(data_config(fast_decode=True), STRATEGIES))
