"""What a strategy found out about every sample: the file at the end of a run, and the report of it."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from runs import arguments, selection, train
from selection.test_clean_posterior import make_strategy, rows, two_parts

from dissect_clip.cli import clean_report
from dissect_clip.cli import train as cli
from dissect_clip.data.sampling.subset import SampleNames
from dissect_clip.errors import SetupError, TrainingError
from dissect_clip.training import clean_report as clean_report_module
from dissect_clip.training import sample_report as verdict
from dissect_clip.training.sample_report import METADATA, write_verdict

SHARDS = ("a.tar", "b.tar")
SMALL = "train-00000{0,1}.tar"


def locate(ids: np.ndarray) -> np.ndarray:
    return (ids >= 1000).astype(np.int32)


def write(path: Path, memory: torch.Tensor) -> None:
    write_verdict(path, make_strategy(), memory, 6, SHARDS, locate)


def test_every_sample_has_a_row_in_the_order_of_the_ids(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(verdict, "_PIECE", 700)
    averages, upper = two_parts(2000)
    averages[3] = torch.nan
    write(tmp_path / "clean.parquet", rows(averages))
    table = pq.read_table(tmp_path / "clean.parquet")
    assert table["sample_id"].to_pylist() == list(range(2000))
    assert table["shard"].to_pylist() == ["a.tar"] * 1000 + ["b.tar"] * 1000
    p = table["p_clean"].to_numpy()
    assert p[upper.numpy()].mean() > 0.9 > 0.1 > p[~upper.numpy()].mean()
    assert table["visits"].to_pylist()[3:5] == [0, 1]
    assert table["last_epoch"].to_pylist()[3:5] == [None, 5]
    about = json.loads(table.schema.metadata[METADATA])
    assert (about["strategy"], about["epochs"], about["known"]) == ("clean_posterior", 6, 1999)
    assert about["clean_share"] == pytest.approx(0.6, abs=0.03)
    assert [file.name for file in tmp_path.iterdir()] == ["clean.parquet"]


def test_where_the_parts_cannot_be_told_apart_there_is_no_probability(tmp_path: Path):
    write(tmp_path / "clean.parquet", rows(two_parts(2000, low=2.5)[0]))
    table = pq.read_table(tmp_path / "clean.parquet")
    assert table["p_clean"].null_count == 2000
    assert table["statistic"].null_count == 0


def test_a_file_that_cannot_be_written_says_what_to_do(tmp_path: Path):
    with pytest.raises(TrainingError, match="Training is complete and saved; make room"):
        write(tmp_path / "missing" / "clean.parquet", rows(two_parts(2000)[0]))


def test_a_run_writes_it_at_its_end_and_again_where_it_is_missing(tmp_path: Path, emoji: Path):
    flags = selection("clean_posterior", clean_decoys=0.0) | {"epochs": 2}
    data = str(emoji / SMALL)
    run = train(tmp_path, data, **flags)
    first = (run / "clean.parquet").read_bytes()
    table = pq.read_table(run / "clean.parquet")
    assert table.num_rows == 1000
    assert sum(table["visits"].to_pylist()) == 1300
    words = arguments(tmp_path, data, resume="latest", **flags)
    (run / "clean.parquet").write_text("not touched")
    assert cli.main(words) == 0
    assert (run / "clean.parquet").read_text() == "not touched"
    (run / "clean.parquet").unlink()
    assert cli.main(words) == 0
    assert (run / "clean.parquet").read_bytes() == first


def test_another_strategy_writes_none(tmp_path: Path, emoji: Path):
    run = train(tmp_path, str(emoji / SMALL), **selection("random"), epochs=1)
    assert not (run / "clean.parquet").exists()


# ---- the report


@pytest.fixture
def run_with_truth(tmp_path: Path, emoji: Path) -> tuple[Path, str, Path]:
    """A clean.parquet of two shards, their pattern, and a list of wrong keys that its statistic knows in part."""
    pattern = str(emoji / SMALL)
    averages, upper = two_parts(1000)
    write_verdict(
        tmp_path / "clean.parquet", make_strategy(), rows(averages), 6,
        ("train-000000.tar", "train-000001.tar"), lambda ids: (ids >= 500).astype(np.int32),
    )  # fmt: skip
    assert (
        clean_report.main([str(tmp_path / "clean.parquet"), "--train-data", pattern, "--output", f"{tmp_path}/k"]) == 0
    )
    keys = pq.read_table(tmp_path / "k")["key"].to_pylist()
    wrong = [key for key, clean in zip(keys, upper.tolist(), strict=True) if not clean]
    (tmp_path / "wrong.csv").write_text("key,donor\n" + "".join(f"{key},x\n" for key in wrong))
    return tmp_path / "clean.parquet", pattern, tmp_path / "wrong.csv"


@pytest.mark.parametrize("header", ["key,donor", "name,why", "shard,key"])
def test_the_report_holds_the_probability_against_the_truth(
    run_with_truth: tuple[Path, str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str], header: str
):
    file, pattern, wrong = run_with_truth
    keys = [line.split(",")[0] for line in wrong.read_text().splitlines()[1:]]
    lines = [f"0.tar,{key}" if header == "shard,key" else f"{key},x" for key in keys]
    wrong.write_text("\n".join([header, *lines]) + "\n")
    words = [str(file), "--train-data", pattern, "--wrong", str(wrong), "--json", f"{tmp_path}/r.json"]
    assert clean_report.main(words) == 0
    truth = json.loads((tmp_path / "r.json").read_text())["truth"]
    assert truth["clean"] == pytest.approx(0.6, abs=0.05)
    assert truth["auroc"] > 0.97
    assert truth["ece"] < 0.03
    assert truth["brier"] < truth["brier_of_the_share"] / 3
    assert sum(one["samples"] for one in truth["bins"]) == truth["samples"] == 1000
    for one in truth["bins"]:
        assert one["from"] <= one["p_clean"] <= one["to"]
        assert one["p_clean_low"] <= one["p_clean"] <= one["p_clean_high"]
    assert "against the truth: " in capsys.readouterr().out


def test_keys_are_those_of_the_shards(run_with_truth: tuple[Path, str, Path], emoji: Path, tmp_path: Path):
    from experiments.noise import _members

    keys = pq.read_table(tmp_path / "k")["key"].to_pylist()
    assert keys == list(_members([str(emoji / f"train-00000{number}.tar") for number in (0, 1)], ".txt"))


@pytest.mark.parametrize(
    ("words", "status", "message"),
    [
        (["--train-data", "one"], 2, "the table has 1000 samples"),
        (["--train-data", "both", "--wrong", "other.csv"], 2, "none of its 1 keys, such as 'nobody', is in the shards"),
        (["--train-data", "both", "--wrong", "missing.csv"], 2, "cannot be read"),
        (["--json", "nowhere/report.json"], 1, "nowhere/report.json"),
    ],
)
def test_what_does_not_fit_is_an_error(
    run_with_truth: tuple[Path, str, Path],
    emoji: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    words: list[str],
    status: int,
    message: str,
):
    file, pattern, _ = run_with_truth
    (tmp_path / "other.csv").write_text("key\nnobody\n")
    places = {"one": str(emoji / "train-000000.tar"), "both": pattern}
    words = [places.get(word, f"{tmp_path}/{word}" if word.endswith(".csv") else word) for word in words]
    assert clean_report.main([str(file), *words]) == status
    assert message in capsys.readouterr().err


def test_a_shard_without_samples_has_no_rows():
    table = pa.table({"shard": ["a.tar"] * 2 + ["c.tar"]})
    sizes = np.array([2, 0, 1, 0])
    names = SampleNames(("a.tar", "b.tar", "c.tar", "d.tar"), sizes, lambda place: iter("xy" if place == 0 else "z"))
    assert clean_report_module.read_keys(names, table) == ["x", "y", "z"]
    with pytest.raises(SetupError, match="give the shards that the run had"):
        clean_report_module.read_keys(SampleNames(("a.tar", "b.tar"), np.array([2, 1]), names.keys), table)


def test_without_the_shards_the_report_is_short(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    write(tmp_path / "clean.parquet", rows(two_parts(2000, low=2.5)[0]))
    assert clean_report.main([str(tmp_path / "clean.parquet")]) == 0
    assert "the run could not tell two parts apart" in capsys.readouterr().out
    (tmp_path / "other.parquet").write_bytes(b"nothing")
    assert clean_report.main([str(tmp_path / "other.parquet")]) == 2
    with pytest.raises(SystemExit):
        clean_report.main([str(tmp_path / "clean.parquet"), "--wrong", "x"])
