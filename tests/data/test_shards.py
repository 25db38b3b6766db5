"""Shard sizes to sample ids."""

import json
import logging

import numpy as np
import pytest
from shards_util import make_shards, write_tar

from dissect_clip.data.formats.urls import expand
from dissect_clip.data.sampling.shard_ids import ShardCounter, ShardIndex, display_names, index_shards
from dissect_clip.data.sampling.shard_sizes import SIZES_FILE
from dissect_clip.distributed.world import World
from dissect_clip.errors import SetupError

INDEX = ShardIndex(("a/0.tar", "a/1.tar", "a/2.tar"), np.array([3, 0, 4]), "test")


def test_ids_run_on_from_shard_to_shard():
    assert INDEX.num_samples == 7
    assert INDEX.offsets.tolist() == [0, 3, 3]


def test_locate_finds_the_shard_of_every_id():
    places = INDEX.locate(np.arange(7))
    assert places.tolist() == [0, 0, 0, 2, 2, 2, 2]
    assert places.dtype == np.int32


def test_the_fingerprint_is_of_names_and_sizes_not_folders():
    moved = ShardIndex(("b/c/0.tar", "pipe:cat b/1.tar", "2.tar"), INDEX.sizes, "elsewhere")
    assert moved.fingerprint == INDEX.fingerprint
    assert ShardIndex(INDEX.urls, np.array([3, 1, 3]), "test").fingerprint != INDEX.fingerprint
    assert ShardIndex(INDEX.urls[::-1], INDEX.sizes, "test").fingerprint != INDEX.fingerprint


def test_names_are_short_where_that_tells_shards_apart():
    assert display_names(["a/0.tar", "b/0.tar", "b/1.tar"]) == ("a/0.tar", "b/0.tar", "1.tar")


def test_unknown_sizes_are_counted_once_and_kept(tmp_path):
    urls = expand(make_shards(tmp_path, [3, 5, 2]))[0]
    index = index_shards(urls, {urls[1]: 5}, World(), None)
    assert index.sizes.tolist() == [3, 5, 2]
    assert index.origin == "recorded sizes and a count of 2 of 3 shards"
    assert json.loads((tmp_path / SIZES_FILE).read_text()) == {"train-000.tar": 3, "train-002.tar": 2}


def test_known_sizes_are_not_counted(tmp_path):
    urls = [f"{tmp_path}/absent-{i}.tar" for i in range(2)]
    assert index_shards(urls, dict(zip(urls, [3, 5], strict=True)), World(), None).sizes.tolist() == [3, 5]


def test_shards_of_one_name_in_two_folders(tmp_path):
    make_shards(tmp_path / "a", [3])
    make_shards(tmp_path / "b", [5])
    urls = [f"{tmp_path}/{name}/train-000.tar" for name in "ab"]
    assert index_shards(urls, {}, World(), None).sizes.tolist() == [3, 5]


def test_a_shard_listed_twice_has_ids_twice(tmp_path):
    make_shards(tmp_path, [3])
    index = index_shards([f"{tmp_path}/train-000.tar"] * 2, {}, World(), None)
    assert index.offsets.tolist() == [0, 3]


def test_remote_shards_are_counted_with_a_warning(tmp_path, caplog):
    make_shards(tmp_path / "data", [3])
    with caplog.at_level(logging.WARNING):
        index = index_shards([f"pipe:cat {tmp_path}/data/train-000.tar"], {}, World(), tmp_path)
    assert index.sizes.tolist() == [3]
    assert "reads every byte" in caplog.text
    assert "dissect-clip index" in caplog.text
    assert (tmp_path / SIZES_FILE).exists()


def test_shards_without_samples_stop_the_run(tmp_path):
    make_shards(tmp_path, [3])
    write_tar(tmp_path / "hollow.tar", [("README", b"")])
    with pytest.raises(SetupError, match=r"1 of 2 shards hold no sample: .*hollow\.tar"):
        index_shards([f"{tmp_path}/train-000.tar", f"{tmp_path}/hollow.tar"], {}, World(), None)


def test_recorded_empty_shards_are_taken_as_meant(tmp_path):
    assert index_shards(["0.tar", "1.tar"], {"0.tar": 0, "1.tar": 2}, World(), None).num_samples == 2
    with pytest.raises(SetupError, match="all 1 shards are empty"):
        index_shards(["0.tar"], {"0.tar": 0}, World(), None)


def test_an_unreadable_shard_stops_the_run(tmp_path):
    (tmp_path / "0.tar").write_text("no tar" * 200)
    with pytest.raises(SetupError, match=r"cannot read the shard .*0\.tar"):
        index_shards([f"{tmp_path}/0.tar"], {}, World(), None)


def test_what_was_counted_before_a_shard_that_cannot_be_read_is_kept(tmp_path):
    urls = [*expand(make_shards(tmp_path, [2] * 40))[0], f"{tmp_path}/bad.tar"]
    (tmp_path / "bad.tar").write_text("no tar" * 200)
    with pytest.raises(SetupError, match=r"bad\.tar"):
        index_shards(urls, {}, World(), None)
    kept = json.loads((tmp_path / SIZES_FILE).read_text())
    assert 0 < len(kept) <= 40
    assert set(kept.values()) == {2}


def test_a_cut_off_shard_counts_up_to_there(tmp_path, caplog):
    make_shards(tmp_path, [4])
    path = tmp_path / "train-000.tar"
    path.write_bytes(path.read_bytes()[: 2048 * 2 + 100])
    assert index_shards([str(path)], {}, World(), None).num_samples == 2
    assert "damaged after 2 samples" in caplog.text


def test_a_scan_can_be_waited_for_in_steps(tmp_path):
    urls = expand(make_shards(tmp_path, [1] * 20))[0]
    scan = ShardCounter(urls, threads=2)
    while not scan.wait(0.001):
        pass
    assert scan.sizes == dict.fromkeys(urls, 1)
