"""``dissect-clip export`` from the command line."""

import json
import tarfile

import pytest
from shards_util import data_config, image_bytes, make_shard, make_shards, sample, to_tensor, tokenize, write_tar

from dissect_clip.cli import export as export_command
from dissect_clip.data import build_train
from dissect_clip.data import export as export_module
from dissect_clip.distributed.world import World

SIZES = [4, 3, 5, 2]
KEPT = [0, 1, 3, 7, 8, 9, 11, 13]


@pytest.fixture
def export():
    return lambda *argv: export_command.main([str(arg) for arg in argv])


def listed(folder, ids, name="list.txt"):
    (folder / name).write_text("".join(f"{number}\n" for number in ids))
    return folder / name


def members(path):
    """Names and bytes in a tar, as Python's own reader sees them."""
    with tarfile.open(path, errors="surrogateescape") as tar:
        return [(member.name, tar.extractfile(member).read()) for member in tar]


def content(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_names_and_bytes_are_untouched(tmp_path, export, capsys):
    """Captions, metadata and what training never looks at; odd, long and upper-case names; the order of files."""
    shards = {
        "a.tar": {"x": {"json": b'{"a": [1]}', "png": image_bytes(1), "txt": b"\xff\n", "seg.npy": b""},
                  "caf\udce9": {"JPG": b"1", "txt": b"2"}, "left": sample(2)},
        "b.tar": {"dir/" + "n" * 200: sample(3), "y": {"": b"empty suffix", "cls": b"3"}},
    }  # fmt: skip
    for name, samples in shards.items():
        make_shard(tmp_path / name, samples)
    pattern = f"{tmp_path}/a.tar::{tmp_path}/b.tar"
    assert export(pattern, "--keep", listed(tmp_path, [0, 1, 3, 4]), "--output", tmp_path / "out") == 0
    expected = [member for name in shards for member in members(tmp_path / name) if not member[0].startswith("left.")]
    assert members(tmp_path / "out" / "00000.tar") == expected
    assert json.loads((tmp_path / "out" / "sizes.json").read_text()) == {"00000.tar": 4}
    assert "wrote 4 of 4 samples to 1 shards" in capsys.readouterr().out


def test_new_shards_are_a_data_set(tmp_path, export):
    pattern = make_shards(tmp_path / "old", SIZES)
    keep = listed(tmp_path, KEPT)
    assert export(pattern, "--keep", keep, "--output", tmp_path / "new", "--per-shard", 3) == 0
    assert json.loads((tmp_path / "new" / "sizes.json").read_text()) == {
        "00000.tar": 3,
        "00001.tar": 3,
        "00002.tar": 2,
    }
    config = data_config(train_data=str(tmp_path / "new" / "*.tar"), batch_size=1, record=True)
    data = build_train(config, World(), to_tensor, tokenize, None)
    pairs = {int(batch.sample_id): (int(batch.text[0, 0]), int(bytes(batch.key[0].tolist()))) for batch in data.loader}
    assert pairs == {place: (number, number) for place, number in enumerate(KEPT)}


def test_nothing_is_overwritten(tmp_path, export, capsys):
    pattern, keep = make_shards(tmp_path / "old", SIZES), listed(tmp_path, KEPT)
    (tmp_path / "new").mkdir()
    assert export(pattern, "--keep", keep, "--output", f"{tmp_path}/new/") == 2
    assert "is there already, and is not overwritten" in capsys.readouterr().err
    (tmp_path / "other.partial").mkdir()
    (tmp_path / "other.partial" / "mine").touch()
    assert export(pattern, "--keep", keep, "--output", tmp_path / "other") == 2
    assert "other.partial is not of an export" in capsys.readouterr().err
    assert [path.name for path in (tmp_path / "other.partial").iterdir()] == ["mine"]


STOPS = {
    "in a shard": (("ShardWriter", "add"), (3, 2, 1)),
    "after a shard": (("ShardWriter", "close"), (0, 1, 1)),
    "before it is noted": (("State", "write"), (1, 1, 1)),
    "at the end": (("write_sizes",), (0,)),
}
"""What an export was about to do when it was stopped, and how often it had been done in each start."""


@pytest.mark.parametrize(("place", "starts"), STOPS.values(), ids=STOPS)
def test_an_export_that_was_stopped_goes_on(tmp_path, export, place, starts, monkeypatch, capsys):
    pattern, keep = make_shards(tmp_path / "old", SIZES), listed(tmp_path, KEPT)
    flags = ("--keep", keep, "--per-shard", 2)
    assert export(pattern, *flags, "--output", tmp_path / "whole") == 0
    owner = export_module if len(place) == 1 else getattr(export_module, place[0])
    real = getattr(owner, place[-1])
    for calls in starts:
        left = iter(range(calls))

        def killed(*args, left=left):
            if next(left, None) is None:
                raise KeyboardInterrupt
            return real(*args)

        with monkeypatch.context() as patch:
            patch.setattr(owner, place[-1], killed)
            assert export(pattern, *flags, "--output", tmp_path / "new") == 130
        assert not (tmp_path / "new").exists()
    assert export(pattern, "--keep", keep, "--output", tmp_path / "new") == 2
    assert "is an export of other shards, or with other flags" in capsys.readouterr().err
    assert export(pattern, *flags, "--output", tmp_path / "new") == 0
    assert content(tmp_path / "new") == content(tmp_path / "whole")
    assert not (tmp_path / "new.partial").exists()


def test_samples_that_cannot_be_read_stop_the_export_or_are_counted(tmp_path, export, capsys):
    pattern, keep = make_shards(tmp_path / "old", [4, 3, 5]), listed(tmp_path, [0, 2, 3, 4, 8, 11])
    (tmp_path / "old" / "sizes.json").write_text(json.dumps({f"train-{n:03d}.tar": s for n, s in enumerate([4, 3, 5])}))
    first = tmp_path / "old" / "train-000.tar"
    first.write_bytes(first.read_bytes()[: 2 * 2048 + 1500])  # the third loses its caption
    out = ("--keep", keep, "--output", tmp_path / "new")
    assert export(pattern, *out) == 2
    said = capsys.readouterr().err
    assert "2 samples of" in said
    assert "train-000.tar cannot be read: it ends in the middle" in said
    assert not (tmp_path / "new").exists()
    assert export(pattern, "--keep", keep, "--output", tmp_path / "some", "--per-shard", 2, "--skip-damaged") == 0
    said = capsys.readouterr().out
    assert "wrote 4 of 6 samples to 2 shards" in said
    assert "2 samples of" in said
    assert json.loads((tmp_path / "some" / "export.json").read_text())["lost"] == [2, 3]
    assert [name for name, _ in members(tmp_path / "some" / "00000.tar")] == [
        "000000.png", "000000.txt", "000004.png", "000004.txt",
    ]  # fmt: skip


def test_samples_of_one_key_stay_apart(tmp_path, export):
    """Of two shards, one with the image and one with the caption of a key: beside each other they would be one."""
    write_tar(tmp_path / "a.tar", [("k.jpg", b"1")])
    write_tar(tmp_path / "b.tar", [("k.txt", b"2"), ("k.jpg", b"3")])
    write_tar(tmp_path / "c.tar", [("k.jpg", b"4"), ("k.txt", b"5")])
    pattern = f"{tmp_path}/{{a,b,c}}.tar"
    assert export(pattern, "--keep", listed(tmp_path, [0, 1, 2]), "--output", tmp_path / "out") == 0
    assert json.loads((tmp_path / "out" / "sizes.json").read_text()) == {"00000.tar": 1, "00001.tar": 2}


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--per-shard", "0"], "--per-shard: give at least 1"),
        (["--data-timeout", "0"], "--data-timeout"),
    ],
)
def test_bad_flags(tmp_path, export, argv, message, capsys):
    with pytest.raises(SystemExit):
        export("x.tar", "--keep", "l.txt", "--output", tmp_path / "o", *argv)
    assert message in capsys.readouterr().err


def test_bad_input_is_reported(tmp_path, export, capsys):
    assert export(tmp_path / "absent.tar", "--keep", "l.txt", "--output", tmp_path / "o") == 2
    assert "absent.tar" in capsys.readouterr().err
    pattern = make_shards(tmp_path, [2])
    assert export(pattern, "--keep", listed(tmp_path, [5]), "--output", tmp_path / "o") == 2
    assert "--keep" in capsys.readouterr().err
    assert not (tmp_path / "o.partial").exists()
