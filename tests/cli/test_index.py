"""``dissect-clip index`` from the command line."""

import json

import pytest
from shards_util import make_shards, write_json, write_tar

from dissect_clip.cli.index import main


@pytest.fixture
def index():
    return lambda *argv: main([str(arg) for arg in argv])


def test_writes_sizes_beside_the_shards(tmp_path, index, capsys):
    pattern = make_shards(tmp_path, [3, 5])
    assert index(pattern) == 0
    assert json.loads((tmp_path / "sizes.json").read_text()) == {"train-000.tar": 3, "train-001.tar": 5}
    assert "2 shards, 8 samples" in capsys.readouterr().out
    assert index(pattern, "--check") == 0


def test_writes_one_file_for_remote_shards(tmp_path, index):
    make_shards(tmp_path, [3, 5])
    assert index(f"pipe:cat {tmp_path}/train-{{000..001}}.tar", "--output", tmp_path / "out.json", "--workers", 1) == 0
    assert json.loads((tmp_path / "out.json").read_text()) == {"train-000.tar": 3, "train-001.tar": 5}
    assert not (tmp_path / "sizes.json").exists()


def test_remote_shards_without_output_fail_with_a_hint(tmp_path, index, capsys):
    make_shards(tmp_path, [3])
    assert index(f"pipe:cat {tmp_path}/train-000.tar") == 1
    assert "--output FILE" in capsys.readouterr().err


def test_check_names_what_differs(tmp_path, index, capsys):
    pattern = make_shards(tmp_path, [3, 5, 2])
    write_json(tmp_path / "sizes.json", {"train-000.tar": 3, "train-001.tar": 4})
    assert index(pattern, "--check") == 1
    out = capsys.readouterr().out
    assert "train-001.tar: 5 samples, recorded 4" in out
    assert "train-002.tar: 2 samples, recorded nowhere" in out
    assert "1 of 3 shards" in out


def test_empty_shards_are_recorded_and_named(tmp_path, index, capsys):
    make_shards(tmp_path, [3])
    write_tar(tmp_path / "train-001.tar", [])
    assert index(f"{tmp_path}/train-*.tar") == 0
    assert "1 shards are empty" in capsys.readouterr().err
    assert json.loads((tmp_path / "sizes.json").read_text())["train-001.tar"] == 0


def test_missing_shards_fail(tmp_path, index, capsys):
    assert index(f"{tmp_path}/{{0..3}}.tar") == 2
    assert "4 of 4 shards are missing" in capsys.readouterr().err


def test_a_shard_that_cannot_be_read_loses_no_counts(tmp_path, index, capsys):
    make_shards(tmp_path, [3, 5])
    bad = f"pipe:cat {tmp_path}/train-{{000..002}}.tar"
    write_json(tmp_path / "out.json", {"train-009.tar": 4})
    assert index(bad, "--output", tmp_path / "out.json", "--workers", 1) == 2
    assert json.loads((tmp_path / "out.json").read_text()) == {
        "train-000.tar": 3, "train-001.tar": 5, "train-009.tar": 4,
    }  # fmt: skip
    assert "the counts of 2 shards are kept" in (told := capsys.readouterr().err)
    assert "cannot read the shard pipe:cat" in told
    assert index(bad, "--check", "--workers", 1) == 2
    assert "kept" not in capsys.readouterr().err
    assert not (tmp_path / "sizes.json").exists()


def test_help_shows_examples(index, capsys):
    with pytest.raises(SystemExit):
        index("--help")
    assert "--output sizes.json" in capsys.readouterr().out


def test_gives_up_a_remote_shard_that_sends_nothing(tmp_path, index, capsys):
    assert index("pipe:sleep 60", "--output", tmp_path / "out.json", "--data-timeout", 0.2) == 2
    assert "nothing came for 0.2 seconds" in capsys.readouterr().err
    assert not (tmp_path / "out.json").exists()


@pytest.mark.parametrize("value", ["0", "-1", "nan", "inf"])
def test_a_timeout_is_a_positive_number(value, index, capsys):
    with pytest.raises(SystemExit):
        index("a.tar", "--data-timeout", value)
    assert "--data-timeout" in capsys.readouterr().err
