"""Odd and damaged data: every row of the table in docs/reference/data.md."""

import gzip
import logging
import os
import re
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from damage import (
    WAYS,
    animation,
    damaged,
    encoded,
    floating,
    half_transparent,
    jpeg,
    palette,
    sixteen_bits,
    turned,
    write_members,
)
from open_clip import SimpleTokenizer
from open_clip.transform import image_transform
from PIL import Image
from shards_util import data_config, make_shards, sample, to_tensor, tokenize, write_tar

from dissect_clip.data import build_retrieval, build_train
from dissect_clip.data.evaluation.stream import middle
from dissect_clip.data.formats.decode import MAX_CAPTION, decode_captions, decode_image
from dissect_clip.data.skips import Skip, SkipCounter
from dissect_clip.distributed.world import World
from dissect_clip.errors import SetupError

DOCS = Path(__file__).resolve().parent.parent.parent / "docs" / "reference" / "data.md"
TIMEOUT = 0.5


def train_epoch(data):
    """Ids and captions (the number each ends with) of an epoch, and what was left out."""
    data.set_epoch(0)
    batches = []
    for batch in data.loader:
        data.consume(batch)
        batches.append(batch)
    pairs = {i: c for b in batches for i, c in zip(b.sample_id.tolist(), b.text[:, 0].tolist(), strict=True)}
    return pairs, {kind: count for kind, count in data.skip_counts().items() if count}


def load(pattern, **flags):
    return build_train(data_config(train_data=pattern, select=True, **flags), World(), to_tensor, tokenize, None)


# ---- samples


def picture(number=0):
    """An image of 40 x 30 smooth colors, unlike any other number's."""
    x, y = np.meshgrid(np.arange(40), np.arange(30))
    return Image.fromarray(np.stack([x * 6, y * 8, (x + y + 20 * number) % 256], -1).astype(np.uint8))


@pytest.mark.parametrize("name", WAYS)
def test_a_sample(tmp_path, name, caplog, recwarn):
    way = WAYS[name]
    files = damaged(way, "middle", picture(), "a caption 1")
    good = [(f"{key}.{suffix}", data) for key in "az" for suffix, data in sample(0, json=b'{"text": "x 0"}').items()]
    write_members(tmp_path / "0.tar", [*good[:3], *files.items(), *good[3:]])
    json_field = "text" if way.in_json else None
    # Without a record keys are not loaded, with one they are.
    data = load(f"{tmp_path}/0.tar", json_caption_key=json_field, record=True, batch_size=1)
    pairs, skipped = train_epoch(data)
    assert data.num_samples == 3
    assert set(pairs) == ({0, 2} if way.kind else {0, 1, 2})
    assert skipped == ({way.kind: 1} if way.kind else {})
    assert all(line.isprintable() for line in caplog.messages)
    assert not recwarn.list

    config = data_config(val_data=f"{tmp_path}/0.tar", json_caption_key=json_field)
    validation = build_retrieval(config, World(), image_transform(8, is_train=False), tokenize)
    assert sum(len(batch.image) for batch in validation.loader) == len(pairs)
    assert {kind: count for kind, count in validation.skip_counts().items() if count} == skipped


def documented():
    """The rows of the table in the documentation: damage -> the kinds it is counted as."""
    lines = DOCS.read_text().split("## Damaged data")[1].split("\n## ")[0].splitlines()
    cells = [[cell.strip() for cell in line.strip("|").split(" | ")] for line in lines if line.startswith("| ")]
    rows = {cell[0]: sorted(re.findall(r"`(\w+)`", cell[2])) for cell in cells if cell[0] != "damage"}
    assert len(rows) == sum(cell[0] != "damage" for cell in cells)
    return rows


# ---- pixels, captions and names


def pixels(data):
    return np.asarray(decode_image({"jpg": data})).astype(int)


