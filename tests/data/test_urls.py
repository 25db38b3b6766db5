"""Shard patterns and names."""

import re
from pathlib import Path

import pytest
from shards_util import data_config, make_shards, to_tensor, tokenize, write_tar

from dissect_clip.data import build_retrieval, build_train
from dissect_clip.data.formats.urls import check_not_empty, check_present, expand, is_shard, shard_name, sibling
from dissect_clip.distributed.world import World
from dissect_clip.errors import SetupError

OPENCLIP_COUNTS = {
    "train.tar": [1],
    "{000..000}.tar": [1],
    "{000..009}.tar": [10],
    "{000..009}-{000..009}.tar": [100],
    "{a,b}/{000..009}.tar": [20],
    "a/{000..009}.tar::b/{00..04}.tar": [10, 5],
}


@pytest.mark.parametrize(("pattern", "counts"), list(OPENCLIP_COUNTS.items()))
def test_braces_and_sources_are_counted_as_in_openclip(pattern, counts):
    assert [len(source) for source in expand(pattern)] == counts


def test_a_glob_gives_local_files_sorted(tmp_path):
    make_shards(tmp_path, [1, 1, 1])
    assert [Path(url).name for url in expand(f"{tmp_path}/train-*.tar")[0]] == [f"train-00{i}.tar" for i in range(3)]


def test_a_glob_is_not_used_on_commands():
    assert expand("pipe:cat /data/*.tar") == [["pipe:cat /data/*.tar"]]


def test_environment_variables_are_those_of_webdataset(monkeypatch):
    monkeypatch.setenv("WDS_PLACE", "/data")
    assert expand("${PLACE}/{0..1}.tar") == [["/data/0.tar", "/data/1.tar"]]


@pytest.mark.parametrize(
    ("pattern", "message"),
    [
        ("nowhere/*.tar", "nowhere/.*no file matches"),
        ("{000..009.tar", "braces do not match"),
        ("${ABSENT}/0.tar", "WDS_ABSENT|WDS_NAME"),
        ("a.tar::", "source is empty"),
    ],
)
def test_a_bad_pattern_is_named(pattern, message):
    with pytest.raises(SetupError, match=message):
        expand(pattern)


@pytest.mark.parametrize("kind", ["auto", "webdataset"])
def test_a_folder_is_no_shard(tmp_path, kind):
    make_shards(tmp_path, [1])
    said = f"--train-data: {tmp_path} is a folder; give the shards in it, as '{tmp_path}/*.tar'"
    with pytest.raises(SetupError, match=re.escape(said)):
        build_train(data_config(train_data=str(tmp_path), dataset_type=kind), World(), to_tensor, tokenize, None)
    with pytest.raises(SetupError, match=r"--val-data: .* is a folder; .* test/nshards\.txt"):
        build_retrieval(data_config(val_data=str(tmp_path), dataset_type=kind), World(), to_tensor, tokenize)


def test_missing_shards_are_named_and_counted(tmp_path):
    make_shards(tmp_path, [1, 1])
    urls = expand(f"{tmp_path}/train-{{000..009}}.tar")[0]
    with pytest.raises(SetupError, match=r"--train-data: 8 of 10 shards are missing: .*train-002\.tar.* and 3 more"):
        check_present(urls, "--train-data")


def test_empty_shards_are_named(tmp_path):
    hollow = write_tar(tmp_path / "hollow.tar", [])
    nothing = tmp_path / "nothing.tar"
    nothing.touch()
    make_shards(tmp_path, [1])
    with pytest.raises(SetupError, match=r"2 of 3 shards are empty: .*hollow\.tar, .*nothing\.tar"):
        check_not_empty([str(hollow), str(nothing), f"{tmp_path}/train-000.tar"], "--train-data")


NAMES = {
    "/data/cc3m/00001.tar": "00001.tar",
    "00001.tar": "00001.tar",
    "file:/data/00001.tar": "00001.tar",
    "https://host/set/00001.tar?token=a/b": "00001.tar",
    "s3://bucket/00001.tar.gz": "00001.tar.gz",
    "pipe:aws s3 cp s3://bucket/00001.tar -": "00001.tar",
    "pipe:curl -s -L 'https://host/00001.tar' || true": "00001.tar",
    "pipe:cat /data/00001.tar": "00001.tar",
}


@pytest.mark.parametrize(("url", "name"), list(NAMES.items()))
def test_a_shard_has_its_base_name(url, name):
    assert shard_name(url) == name
    assert is_shard(url)


@pytest.mark.parametrize(
    ("url", "expected"),
    [
        ("/data/0.tar", "/data/sizes.json"),
        ("https://host/a/0.tar?key=1", "https://host/a/sizes.json?key=1"),
        ("pipe:aws s3 cp s3://bucket/a/0.tar -", "pipe:aws s3 cp s3://bucket/a/sizes.json -"),
    ],
)
def test_a_sibling_is_opened_in_the_same_way(url, expected):
    assert sibling(url, "sizes.json") == expected
