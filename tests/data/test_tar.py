"""Tars: what a sample is, and what can be read of a damaged shard."""

import random
import tarfile

import pytest
from shards_util import make_shard, sample, write_tar
from webdataset.tariterators import group_by_keys, tar_file_iterator

from dissect_clip.data.formats.tar import WHOLE, DamagedTarError, ShardReader

SUFFIXES = frozenset({"png", "txt"})
FORMATS = [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT]


def read_all(path, keep=WHOLE, suffixes=SUFFIXES):
    with ShardReader(str(path), suffixes) as reader:
        return list(reader.read(keep))


def count(path):
    with ShardReader(str(path)) as reader:
        return reader.finish()


@pytest.mark.parametrize("layout", FORMATS)
@pytest.mark.parametrize("name", ["0.tar", "0.tar.gz"])
def test_samples_are_those_of_webdataset(tmp_path, layout, name):
    members = [
        (f"{folder}{key}.{suffix}", bytes([key % 7]) * random.Random(key).choice([0, 1, 511, 512, 513, 2000]))
        for folder in ("", "sub/", "ü" * 40 + "/", "long/" * 19 + "/", "l" * 120 + "/", "x" * 300 + "/")
        for key in range(5)
        for suffix in ("png", "txt", "json")
        if layout != tarfile.USTAR_FORMAT or len(folder) < 96
    ]
    path = write_tar(tmp_path / name, members, layout)
    with path.open("rb") as file:
        files = [{**member, "__url__": ""} for member in tar_file_iterator(file)]
    expected = [(s["__key__"], {k: s[k] for k in ("png", "txt", "json")}) for s in group_by_keys(iter(files))]
    found = read_all(path, suffixes={"png", "txt", "json"})
    assert [(s.key, s.files) for s in found] == expected
    assert [s.ordinal for s in found] == list(range(len(found)))
    assert count(path) == len(found)


def test_what_is_no_data_does_not_count(tmp_path):
    path = tmp_path / "0.tar"
    with tarfile.open(path, "w") as tar:
        folder, link = tarfile.TarInfo("a.b"), tarfile.TarInfo("c.txt")
        folder.type, link.type, link.linkname = tarfile.DIRTYPE, tarfile.SYMTYPE, "d.txt"
        tar.addfile(folder)
        tar.addfile(link)
        for name in ("__meta__/a.txt", "__index__", "README", ".hidden", "d.txt"):
            tar.addfile(tarfile.TarInfo(name))
    assert [s.key for s in read_all(path)] == ["d"]
    assert count(path) == 1


def test_a_repeated_suffix_begins_another_sample(tmp_path):
    path = write_tar(tmp_path / "0.tar", [("a.txt", b"1"), ("a.png", b"2"), ("a.TXT", b"3"), ("b.txt", b"4")])
    assert [s.files for s in read_all(path)] == [{"txt": b"1", "png": b"2"}, {"txt": b"3"}, {"txt": b"4"}]


def test_a_key_that_comes_back_later_is_another_sample(tmp_path):
    path = write_tar(tmp_path / "0.tar", [("a.txt", b"1"), ("b.txt", b"2"), ("a.png", b"3")])
    assert [s.key for s in read_all(path)] == ["a", "b", "a"]


@pytest.mark.parametrize("keep", [range(3), range(2, 5), range(1, 100, 3), range(7, 9), range(0)])
@pytest.mark.parametrize("command", ["", "pipe:cat "])
def test_a_part_keeps_its_ordinals(tmp_path, keep, command):
    path = make_shard(tmp_path / "0.tar", {f"{i:03d}": sample(i) for i in range(8)})
    found = read_all(f"{command}{path}", keep)
    assert [(s.ordinal, s.key) for s in found] == [(i, f"{i:03d}") for i in range(8) if i in keep]
    assert all(set(s.files) == SUFFIXES for s in found)


def truncated(tmp_path, size):
    path = make_shard(tmp_path / "0.tar", {f"{i:03d}": sample(i) for i in range(4)})
    path.write_bytes(path.read_bytes()[:size])
    return path


@pytest.mark.parametrize("command", ["", "pipe:cat "])
@pytest.mark.parametrize(
    ("size", "whole", "half"),
    [(2048 * 2 + 600, 2, 1), (2048 * 2 + 1024 + 100, 2, 1), (2048 * 3 + 100, 3, 0), (2048 * 2 + 512, 2, 1)],
)
def test_a_cut_off_tar_gives_what_is_whole_and_says_so(tmp_path, size, whole, half, command):
    path = truncated(tmp_path, size)
    found = []
    with ShardReader(f"{command}{path}", SUFFIXES) as reader, pytest.raises(DamagedTarError):
        found.extend(reader.read(WHOLE))
    assert len([s for s in found if set(s.files) == SUFFIXES]) == whole
    assert len(found) == whole + half


@pytest.mark.parametrize("at", [10, 130, 150, 300])
def test_a_damaged_header_is_not_taken_for_the_end(tmp_path, at):
    path = make_shard(tmp_path / "0.tar", {f"{i:03d}": sample(i) for i in range(4)})
    data = bytearray(path.read_bytes())
    data[2048 * 2 + at] ^= 0x55
    path.write_bytes(data)
    with ShardReader(str(path)) as reader:
        with pytest.raises(DamagedTarError):
            reader.finish()
        assert reader.count == 2


def test_a_broken_compression_is_damage(tmp_path):
    path = make_shard(tmp_path / "0.tar.gz", {f"{i:03d}": sample(i) for i in range(50)})
    path.write_bytes(path.read_bytes()[:-40])
    with pytest.raises(DamagedTarError, match="compression"):
        count(path)


def test_what_is_no_tar_is_damage(tmp_path):
    path = tmp_path / "0.tar"
    path.write_text("<html>not found</html>" * 100)
    with pytest.raises(DamagedTarError):
        count(path)


def test_a_tar_without_end_marker_is_whole(tmp_path):
    path = truncated(tmp_path, 2048 * 4)
    assert count(path) == 4


def test_a_command_that_fails_is_an_error(tmp_path):
    with pytest.raises(OSError, match="exit 3"):
        count("pipe:exit 3")
