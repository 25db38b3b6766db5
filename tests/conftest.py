"""Fixtures for all tests."""

import os
from pathlib import Path

import pytest
import torch
from shards_util import make_shard, read_shard

ROOT = Path(__file__).resolve().parent.parent

os.environ.setdefault("WANDB_MODE", "offline")
os.environ.setdefault("CUDA_VISIBLE_DEVICES", "")  # the tests are written for the CPU; `-m gpu` sets it


torch.set_num_threads(1)  # toy models gain nothing from more, and the tests run side by side
os.environ["OMP_NUM_THREADS"] = "1"  # for the processes that the tests start


@pytest.fixture(scope="session")
def emoji() -> Path:
    """The folder of the real image-caption set, where it is present."""
    folder = Path(os.environ.get("DISSECT_EMOJI", ROOT.parent / "shared" / "data" / "emoji"))
    if not (folder / "train-000000.tar").exists():
        pytest.skip(f"the emoji set is not at {folder}; DISSECT_EMOJI names its folder")
    return folder


@pytest.fixture(scope="session")
def pairs(emoji: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the first pairs of the real set: ``train-{0,1}.tar`` with 200 each, and ``val.tar`` with 100."""
    folder = tmp_path_factory.mktemp("pairs")
    parts = {"train-0": ("train-000000", 200), "train-1": ("train-000001", 200), "val": ("val-000000", 100)}
    for name, (source, count) in parts.items():
        make_shard(folder / f"{name}.tar", dict(read_shard(emoji / f"{source}.tar")[:count]))
    return folder
