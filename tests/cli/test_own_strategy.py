"""A strategy that someone else wrote, in a package of its own: its flags, a run, a resume and the record."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
import torch
from runs import arguments
from safetensors.torch import load_file

from dissect_clip.config.parser import parse_args
from dissect_clip.selection import STRATEGIES

MAIN = Path(__file__).resolve().parents[2] / "src" / "main.py"
MODULE = '''
"""Smallest loss plus a bonus for pairs that were rarely selected."""

from dataclasses import dataclass

import torch

from dissect_clip.config.fields import Range, setting
from dissect_clip.selection import Needs, Strategy, StrategyOptions


@dataclass(frozen=True, kw_only=True)
class CuriousOptions(StrategyOptions):
    curious_bonus: float = setting(0.5, "bonus for a pair that was never scored", within=Range(at_least=0))
    curious_sign: str = setting("small", "which losses are preferred", choices=("small", "large"))


class Curious(Strategy):
    """smallest loss plus a bonus for new pairs"""

    Options = CuriousOptions
    needs = Needs.LOSS
    remembers = ("last_loss_seen",)

    def rank(self, candidates):
        sign = -1 if self.options.curious_sign == "small" else 1
        return sign * candidates.loss + self.options.curious_bonus * candidates.memory[:, 0].isnan()

    def remember(self, candidates):
        return candidates.loss[:, None]
'''
TARGET = "curious_package.strategies:Curious"


@pytest.fixture
def package(tmp_path: Path) -> Path:
    """A folder for PYTHONPATH with the package; it is not announced as an entry point."""
    folder = tmp_path / "packages"
    (folder / "curious_package").mkdir(parents=True)
    (folder / "curious_package" / "__init__.py").touch()
    (folder / "curious_package" / "strategies.py").write_text(MODULE)
    return folder


@pytest.fixture
def installed(package: Path) -> Path:
    """The same, with the metadata of an installed package."""
    info = package / "curious_package-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: curious-package\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text(f"[dissect_clip.strategies]\ncurious = {TARGET}\n")
    return package


def run(packages: Path, *words: str) -> subprocess.CompletedProcess[str]:
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(MAIN.parent), str(packages)])}
    return subprocess.run(
        [sys.executable, str(MAIN), *words], env=environment, capture_output=True, text=True, timeout=300, check=False
    )


def help_of(packages: Path, *words: str) -> str:
    result = run(packages, *words, "--help-all")
    assert result.returncode == 0, result.stderr
    return " ".join(result.stdout.split())


def command(folder: Path, name: str, strategy: str, **changes: Any) -> list[str]:
    flags: dict[str, Any] = {
        "train_data": None, "dataset_type": "synthetic", "train_num_samples": 80, "batch_size": 20, "epochs": 2,
        "select": True, "select_strategy": strategy, "select_rate": 0.5, "record": True, "curious_bonus": 2.0,
    }  # fmt: skip
    return arguments(folder, "", name, **(flags | changes))


def check_run(folder: Path, packages: Path, strategy: str) -> None:
    """Two epochs at once and one after the other give the same; the record and the checkpoint hold its scores."""
    for words in (
        command(folder, "whole", strategy),
        command(folder, "parts", strategy, epochs=1),
        command(folder, "parts", strategy, resume="latest"),
    ):
        result = run(packages, *words)
        assert result.returncode == 0, result.stderr
    whole, parts = (folder / "logs" / name for name in ("whole", "parts"))
    scores = [load_file(path / "checkpoints" / "epoch_2.scores.safetensors")["scores"] for path in (whole, parts)]
    assert torch.equal(*scores)
    assert scores[0].isfinite().all()
    table = pq.read_table(whole / "record" / "epoch_00001.parquet")
    assert table.equals(pq.read_table(parts / "record" / "epoch_00001.parquet"))
    assert "remembered_last_loss_seen" in table.column_names
    assert sum(table["selected"].to_pylist()) == 40
    settings = json.loads((whole / "config.json").read_text())
    assert (settings["select_strategy"], settings["curious_bonus"], settings["curious_sign"]) == (
        strategy, 2.0, "small",
    )  # fmt: skip


@pytest.mark.slow
def test_an_installed_strategy_trains_resumes_and_is_recorded(tmp_path: Path, installed: Path):
    shown = help_of(installed)
    assert "curious smallest loss plus a bonus for new pairs" in shown
    assert "curious: bonus for a pair that was never scored [at least 0] (default: 0.5)" in shown
    assert "--curious-sign {small,large}" in shown
    check_run(tmp_path, installed, "curious")


@pytest.mark.slow
def test_a_class_is_named_by_its_module(tmp_path: Path, package: Path):
    assert "curious" not in help_of(package)
    assert f"{TARGET}: bonus for a pair" in help_of(package, "--select-strategy", TARGET)
    check_run(tmp_path, package, TARGET)


@pytest.fixture
def importable(package: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.syspath_prepend(package)
    yield package
    for name in [name for name in sys.modules if name.partition(".")[0] == "curious_package"]:
        del sys.modules[name]


SYNTHETIC = ("--dataset-type", "synthetic", "--train-num-samples", "16", "--select", "--select-strategy")


def refusal(capsys: pytest.CaptureFixture[str], *words: str) -> str:
    with pytest.raises(SystemExit) as stop:
        parse_args([*SYNTHETIC, *words], STRATEGIES)
    assert stop.value.code == 2
    return capsys.readouterr().err


def test_its_options_have_ranges_and_are_refused_with_other_strategies(
    installed: Path, importable: Path, capsys: pytest.CaptureFixture[str]
):
    assert "-1 is out of range: it must be at least 0" in refusal(capsys, "curious", "--curious-bonus", "-1")
    message = refusal(capsys, "small_loss", "--curious-bonus", "1")
    assert "--curious-bonus has no meaning with --select-strategy small_loss: it is for curious" in message
    assert "did you mean curious?" in refusal(capsys, "curius")


def test_it_may_be_one_of_a_combination(importable: Path):
    text = f"small_loss:0.5+{TARGET}:0.5"
    config = parse_args([*SYNTHETIC, text, "--curious-sign", "large"], STRATEGIES)
    assert config.selection.select_strategy == text
    assert config.get("curious_sign") == "large"


@pytest.mark.parametrize(
    ("target", "message"),
    [
        ("nowhere.module:Curious", "nowhere.module cannot be imported: ModuleNotFoundError"),
        ("curious_package.strategies:Other", "curious_package.strategies has no Other"),
        ("curious_package.strategies:CuriousOptions", "is no subclass of dissect_clip.selection.Strategy"),
    ],
)
def test_what_cannot_be_plugged_in_is_refused(
    importable: Path, capsys: pytest.CaptureFixture[str], target: str, message: str
):
    assert message in refusal(capsys, target)


def test_an_entry_point_with_the_name_of_a_built_in_strategy_is_refused(
    installed: Path, importable: Path, capsys: pytest.CaptureFixture[str]
):
    points = installed / "curious_package-1.0.dist-info" / "entry_points.txt"
    points.write_text(f"[dissect_clip.strategies]\njest = {TARGET}\n")
    assert "'jest'" in refusal(capsys, "small_loss")
