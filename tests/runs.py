"""Whole runs through the command line, for the end-to-end tests."""

import json
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
from toy import write_configs

from dissect_clip.cli import main


def arguments(folder: Path, data: str, name: str = "run", **changes: Any) -> list[str]:
    """A command line that trains a toy model on ``data`` for three epochs, as ``folder/logs/name``.

    ``changes`` are flags without their dashes; True adds a switch, None leaves a default out.
    """
    configs = folder / "configs"
    configs.mkdir(exist_ok=True)
    flags: dict[str, Any] = {
        "train_data": data, "model": "toy-vit", "model_config": write_configs(configs), "device": "cpu",
        "precision": "fp32", "batch_size": 40, "epochs": 3, "warmup": 5, "lr": 1e-3, "workers": 0,
        "output_dir": folder / "logs", "name": name, "log_every_n_steps": 1,
    }  # fmt: skip
    words: list[str] = []
    for flag, value in (flags | changes).items():
        option = "--" + flag.replace("_", "-")
        if value is True:
            words.append(option)
        elif value is not None:
            words += [option, str(value)]
    return words


def selection(strategy: str | None, **changes: Any) -> dict[str, Any]:
    """Flags that select with a strategy; none for None."""
    if strategy is None:
        return {}
    flags: dict[str, Any] = {"select": True, "select_strategy": strategy, "select_rate": 0.3}
    if strategy in ("warmup_base_sampling", "learnability", "jest", "clean_posterior"):
        flags["warmup_point"] = 1
    if strategy == "scan":
        flags["scan_warmup"] = 0
    return flags | changes


def train(folder: Path, data: str, name: str = "run", **changes: Any) -> Path:
    """Run to the end; returns the run folder."""
    assert main(arguments(folder, data, name, **changes)) == 0
    return folder / "logs" / name


def lines(path: Path) -> list[dict[str, Any]]:
    """The objects of a file of JSON lines."""
    return [json.loads(line) for line in path.read_text().splitlines()]


def results(run: Path) -> list[dict[str, Any]]:
    """The evaluations of a run, without what depends on the clock."""
    return [
        {name: value for name, value in line.items() if not name.endswith("_seconds")}
        for line in lines(run / "checkpoints" / "results.jsonl")
    ]


def losses(run: Path) -> list[float]:
    """The loss of every step."""
    return [line["loss"] for line in lines(run / "train.jsonl")]


def record(run: Path, epoch: int) -> list[dict[str, Any]]:
    """The record of an epoch, a dict a row."""
    return pq.read_table(run / "record" / f"epoch_{epoch:05d}.parquet").to_pylist()