def test_gray_levels_of_16_bits_are_scaled_not_clipped():
    gray = np.asarray(picture().convert("L"))
    for data in (sixteen_bits(picture()), floating(picture())):
        assert (pixels(data) == gray[..., None]).all()
    wide = Image.fromarray(gray.astype(np.int32) * 257)
    assert wide.mode == "I"
    assert (pixels(encoded(wide, "TIFF")) == gray[..., None]).all()
    assert (pixels(encoded(Image.fromarray(gray.astype(np.float32)), "TIFF")) == gray[..., None]).all()
    odd = Image.fromarray(np.array([[np.nan, np.inf, -np.inf, 7.0]], np.float32))
    assert pixels(encoded(odd, "TIFF"))[0, :, 0].tolist() == [0, 255, 0, 7]


def test_transparency_is_dropped_and_the_first_frame_is_taken():
    colors = np.asarray(picture()).astype(int)
    assert (pixels(half_transparent(picture())) == colors).all()
    assert abs(pixels(palette(picture())) - colors).mean() < 20
    assert abs(pixels(animation(picture())) - colors).mean() < 20


def test_images_are_not_turned_and_cmyk_becomes_rgb():
    colors = np.asarray(picture()).astype(int)
    assert (pixels(turned(picture())) == pixels(jpeg(picture()))).all()
    assert abs(pixels(jpeg(picture().convert("CMYK"))) - colors).mean() < 5


@pytest.mark.parametrize("size", [(3, 2001), (1500, 1), (7, 900), (333, 33400), (640, 480), (300, 3)])
def test_of_a_long_image_the_middle_is_enough(size):
    noise = np.random.default_rng(0).integers(0, 256, (size[1], size[0], 3), np.uint8)
    image, transform = Image.fromarray(noise), image_transform(32, is_train=False)
    assert max(middle(image).size) <= 100 * min(size) or middle(image) is image
    levels = (transform(image) - transform(middle(image))).abs() * 255 * 0.28
    assert levels.max() < 3
    assert (levels > 0.5).float().mean() < 0.02


def test_evaluation_on_a_long_image_takes_little_memory(tmp_path):
    resource = pytest.importorskip("resource")
    write_members(tmp_path / "0.tar", damaged(WAYS["20000 x 3 image"], "a", picture(), "x").items())
    config = data_config(val_data=f"{tmp_path}/0.tar")
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    data = build_retrieval(config, World(), image_transform(224, is_train=False), tokenize)
    assert [len(batch.image) for batch in data.loader] == [1]
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 200_000  # KiB; a gigabyte otherwise


def test_a_transform_that_fails_is_a_matter_of_its_image(tmp_path):
    def only_large(image):
        if image.width < 8:
            raise ValueError("too small")
        return to_tensor(image)

    small = encoded(Image.new("RGB", (4, 4)), "PNG")
    config = data_config(train_data=make_shards(tmp_path, [4], {2: {"png": small}}), select=True)
    pairs, skipped = train_epoch(build_train(config, World(), only_large, tokenize, None))
    assert (set(pairs), skipped) == ({0, 1, 3}, {"bad_image": 1})


def test_a_long_caption_is_cut_where_no_token_is_lost():
    words = " ".join(f"extraordinarily{i}" for i in range(60_000))
    (caption,) = decode_captions({"txt": words.encode()}, None)
    assert len(caption) == MAX_CAPTION
    tokenizer = SimpleTokenizer()
    assert torch.equal(tokenizer([caption], 512), tokenizer([words[: 4 * MAX_CAPTION]], 512))
    (indented,) = decode_captions({"txt": b" " * 100_000 + b"a cat"}, None)
    assert indented == "a cat"


def test_empty_captions_in_a_list_are_left_out():
    assert decode_captions({"json": b'{"x": ["", " ", "a", "\\n"]}'}, "x") == ["a"]


def test_names_and_reasons_reach_the_log_escaped_and_short(caplog):
    skips = SkipCounter(torch.zeros(99, dtype=torch.int64), set())
    with caplog.at_level(logging.WARNING):
        skips.add(Skip.BAD_IMAGE, "0.tar", "key\x1b[2J\r\n\udcff" + "k" * 1000, "reason\n\x9b" + "r" * 1000)
    (message,) = caplog.messages
    assert r"key\x1b[2J\r\n\udcffkkk" in message
    assert r"reason\n\x9brrr" in message
    assert message.isprintable()
    assert len(message) < 800


