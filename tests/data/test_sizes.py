"""Files of shard sizes: every form, every mistake."""

import json
from pathlib import Path

import pytest
from shards_util import make_shards, write_json

from dissect_clip.data.sampling.shard_sizes import (
    merge_by_name,
    parse_info,
    parse_sizes,
    recorded_sizes,
    save_sizes,
    write_sizes,
)
from dissect_clip.errors import SetupError


def urls_in(folder, count):
    return [f"{folder}/train-{i:03d}.tar" for i in range(count)]


def test_pixparse_info(tmp_path):
    splits = {
        "train": {"name": "train", "num_samples": 7, "filenames": ["train-000.tar", "train-001.tar"]},
        "validation": {"name": "validation", "filenames": ["val-000.tar"], "shard_lengths": [2]},
    }
    splits["train"]["shard_lengths"] = [3, 4]
    write_json(tmp_path / "_info.json", {"name": "set", "splits": splits})
    assert recorded_sizes(urls_in(tmp_path, 2), None, False) == dict(zip(urls_in(tmp_path, 2), [3, 4], strict=True))


def test_openclip_sizes_of_some_shards(tmp_path):
    write_json(tmp_path / "sizes.json", {"train-000.tar": 3, "train-001.tar": "4"})
    assert list(recorded_sizes(urls_in(tmp_path, 3), None, False).values()) == [3, 4]


def test_info_goes_before_sizes(tmp_path):
    write_json(tmp_path / "sizes.json", {"train-000.tar": 3, "train-001.tar": 4})
    write_json(tmp_path / "_info.json", {"splits": {"train": {"filenames": ["train-000.tar"], "shard_lengths": [5]}}})
    assert list(recorded_sizes(urls_in(tmp_path, 2), None, False).values()) == [5, 4]


def test_len_is_enough_for_the_only_shard(tmp_path):
    make_shards(tmp_path, [3])
    (tmp_path / "__len__").write_text("3\n")
    assert recorded_sizes(urls_in(tmp_path, 1), None, False) == {urls_in(tmp_path, 1)[0]: 3}


def test_len_of_a_folder_is_not_the_size_of_one_of_its_shards(tmp_path):
    make_shards(tmp_path, [3, 4])
    (tmp_path / "__len__").write_text("7")
    assert recorded_sizes(urls_in(tmp_path, 1), None, False) == {}


def test_each_source_has_its_own_files(tmp_path):
    urls = []
    for name, size in (("a", 3), ("b", 5)):
        (tmp_path / name).mkdir()
        write_json(tmp_path / name / "sizes.json", {"0.tar": size})
        urls.append(f"{tmp_path}/{name}/0.tar")
    assert recorded_sizes(urls, None, False) == dict(zip(urls, [3, 5], strict=True))


def test_files_beside_remote_shards_are_asked_for(tmp_path):
    write_json(tmp_path / "sizes.json", {"0.tar": 3, "1.tar": 4})
    urls = [f"pipe:cat {tmp_path}/{i}.tar" for i in range(2)]
    assert recorded_sizes(urls, None, ask_remote=True) == dict(zip(urls, [3, 4], strict=True))
    assert recorded_sizes(urls, None, ask_remote=False) == {}


def test_a_server_that_does_not_answer_is_no_missing_file():
    with pytest.raises(SetupError, match=r"_info\.json, where the shards' sizes may be, sent nothing for 0\.2 s"):
        recorded_sizes(["pipe:sleep 20 # 0.tar"], None, ask_remote=True, timeout=0.2)


def test_a_page_instead_of_a_remote_file_is_no_file():
    assert recorded_sizes(["pipe:echo 'Entry not found' # 0.tar"], None, ask_remote=True) == {}


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("sizes.json", "{", "not valid JSON"),
        ("sizes.json", "[3]", "JSON object, not a list"),
        ("sizes.json", '{"0.tar": "many"}', "0.tar is 'many'"),
        ("sizes.json", '{"0.tar": -1}', "0.tar is -1"),
        ("sizes.json", '{"0.tar": 1.5}', "0.tar is 1.5"),
        ("_info.json", '{"splits": [1]}', "object of objects"),
        ("_info.json", '{"splits": {"a": {"filenames": ["0.tar"], "shard_lengths": []}}}', "split 'a'.*as many"),
        ("__len__", "about 7", "one number, not 'about 7'"),
    ],
)
def test_a_broken_file_is_named(tmp_path, name, text, message):
    (tmp_path / name).write_text(text)
    with pytest.raises(SetupError, match=f"{name}.*{message}|{message}"):
        recorded_sizes([f"{tmp_path}/0.tar"], None, False)


def test_info_without_shards_tells_nothing():
    assert parse_info('{"splits": {"train": {"num_samples": 9}}}', "_info.json") == {}


def test_an_ambiguous_name_in_info_tells_nothing():
    splits = {name: {"filenames": [f"{name}/0.tar"], "shard_lengths": [size]} for name, size in (("a", 1), ("b", 2))}
    assert parse_info(json.dumps({"splits": splits}), "_info.json") == {}


def test_counts_are_added_beside_the_shards(tmp_path):
    write_json(tmp_path / "sizes.json", {"other.tar": 9})
    assert save_sizes({f"{tmp_path}/0.tar": 3}, None) == []
    assert parse_sizes((tmp_path / "sizes.json").read_text(), "") == {"0.tar": 3, "other.tar": 9}


def test_counts_of_a_read_only_folder_go_to_the_run_folder_and_are_found_there(tmp_path):
    data, run = tmp_path / "data", tmp_path / "run"
    data.mkdir()
    run.mkdir()
    data.chmod(0o555)
    url = f"{data}/0.tar"
    assert save_sizes({url: 3}, None) == [url]
    assert save_sizes({url: 3}, run) == []
    assert list(data.iterdir()) == []
    assert recorded_sizes([url], run, False) == {url: 3}
    data.chmod(0o755)


def test_writing_leaves_the_old_file_when_it_fails(tmp_path, monkeypatch):
    write_sizes(tmp_path / "sizes.json", {"0.tar": 1})
    monkeypatch.setattr("os.replace", lambda *_: (_ for _ in ()).throw(OSError("disk full")))
    with pytest.raises(OSError, match="disk full"):
        write_sizes(tmp_path / "sizes.json", {"0.tar": 2})
    assert [Path(p).name for p in tmp_path.iterdir()] == ["sizes.json"]
    assert json.loads((tmp_path / "sizes.json").read_text()) == {"0.tar": 1}


def test_one_file_cannot_hold_two_sizes_of_a_name():
    assert merge_by_name({"a/0.tar": 1, "b/1.tar": 2}) == {"0.tar": 1, "1.tar": 2}
    with pytest.raises(SetupError, match=r"called 0\.tar"):
        merge_by_name({"a/0.tar": 1, "b/0.tar": 2})
