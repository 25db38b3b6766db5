"""A small grid for the tests of experiments, and the command that runs it."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import yaml

import experiments.__main__ as reproduce
from experiments.grid import Grid
from experiments.grid_file import read_grid

FAKE = (sys.executable, str(Path(__file__).parent / "fake_trainer.py"))

CONTENT: dict[str, Any] = {
    "title": "A grid",
    "flags": "--epochs 4 --batch-size 8",
    "select_flags": "--record",
    "data_sets": {"set": {"train": "${FOLDER}/train.tar", "val": {"one": "v1.tar", "two": "${FOLDER}/v2.tar"}}},
    "methods": {
        "All data": {"published": ["CLIP"]},
        "Random": {"strategy": "random", "published": ["Random"]},
        "Small loss": {"strategy": "small_loss"},
        "DISSect": {"strategy": "warmup_base_sampling", "flags": "--warmup-point 2", "published": ["Ours"]},
    },
    "rates": [0.3],
    "seeds": [0, 1, 2],
    "tables": [{"title": "Quality", "metrics": ["rsum4", "seconds_to_end"]}],
}
"""Twelve cells."""


def write_grid(folder: Path, name: str = "grid", **changes: Any) -> Path:
    """The grid with other values for some of its keys; None leaves one out."""
    content = {key: value for key, value in (CONTENT | changes).items() if value is not None}
    file = folder / f"{name}.yaml"
    file.write_text(yaml.safe_dump(content, sort_keys=False))
    return file


def make_grid(folder: Path, **changes: Any) -> Grid:
    """The grid as it is read."""
    return read_grid(write_grid(folder, **changes), {"FOLDER": str(folder)})


def command(folder: Path, *more: str, file: Path | None = None) -> list[str]:
    """Words after the script's name."""
    grid = write_grid(folder) if file is None else file
    return [str(grid), "--data", f"FOLDER={folder}", "--runs", str(folder / "runs"), *more]


def run(folder: Path, *more: str, file: Path | None = None) -> int:
    """Run the script on the grid with the stand-in for the trainer; its exit status."""
    return reproduce.main(command(folder, *more, file=file), program=FAKE)