def test_rows_of_a_csv_file_open_regular_files_only(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "good.png").write_bytes(sample(7)["png"])
    paths = ["good.png", "absent.png", "pipe", ".", "/dev/zero", "good.png\0", "x" * 5000]
    lines = [f"{tmp_path / path}\tsample 7" for path in paths]
    (tmp_path / "data.csv").write_text("\n".join(["filepath\ttitle", *lines]))
    assert train_epoch(load(f"{tmp_path}/data.csv")) == ({0: 7}, {"no_image": 6})


# ---- members


def members(*names):
    return [(name, sample(0)[name.rpartition(".")[2]]) for name in names]


MEMBERS = {
    "one key twice, one after the other": (members("a.png", "a.txt", "a.png", "a.txt"), 2, {}),
    "one key twice, apart": (members("a.png", "a.txt", "b.png", "b.txt", "a.png", "a.txt"), 3, {}),
    "members out of order": (
        members("a.png", "b.png", "b.txt", "a.txt"), 3, {"no_caption": 1, "no_image": 1},
    ),
    "empty name": ([*members("a.png", "a.txt"), ("", b"x"), (".txt", b"x"), *members("b.png", "b.txt")], 2, {}),
}  # fmt: skip


@pytest.mark.parametrize("name", MEMBERS)
def test_members(tmp_path, name):
    content, size, expected = MEMBERS[name]
    write_members(tmp_path / "0.tar", content)
    data = load(f"{tmp_path}/0.tar")
    pairs, skipped = train_epoch(data)
    assert (data.num_samples, skipped) == (size, expected)
    assert len(pairs) == size - sum(expected.values())


def test_one_key_in_two_shards(tmp_path):
    for shard in range(2):
        write_tar(tmp_path / f"{shard}.tar", members("a.png", "a.txt"))
    assert set(train_epoch(load(f"{tmp_path}/{{0..1}}.tar"))[0]) == {0, 1}


# ---- shards


def rewrite(change: Callable[[bytes], bytes]) -> Callable[[Path], None]:
    return lambda path: path.write_bytes(change(path.read_bytes())) and None


def claiming(size: int) -> Callable[[bytes], bytes]:
    """The third sample's image claims a size."""

    def change(data: bytes) -> bytes:
        at = 2 * 2048
        header = bytearray(data[at : at + 512])
        header[124:136] = b"\x80" + size.to_bytes(11, "big")
        header[148:156] = b" " * 8
        header[148:156] = b"%06o\0 " % sum(header)
        return data[:at] + bytes(header) + data[at + 512 :]

    return change


def of_size(size: int) -> Callable[[Path], None]:
    """A shard of other samples."""
    return lambda path: write_tar(path, [m for i in range(size) for m in members(f"n{i}.png", f"n{i}.txt")]) and None


# What happens to a shard of 4 samples (2,048 bytes each) after the start: how, which are read, the rest counted as.
SHARDS: dict[str, tuple[Callable[[Path], None], set[int], dict[str, int]]] = {
    "truncated tar": (rewrite(lambda data: data[: 2 * 2048 + 512 + 40]), {0, 1}, {"no_caption": 1, "damaged_shard": 1}),
    "tar cut in a header": (rewrite(lambda data: data[: 2 * 2048 + 100]), {0, 1}, {"damaged_shard": 2}),
    "damaged header": (
        rewrite(lambda data: data[:4100] + b"\xff" + data[4101:]), {0, 1}, {"damaged_shard": 2},
    ),
    "header that claims 8 EiB": (rewrite(claiming(1 << 63)), {0, 1}, {"damaged_shard": 2}),
    "header that claims more than there is": (
        rewrite(claiming(200 << 20)), {0, 1}, {"no_caption": 1, "damaged_shard": 1},
    ),
    "gzip named .tar": (rewrite(gzip.compress), {0, 1, 2, 3}, {}),
    "truncated gzip": (rewrite(lambda data: gzip.compress(data)[:-9]), {0, 1, 2, 3}, {}),
    "not a tar": (rewrite(lambda _: b"<html>404 Not Found</html>" * 100), set(), {"damaged_shard": 4}),
    "shard of zero bytes": (rewrite(lambda _: b""), set(), {"damaged_shard": 4}),
    "empty tar": (rewrite(lambda _: bytes(10240)), set(), {"below_recorded_size": 4}),
    "shard that vanishes": (Path.unlink, set(), {"unreadable_shard": 4}),
    "shard replaced by a shorter one": (of_size(3), {0, 1, 2}, {"below_recorded_size": 1}),
    "shard replaced by a longer one": (of_size(6), {0, 1, 2, 3}, {"beyond_recorded_size": 2}),
    "shard replaced by one of its size": (of_size(4), {0, 1, 2, 3}, {}),
}  # fmt: skip


