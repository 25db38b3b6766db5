"""Whatever bytes a shard holds: it is read, or its damage has a name; and what is counted is what is read.

FUZZ_EXAMPLES=20000 tries more, and other ones in every run.
"""

import bz2
import gzip
import io
import lzma
import os
import tarfile
import time
import tracemalloc

import pytest
import torch
from damage import encoded, jpeg
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from open_clip import SimpleTokenizer
from PIL import Image
from shards_util import to_tensor
from webdataset.tariterators import base_plus_ext

from dissect_clip.data.formats.decode import decode_captions, decode_image, decode_label, transform_image
from dissect_clip.data.formats.tar import WHOLE, DamagedTarError, ShardReader, split_name
from dissect_clip.data.formats.webdataset import ShardFile
from dissect_clip.data.sampling.shard_ids import count_samples
from dissect_clip.data.skips import BadSampleError, Skip, SkipCounter
from dissect_clip.errors import SetupError

EXAMPLES = os.environ.get("FUZZ_EXAMPLES")
SUFFIXES = frozenset({"jpg", "png", "txt", "json", "cls"})


def tries(number):
    """So many examples, the same in every run unless FUZZ_EXAMPLES asks for more."""
    return settings(
        max_examples=int(EXAMPLES or number),
        derandomize=EXAMPLES is None,
        database=None,
        deadline=None,
        suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
    )


def attempt(function, *arguments):
    """What it gives, or the BadSampleError that it raises."""
    try:
        return function(*arguments)
    except BadSampleError as bad:
        return bad


# ---- tars


def block(name, content, kind=b"0", size=None):
    """A member with a right checksum, whatever else its header says."""
    info = tarfile.TarInfo("x")
    info.type, info.size = kind, len(content)
    header = bytearray(info.tobuf(tarfile.USTAR_FORMAT))
    header[:100] = name[:100].ljust(100, b"\0")
    if size is not None:
        header[124:136] = size[:12].ljust(12, b"\0")
    header[148:156] = b" " * 8
    header[148:156] = b"%06o\0 " % sum(header)
    return bytes(header) + content + bytes(-len(content) % 512)


def record(key, value):
    """A pax record with the right length."""
    rest = b" %s=%s\n" % (key, value)
    length = len(rest) + 1
    while len(b"%d" % length) + len(rest) != length:
        length += 1
    return b"%d%s" % (length, rest)


def base256(size):
    return b"\x80" + size.to_bytes(11, "big")


KEYS = ["a", "b", "c/d", "c/.", "..", "/e", "__meta__", "é", "\udcff", "x" * 200, ""]
SIZES = [
    b"-1", b"-0001000", b"7777777777777", b"1_0", b"0o17", b" 17", "٣".encode(), b"\xff" * 12, b"\x80" + b"\xff" * 11,
    base256(1 << 63), base256(512),
]  # fmt: skip
PAX_LENGTHS = [b"9" * 5000, b"", b"0", b"1_0", b"+9", b"-5", b"7", b"17"]
PAX_KEYS = [b"path", b"size", b"mtime", b""]
PAX_VALUES = [b"b.txt", b"\xff.jpg", b"-512", b"0", b"3", b"512", b"x", b"1_0", b" 7", b"\0", b"1" * 30, b"9" * 5000]
KINDS = [b"0"] * 8 + [bytes([kind]) for kind in b"\x00123456 7LKxXgSV?"]

names = st.builds(
    "{}.{}".format, st.sampled_from(KEYS), st.sampled_from(["jpg", "txt", "TXT", "json", "cls", "a.jpg", ""])
) | st.text(st.characters(min_codepoint=1, codec="utf-8"), max_size=20)
raw_names = names.map(lambda name: name.encode("utf-8", "surrogateescape"))
contents = st.binary(max_size=40) | st.builds(
    lambda byte, count: bytes([byte]) * count, st.integers(0, 255), st.integers(0, 3000)
)
records = st.builds(record, st.sampled_from(PAX_KEYS), st.sampled_from(PAX_VALUES)) | st.builds(
    lambda *parts: b"%s %s=%s\n" % parts, *map(st.sampled_from, (PAX_LENGTHS, PAX_KEYS, PAX_VALUES))
)
pax = st.lists(records, max_size=3).map(b"".join) | st.binary(max_size=60)
sizes = st.none() | st.sampled_from(SIZES) | st.binary(max_size=12)
blocks = st.builds(block, raw_names, contents, st.sampled_from(KINDS), sizes) | st.builds(
    block, st.just(b"pax"), pax, st.sampled_from([b"x", b"X", b"g", b"L"])
)


