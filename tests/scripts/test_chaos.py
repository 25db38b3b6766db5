"""The script that kills runs: it finds what differs, and a short one comes to its end without differences."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from safetensors.torch import save_file

from dissect_clip.config.parser import parse_args
from dissect_clip.selection import STRATEGIES

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "scripts"))

import chaos  # noqa: E402


def make_run(folder: Path) -> Path:
    """What the comparison reads of a run of one epoch."""
    for name in ("checkpoints", "record", "skipped.parquet"):
        (folder / name).mkdir(parents=True)
    content = {
        "name": folder.name,
        "state_dict": {"weight": torch.arange(3.0)},
        "dissect": {"token": folder.name, "parts": {"progress": {"step": 2, "seconds": {"load": 1.0}}}},
    }
    torch.save(content, folder / "checkpoints" / "epoch_1.pt")
    scores = torch.tensor([[1.0], [torch.nan]])
    save_file({"scores": scores}, folder / "checkpoints" / "epoch_1.scores.safetensors")
    lines = [{"step": 1, "loss": 2.0, "batch_time": 0.1}, {"step": 2, "loss": 1.0, "batch_time": 0.1}]
    (folder / "train.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    (folder / "checkpoints" / "results.jsonl").write_text('{"epoch": 1, "rsum": 5.0}\n')
    pq.write_table(
        pa.table({"sample_id": [1, 2], "selected": [True, False]}), folder / "record" / "epoch_00000.parquet"
    )
    pq.write_table(pa.table({"key": ["a"], "samples": [1]}), folder / "skipped.parquet" / "epoch_00000.parquet")
    pq.write_table(pa.table({"sample_id": [1, 2], "p_clean": [0.5, None]}), folder / "clean.parquet")
    return folder


def change_weight(run: Path) -> None:
    path = run / "checkpoints" / "epoch_1.pt"
    content = torch.load(path, weights_only=True)
    content["state_dict"]["weight"][1] += 1e-6
    torch.save(content, path)


def change_score(run: Path) -> None:
    save_file({"scores": torch.tensor([[1.0], [2.0]])}, run / "checkpoints" / "epoch_1.scores.safetensors")


def change_loss(run: Path) -> None:
    log = run / "train.jsonl"
    log.write_text(log.read_text() + '{"step": 2, "loss": 1.5, "batch_time": 0.1}\n')


def change_result(run: Path) -> None:
    (run / "checkpoints" / "results.jsonl").write_text('{"epoch": 1, "rsum": 5.5}\n')


def change_record(run: Path) -> None:
    table = pa.table({"sample_id": [1, 2], "selected": [False, True]})
    pq.write_table(table, run / "record" / "epoch_00000.parquet")


def change_verdict(run: Path) -> None:
    pq.write_table(pa.table({"sample_id": [1, 2], "p_clean": [0.5, 0.25]}), run / "clean.parquet")


def lose_skipped(run: Path) -> None:
    shutil.rmtree(run / "skipped.parquet")


def nothing(run: Path) -> None:
    log = run / "train.jsonl"
    log.write_text('{"step": 2, "loss": 9.0, "batch_time": 7.0}\n' + log.read_text())  # repeated: the last line counts


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        (nothing, []),
        (change_weight, ["epoch_1.pt .state_dict.weight"]),
        (change_score, ["epoch_1.pt scores"]),
        (change_loss, ["train.jsonl 2"]),
        (change_result, ["checkpoints/results.jsonl 1"]),
        (change_record, ["record holds other rows"]),
        (change_verdict, ["clean.parquet holds other rows"]),
        (lose_skipped, ["skipped.parquet is in one run only"]),
    ],
)
def test_every_kind_of_difference_is_found(tmp_path: Path, change, expected):
    first, second = (make_run(tmp_path / name) for name in ("first", "second"))
    change(second)
    assert chaos.compare(first, second, epochs=1) == expected


@pytest.mark.parametrize("strategy", ["none", *STRATEGIES])
def test_every_strategy_can_be_run(tmp_path: Path, strategy: str):
    plan = chaos.Plan(tmp_path, "train.tar", "val.tar", 1, 1, 3, 64, 1, 0, (strategy,), ())
    config = parse_args(plan.command(strategy, "run")[2:], STRATEGIES)
    assert config.selection.select == (strategy != "none")


@pytest.mark.slow
def test_a_short_one_finds_no_difference(tmp_path: Path):
    words = [sys.executable, str(ROOT / "scripts" / "chaos.py"), "--out", str(tmp_path), "--kills", "1"]
    words += ["--processes", "1", "--strategies", "historical_base_sampling", "--epochs", "1", "--batch-size", "64"]
    done = subprocess.run(
        words, capture_output=True, text=True, check=False, timeout=600, env=os.environ | {"OMP_NUM_THREADS": "1"}
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.splitlines()[-1] == "1 kills, 1 resumes, 0 differences"