@pytest.mark.parametrize("name", SHARDS)
@pytest.mark.parametrize("command", ["", "pipe:cat "], ids=["local", "pipe"])
def test_a_shard(tmp_path, name, command):
    change, left, expected = SHARDS[name]
    make_shards(tmp_path, [4, 4])
    data = load(f"{command}{tmp_path}/train-{{000..001}}.tar")
    change(tmp_path / "train-000.tar")
    pairs, skipped = train_epoch(data)
    assert set(pairs) == left | {4, 5, 6, 7}
    assert skipped == expected


@pytest.mark.parametrize("content", [b"", bytes(10240)], ids=["zero bytes", "zero blocks"])
@pytest.mark.parametrize("command", ["", "pipe:cat "], ids=["local", "pipe"])
def test_an_empty_shard_at_the_start_stops_the_run(tmp_path, content, command):
    make_shards(tmp_path, [4, 4])
    (tmp_path / "train-001.tar").write_bytes(content)
    with pytest.raises(SetupError, match=r"train-001\.tar"):
        load(f"{command}{tmp_path}/train-{{000..001}}.tar")


REMOTE = {
    "remote that stalls at once": ("sleep 600", set(), {"unreadable_shard": 4}),
    "remote that stalls midway": ("head -c 4196; sleep 600", {0, 1}, {"damaged_shard": 2}),
    "remote that fails midway": ("head -c 4196; exit 3", {0, 1}, {"damaged_shard": 2}),
}


def remote(folder: Path, script: str) -> str:
    """A good remote shard, and one whose command does something else once there is a file ``broken``."""
    first = f"pipe:( if [ -e {folder}/broken ]; then {script}; else cat; fi ) < {folder}/train-000.tar"
    return f"{first}::pipe:cat {folder}/train-001.tar"


@pytest.mark.parametrize("name", REMOTE)
def test_a_remote(tmp_path, name):
    script, left, expected = REMOTE[name]
    make_shards(tmp_path, [4, 4])
    pattern = remote(tmp_path, script)
    data = load(pattern, data_timeout=TIMEOUT)
    (tmp_path / "broken").touch()
    begun = time.monotonic()
    pairs, skipped = train_epoch(data)
    assert set(pairs) == left | {4, 5, 6, 7}
    assert skipped == expected
    assert time.monotonic() - begun < 20 * TIMEOUT

    config = data_config(val_data=pattern, data_timeout=TIMEOUT)
    validation = build_retrieval(config, World(), to_tensor, tokenize)
    assert sum(len(batch.image) for batch in validation.loader) == len(pairs)
    assert {kind: count for kind, count in validation.skip_counts().items() if count} == dict.fromkeys(expected, 1)


@pytest.mark.parametrize(
    ("script", "message"),
    [("head -c 4196; sleep 600", r"nothing came for 0\.5 seconds"), ("head -c 4196; exit 3", "ended with exit 3")],
)
def test_a_remote_that_breaks_while_it_is_counted_stops_the_run(tmp_path, script, message):
    make_shards(tmp_path, [4, 4])
    (tmp_path / "broken").touch()
    with pytest.raises(SetupError, match=rf"cannot read the shard (.|\n)* after 2 samples: .*{message}"):
        load(remote(tmp_path, script), data_timeout=TIMEOUT)
    assert not (tmp_path / "sizes.json").exists()


# ---- the table


def test_the_table_in_the_documentation_is_what_is_tested():
    tested = {name: [way.kind] if way.kind else [] for name, way in WAYS.items()}
    tested |= {name: sorted(kinds) for name, (_, _, kinds) in (MEMBERS | SHARDS | REMOTE).items()}
    tested |= {"one key in two shards": []}
    assert documented() == tested