def written(members, layout):
    """A tar as tarfile writes it."""
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode="w", format=layout, errors="surrogateescape") as tar:
        for name, content in members:
            info = tarfile.TarInfo(name)
            info.size = len(content)
            try:
                tar.addfile(info, io.BytesIO(content))
            except ValueError:  # too long a name for the format
                continue
    return file.getvalue()


good = st.builds(written, st.lists(st.tuples(names, contents), max_size=6), st.sampled_from([0, 1, 2]))
plain = st.builds(
    block,
    st.builds(b"%b.%b".__mod__, st.tuples(*map(st.sampled_from, ([b"a", b"b", b"c"], [b"jpg", b"txt"])))),
    contents,
)
tars = st.lists(st.one_of(plain, plain, plain, plain, blocks, good), min_size=1, max_size=9).map(b"".join)
packers = st.sampled_from([bytes, bytes, bytes, gzip.compress, bz2.compress, lzma.compress])
change = st.tuples(st.floats(0, 1, exclude_max=True), st.binary(min_size=1, max_size=4))
changes = st.just([]) | st.lists(change, max_size=3)


def mutated(data, changed, cut):
    """Some bytes are others, and the end may be missing."""
    data = bytearray(data)
    for place, other in changed:
        at = int(place * len(data))
        data[at : at + len(other)] = other[: len(data) - at]
    return bytes(data[: int(cut * len(data))])


cuts = st.sampled_from([1.0, 1.0, 1.0, 0.99, 0.7]) | st.floats(0.1, 1)
shards = st.builds(lambda data, pack, *rest: mutated(pack(data), *rest), tars, packers, changes, cuts)


def read(path, keep=WHOLE):
    """The samples, and what went wrong."""
    found = []
    try:
        with ShardReader(str(path), SUFFIXES) as reader:
            found.extend(reader.read(keep))
    except (DamagedTarError, OSError) as error:
        return found, error
    return found, None


def count(path):
    """The number of samples, and what went wrong."""
    reader = None
    try:
        with ShardReader(str(path)) as reader:
            reader.finish()
    except (DamagedTarError, OSError) as error:
        return 0 if reader is None else reader.count, error
    return reader.count, None


@given(shards, st.integers(0, 5), st.integers(0, 5))
@tries(400)
def test_what_is_counted_is_what_is_read(tmp_path, data, first, more):
    path = tmp_path / "0.tar"
    path.write_bytes(data)
    found, problem = read(path)
    counted, trouble = count(path)
    assert [sample.ordinal for sample in found] == list(range(counted))
    assert str(problem) == str(trouble)
    part, _ = read(path, range(first, first + more))
    assert part == [sample for sample in found if first <= sample.ordinal < first + more]
    if data and not data.startswith((b"\x1f\x8b", b"BZh", b"\xfd7zXZ")):
        assert sum(len(content) for sample in found for content in sample.files.values()) <= len(data)
        path.write_bytes(gzip.compress(data))
        again, other = read(path)
        assert again == found
        assert (other is None) == (problem is None)
    try:
        assert count_samples(str(path)) == counted
    except SetupError:
        assert problem is not None


@given(shards, st.none() | st.integers(0, 8), st.sampled_from([None, "x"]))
@tries(300)
def test_every_sample_is_used_or_counted(tmp_path, data, size, json_field):
    path = tmp_path / "0.tar"
    path.write_bytes(data)
    counts = torch.zeros(len(Skip), dtype=torch.int64)
    skips = SkipCounter(counts, set())
    shard = ShardFile(str(path), "0.tar", 0, size, 1.0)
    used = 0
    for sample in shard.read(range(1 << 60 if size is None else size), SUFFIXES, skips):
        used += 1
        attempt(decode_captions, sample.files, json_field)
        attempt(decode_label, sample.files, 10)
        attempt(lambda files: transform_image(to_tensor, decode_image(files)), sample.files)
    if size is not None:
        assert used + int(counts.sum() - counts[Skip.BEYOND_RECORDED_SIZE]) == size


@given(st.text(st.sampled_from("ab./_é"), max_size=12))
@tries(300)
def test_names_are_split_as_in_webdataset(name):
    assert (split_name(name) or (None, None)) == base_plus_ext(name)


# ---- what is inside

PICTURE = Image.effect_noise((24, 20), 60).convert("RGB")
FORMATS = [
    ("png", "RGB"), ("png", "P"), ("webp", "RGBA"), ("tiff", "F"), ("gif", "P"), ("bmp", "RGB"), ("ppm", "RGB"),
    ("ico", "RGBA"), ("jpeg2000", "RGB"),
]  # fmt: skip
FILES = [jpeg(PICTURE), jpeg(PICTURE.convert("CMYK"), progressive=True)]
FILES += [encoded(PICTURE.convert(mode), kind) for kind, mode in FORMATS]


