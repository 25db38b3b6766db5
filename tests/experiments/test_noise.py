"""Lists of wrong captions: how they are made, and what is read."""

from __future__ import annotations

import io
import json
import sys
import tarfile
from pathlib import Path

import pytest
from conftest import ROOT

sys.path.insert(0, str(ROOT / "scripts"))  # the script is imported, as it is run

import noise_list

from dissect_clip.errors import SetupError
from experiments.noise import CaptionNoise, noisy_shards, read_list, replace_captions, swap_captions, write_noisy

COUNT = 60


def write_shard(path: Path, samples: dict[str, tuple[str, dict[str, str]]]) -> None:
    with tarfile.open(path, "w") as tar:
        for key, (caption, fields) in samples.items():
            for end, text in ((".txt", caption), (".json", json.dumps(fields))):
                info = tarfile.TarInfo(key + end)
                info.size = len(text.encode())
                tar.addfile(info, io.BytesIO(text.encode()))


@pytest.fixture
def shards(tmp_path: Path) -> list[str]:
    """Two shards with 60 pairs of 20 captions, in six groups of ten pairs; the pairs of the last have one caption."""
    samples = {}
    for number in range(COUNT):
        group = number % 6
        caption = "always the same" if group == 5 else f"caption {group} {number % 4}"
        samples[f"k{number:02d}"] = (caption, {"group": f"g{group}"})
    keys = list(samples)
    for number, part in enumerate((keys[:35], keys[35:])):
        write_shard(tmp_path / f"{number}.tar", {key: samples[key] for key in part})
    return [f"{tmp_path}/0.tar", f"{tmp_path}/1.tar"]


def captions(shards: list[str], end: str = ".txt") -> dict[str, str]:
    found = {}
    for shard in shards:
        with tarfile.open(shard) as tar:
            for member in tar:
                if member.name.endswith(end):
                    found[member.name.removesuffix(end)] = (tar.extractfile(member) or io.BytesIO()).read().decode()
    return found


@pytest.mark.parametrize("share", [0.1, 0.6, 1.0])
def test_swapped_captions_read_otherwise(shards: list[str], share: float):
    swaps, before = swap_captions(shards, share, seed=1), captions(shards)
    assert len(swaps) == round(share * COUNT)
    assert all(before[key] != before[donor] for key, donor in swaps.items())
    assert sorted(swaps) == sorted(swaps.values())  # each caption is as frequent as before
    assert swaps == swap_captions(shards, share, seed=1)
    assert swaps != swap_captions(shards, share, seed=2)


def test_captions_stay_within_a_group(shards: list[str]):
    swaps, before = swap_captions(shards, 0.7, seed=1, within="group"), captions(shards)
    groups = {key: json.loads(text)["group"] for key, text in captions(shards, ".json").items()}
    assert len(swaps) == 42
    for key, donor in swaps.items():
        assert groups[key] == groups[donor] != "g5"
        assert before[key] != before[donor]


def test_a_group_of_one_caption_is_not_swapped(shards: list[str]):
    with pytest.raises(SetupError, match="54 captions are to be swapped, but only 50 of 60 keys"):
        swap_captions(shards, 0.9, seed=1, within="group")


def test_a_field_must_be_there(shards: list[str]):
    with pytest.raises(SetupError, match="60 keys have no 'colour' in a json file, k00 for one"):
        swap_captions(shards, 0.1, seed=1, within="colour")


def test_a_caption_replaces_others(shards: list[str], tmp_path: Path):
    assert set(replace_captions(shards, 0.5, 1, "a word").values()) == {"a word"}
    listed = tmp_path / "list.csv"
    words = ["--train-data", f"{tmp_path}/?.tar", "--share", "0.5", "--caption", "a word, all", "--output", str(listed)]
    assert noise_list.main(words) == 0
    wrong = read_list(listed)
    assert len(wrong.captions) == 30
    write_noisy(shards, wrong, tmp_path / "out")
    now, before = captions([f"{tmp_path}/out/0000{n}.tar" for n in (0, 1)]), captions(shards)
    assert now == before | dict.fromkeys(wrong.captions, "a word, all")


def test_the_script_writes_what_is_read(shards: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    listed = tmp_path / "list.csv"
    words = ["--train-data", f"{tmp_path}/?.tar", "--share", "0.4", "--within", "group", "--seed", "3"]
    assert noise_list.main([*words, "--output", str(listed)]) == 0
    assert capsys.readouterr().out == f"{listed}: 24 pairs\n"
    assert read_list(listed) == CaptionNoise(swap_captions(shards, 0.4, 3, "group"), {})


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--train-data", "none.tar", "--share", "0.4"], "none.tar"),
        (["--train-data", "SHARDS", "--share", "0.4", "--within", "colour"], "no 'colour'"),
        (["--train-data", "NOTAR", "--share", "0.4"], "file could not be opened"),
    ],
)
def test_the_script_says_what_is_wrong(
    shards: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str], words: list[str], message: str
):
    (tmp_path / "x.tar").write_text("not a shard")
    names = {"SHARDS": f"{tmp_path}/?.tar", "NOTAR": f"{tmp_path}/x.tar"}
    if "SHARDS" in words:
        (tmp_path / "x.tar").unlink()
    words = [names.get(word, word) for word in words]
    assert noise_list.main([*words, "--output", str(tmp_path / "list.csv")]) == 1
    assert message in capsys.readouterr().err


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "begins with the line key,donor or key,caption"),
        ("k0,k1\n", "begins with the line"),
        ("key,donor\nk0\n", "'k0' has 1 columns, not 2"),
        ("key,caption\nk0,a, b\n", "has 3 columns"),
        ("key,donor\nk0,k1\nk0,k2\n", "'k0' appears twice"),
    ],
)
def test_a_list_of_another_form_is_an_error(tmp_path: Path, text: str, message: str):
    (tmp_path / "list.csv").write_text(text)
    with pytest.raises(SetupError, match=message):
        read_list(tmp_path / "list.csv")


def test_a_list_that_is_not_there_is_an_error(shards: list[str], tmp_path: Path):
    with pytest.raises(SetupError, match=r"missing\.csv"):
        noisy_shards("::".join(shards), tmp_path / "missing.csv", tmp_path / "noisy")


def test_shards_are_never_written_anew_from_something_else(shards: list[str], tmp_path: Path):
    listed, folder = tmp_path / "wrong.csv", tmp_path / "noisy"
    listed.write_text("key,caption\nk00,wrong\n")
    pattern = noisy_shards("::".join(shards), listed, folder)
    before = (folder / "00000.tar").stat()
    assert noisy_shards("::".join(shards), listed, folder) == pattern
    listed.write_text("key,caption\nk01,wrong\n")
    with pytest.raises(SetupError, match=r"noisy was made of .* another list .* than .*wrong\.csv now is"):
        noisy_shards("::".join(shards), listed, folder)
    assert (folder / "00000.tar").stat() == before


def test_a_shard_that_cannot_be_read_is_named(tmp_path: Path):
    (tmp_path / "bad.tar").write_text("no tar" * 200)
    (tmp_path / "wrong.csv").write_text("key,caption\nk00,wrong\n")
    with pytest.raises(SetupError, match=r"--train-data: cannot write .*noisy with the captions of"):
        noisy_shards(f"{tmp_path}/bad.tar", tmp_path / "wrong.csv", tmp_path / "noisy")
