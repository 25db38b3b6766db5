"""The training data as a part of a checkpoint."""

import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from dissect_clip.data.state import DataState


class Data(SimpleNamespace):
    """Stands for TrainData."""

    epoch = 2
    num_samples = 5
    fingerprint = "abc"
    shard_names: tuple[str, ...] = ("a.tar", "b.tar")
    shard_sizes: Any = np.array([2, 3])
    inside_epoch = True
    resumed: Any = None

    def state_dict(self) -> dict[str, Any]:
        return {"layout": {"world size": 1}, "workers": torch.arange(3), "visited": None}

    def resume(self, state: dict[str, Any], epoch: int) -> str | None:
        self.resumed = (state, epoch)
        return "epoch 2 goes on otherwise"


def make(**changes: Any) -> Any:
    return Data(**changes)


def saved(path: Path, **changes: Any) -> dict[str, Any]:
    torch.save(DataState(make(**changes)).state_dict(), path / "state.pt")
    state: dict[str, Any] = torch.load(path / "state.pt", weights_only=True)
    return state


def test_the_position_inside_an_epoch_comes_back_from_a_file(tmp_path: Path, caplog: pytest.LogCaptureFixture):
    data, state = make(), saved(tmp_path)
    part = DataState(data)
    assert part.misfits(state) == []
    part.load_state_dict(state)
    position, epoch = data.resumed
    assert (epoch, position["workers"].tolist()) == (2, [0, 1, 2])
    assert "goes on otherwise" in caplog.text


def test_between_epochs_there_is_no_position(tmp_path: Path):
    data, state = make(), saved(tmp_path, inside_epoch=False)
    part = DataState(data)
    assert part.misfits(state) == []
    part.load_state_dict(state)
    assert data.resumed is None


def test_weights_alone_fit():
    assert DataState(make()).misfits(None) == []


MISFITS: list[tuple[dict[str, Any], str]] = [
    ({"num_samples": 6}, "trained on 5 samples, --train-data has 6"),
    ({"fingerprint": "xyz"}, "other data than --train-data"),
    ({"fingerprint": "abc+list"}, "it was trained on all samples of its data, this run has --train-keep"),
]


@pytest.mark.parametrize(("changes", "said"), MISFITS)
def test_other_data_does_not_fit(tmp_path: Path, changes: dict[str, Any], said: str):
    (misfit,) = DataState(make(**changes)).misfits(saved(tmp_path))
    assert said in misfit


NOW: list[tuple[tuple[str, ...], Any, str]] = [
    (("a.tar",), np.array([2]), "missing: b.tar"),
    (("a.tar", "b.tar", "c.tar"), np.array([2, 3, 1]), "new: c.tar"),
    (("a.tar", "b.tar"), np.array([2, 4]), "of another size: b.tar (4 samples instead of 3)"),
    (("b.tar", "a.tar"), np.array([3, 2]), "another order"),
    (("a.tar", "c.tar"), None, "missing: b.tar; new: c.tar"),
    (tuple(f"{n}.tar" for n in range(9)), np.arange(9), "new: 0.tar, 1.tar, 2.tar and 6 more"),
]


@pytest.mark.parametrize(("names", "sizes", "said"), NOW)
@pytest.mark.parametrize("num_samples", [5, 6])
def test_the_shards_that_differ_are_named(
    tmp_path: Path, names: tuple[str, ...], sizes: Any, said: str, num_samples: int
):
    now = make(shard_names=names, shard_sizes=sizes, num_samples=num_samples, fingerprint="xyz")
    (misfit,) = DataState(now).misfits(saved(tmp_path))
    assert said in misfit


def test_inside_an_epoch_the_position_must_be_there(tmp_path: Path):
    (misfit,) = DataState(make()).misfits({**saved(tmp_path), "position": None})
    assert "inside an epoch" in misfit


def test_what_is_not_of_its_type_is_damaged(tmp_path: Path):
    state = saved(tmp_path)
    assert DataState(make()).misfits({**state, "num_samples": "5"})
    del state["fingerprint"]
    assert DataState(make()).misfits(state)


def test_forty_thousand_shards_take_little_room_and_time(tmp_path: Path):
    names = tuple(f"cc12m-train-{n:05d}.tar" for n in range(40_000))
    began = time.perf_counter()
    state = saved(tmp_path, shard_names=names, shard_sizes=np.full(40_000, 5_000))
    assert (tmp_path / "state.pt").stat().st_size < 2e6
    assert DataState(make(shard_names=names, shard_sizes=None)).misfits(state) == []
    assert time.perf_counter() - began < 1