@given(st.builds(mutated, st.sampled_from(FILES), changes, cuts) | st.binary(max_size=200))
@tries(400)
def test_any_image_is_decoded_or_bad(recwarn, data):
    image = attempt(decode_image, {"png": data})
    if isinstance(image, BadSampleError):
        assert image.kind in (Skip.BAD_IMAGE, Skip.TOO_LARGE_IMAGE)
    else:
        assert image.mode == "RGB"
        assert transform_image(to_tensor, image).shape == (3, 8, 8)
    assert not recwarn.list


JSON = b'{"x": "a caption", "y": [1, 2.5, null], "z": {"x": "b"}}'
TOKENIZER = SimpleTokenizer()


@given(
    st.builds(mutated, st.just(JSON), changes, cuts)
    | st.text(max_size=30).map(str.encode)
    | st.binary(max_size=40)
    | st.builds(lambda text: f'{{"x": "{text}"}}'.encode("utf-16", "surrogatepass"), st.text(max_size=20)),
    st.sampled_from([None, "x", "y"]),
    st.booleans(),
)
@tries(400)
def test_any_caption_is_tokenized_or_bad(data, json_field, by_line):
    captions = attempt(decode_captions, {"txt": data, "json": data}, json_field, by_line)
    if isinstance(captions, BadSampleError):
        assert captions.kind in (Skip.NO_CAPTION, Skip.EMPTY_CAPTION, Skip.BAD_CAPTION)
    else:
        assert TOKENIZER(captions).shape == (len(captions), 77)


# ---- found by the above, or thought of


def memory_of(path):
    """Bytes that reading and counting a shard takes, and what went wrong."""
    tracemalloc.start()
    try:
        _, problem = read(path)
        count(path)
        return tracemalloc.get_traced_memory()[1], problem
    finally:
        tracemalloc.stop()


END = bytes(1024)
IMAGE = block(b"a.jpg", b"x" * 512)
HUGE = {
    "long name that is claimed": block(b"x", b"", b"L", b"77777777777"),
    "pax header that is claimed": block(b"x", b"", b"x", base256(1 << 62)),
    "file that is claimed": block(b"a.jpg", b"x" * 512, size=base256(1 << 63)),
    "file just believed": block(b"a.jpg", b"x" * 512, size=base256(1 << 40)),
    "file that would be read": block(b"a.jpg", b"x" * 512, size=b"%o" % (255 << 20)),
    "negative size": block(b"a.jpg", b"x" * 512, size=b"-1000"),
    "negative pax size": block(b"x", record(b"size", b"-512"), b"x") + IMAGE,
    "pax size of many digits": block(b"x", record(b"size", b"9" * 5000), b"x") + IMAGE,
    "pax length of many digits": block(b"x", b"9" * 5000 + b" path=x\n", b"x"),
    "pax record without length": block(b"x", b"path=x\n", b"x"),
}


@pytest.mark.parametrize("name", HUGE)
@pytest.mark.parametrize("pack", [bytes, gzip.compress], ids=["plain", "gzip"])
def test_what_a_header_claims_takes_neither_time_nor_memory(tmp_path, name, pack):
    path = tmp_path / "0.tar"
    path.write_bytes(pack(block(b"z.txt", b"x") + HUGE[name] + END))
    memory, problem = memory_of(path)
    assert isinstance(problem, DamagedTarError)
    assert memory < 8 << 20


LONG = {
    "slashes": block(b"x", b"/" * 1_000_000, b"L"),
    "dots": block(b"x", b"." * 1_000_000, b"L"),
    "underscores": block(b"x", b"_" * 1_000_000, b"L"),
    "pax records": block(b"x", b"5 a=\n" * 200_000, b"x"),
    "pax zeros": block(b"x", bytes(1_000_000), b"x"),
}


@pytest.mark.parametrize("name", LONG)
def test_long_headers_take_little_time(tmp_path, name):
    path = tmp_path / "0.tar"
    path.write_bytes(LONG[name] + IMAGE + END)
    begun = time.process_time()
    _, problem = read(path)
    assert problem is None
    assert time.process_time() - begun < 3


def test_of_a_long_key_the_beginning_is_kept(tmp_path):
    path = tmp_path / "0.tar"
    path.write_bytes(block(b"x", b"k" * 100_000 + b".jpg", b"L") + IMAGE + END)
    ((sample,), _) = read(path)
    assert sample.key == "k" * 1000
