"""What is wrong is said before training, with a way out and a status that is not 0."""

from pathlib import Path

import pytest
from runs import arguments, selection, train
from shards_util import make_shards

from dissect_clip.cli import main
from dissect_clip.cli.exit_status import EXIT_SETUP


@pytest.fixture
def data(tmp_path: Path) -> str:
    """Two shards of 100 pairs."""
    folder = tmp_path / "data"
    folder.mkdir()
    return make_shards(folder, [100, 100])


def complaint(words: list[str], capsys: pytest.CaptureFixture[str]) -> str:
    """What is said on stderr by a command that fails before training."""
    capsys.readouterr()  # what runs before this one said
    try:
        status = main(words)
    except SystemExit as error:  # of the parser
        status = int(str(error.code))
    assert status == EXIT_SETUP
    said = capsys.readouterr().err
    assert "Train Epoch" not in said
    assert "Traceback" not in said
    return said


@pytest.mark.parametrize(
    ("changes", "parts"),
    [
        ({"select": True, "select_strategy": "smal_loss"}, ["smal_loss", "small_loss"]),
        ({"select": True, "select_rate": 0}, ["--select-rate", "above 0 and at most 1"]),
        ({"select": True, "select_rate": 1.5}, ["--select-rate", "1.5", "above 0 and at most 1"]),
        ({"device": "gpu"}, ["--device gpu", "cuda or cpu"]),
        ({"selekt": True}, ["--selekt", "--select"]),
        ({"model": "ViT-B-23"}, ["ViT-B-23", "ViT-B-32"]),
        ({"train_num_samples": 900}, ["900", "200", "--train-num-samples"]),
        ({"resume": "/nowhere/epoch_1.pt"}, ["/nowhere/epoch_1.pt"]),
        ({"output_dir": "/proc/nowhere"}, ["/proc/nowhere", "--output-dir"]),
        ({"val_data": "/nowhere/val.tar"}, ["/nowhere/val.tar"]),
        ({"val_data": "/nowhere/val"}, ["--val-data /nowhere/val: there is no such file or folder"]),
    ],
    ids=str,
)
def test_flags(tmp_path: Path, data: str, capsys: pytest.CaptureFixture[str], changes: dict, parts: list[str]):
    said = complaint(arguments(tmp_path, data, **changes), capsys)
    for part in parts:
        assert part in said


def test_missing_shard(tmp_path: Path, data: str, capsys: pytest.CaptureFixture[str]):
    said = complaint(arguments(tmp_path, data.replace("{000..001}", "{000..004}")), capsys)
    assert "3 of 5 shards are missing" in said
    assert "train-002.tar" in said


def test_pattern_that_matches_nothing(tmp_path: Path, data: str, capsys: pytest.CaptureFixture[str]):
    pattern = data.replace("train-{000..001}", "tarin-*")
    assert pattern in complaint(arguments(tmp_path, pattern), capsys)


def test_empty_tar(tmp_path: Path, data: str, capsys: pytest.CaptureFixture[str]):
    Path(data.replace("{000..001}", "001")).write_bytes(bytes(10240))
    assert "train-001.tar" in complaint(arguments(tmp_path, data), capsys)


def test_resume_from_another_model(tmp_path: Path, data: str, capsys: pytest.CaptureFixture[str]):
    run = train(tmp_path, data, epochs=1)
    words = arguments(tmp_path, data, "other", model="toy-rn", resume=run / "checkpoints" / "epoch_1.pt")
    said = complaint(words, capsys)
    assert "--model toy-rn" in said
    assert "--model toy-vit" in said


def test_resume_on_another_data_set(tmp_path: Path, data: str, capsys: pytest.CaptureFixture[str]):
    run = train(tmp_path, data, epochs=1)
    words = arguments(tmp_path, data.replace("{000..001}", "000"), "other", resume=run / "checkpoints" / "epoch_1.pt")
    assert "200 samples, --train-data has 100" in complaint(words, capsys)


def test_resume_with_another_strategy(tmp_path: Path, data: str, capsys: pytest.CaptureFixture[str]):
    run = train(tmp_path, data, epochs=1, **selection("historical_base_sampling"))
    words = arguments(
        tmp_path, data, "other", resume=run / "checkpoints" / "epoch_1.pt", **selection("warmup_base_sampling")
    )
    assert "historical_base_sampling" in complaint(words, capsys)


def test_a_run_folder_that_is_taken(tmp_path: Path, data: str, capsys: pytest.CaptureFixture[str]):
    train(tmp_path, data, epochs=1)
    assert "--resume latest" in complaint(arguments(tmp_path, data), capsys)


def test_a_start_that_was_refused_leaves_its_name(tmp_path: Path, data: str, capsys: pytest.CaptureFixture[str]):
    refused = arguments(tmp_path, data, epochs=1, val_data="/nowhere/val.tar")
    run = tmp_path / "logs" / "run"
    for _ in range(2):
        assert "exists already" not in complaint(refused, capsys)
        assert "error" in (run / "failed_start.log").read_text().lower()
        assert not (run / "out.log").exists()
    train(tmp_path, data, epochs=1)
    assert "exists already" in complaint(refused, capsys)
    complaint([*refused, "--resume", "latest"], capsys)
    assert (run / "out.log").exists()
