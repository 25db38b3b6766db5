"""Optimizer, scaler, progress and settings as parts of a checkpoint."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from dissect_clip.config.settings import Config
from dissect_clip.distributed.world import World
from dissect_clip.training.state import OptimizerState, ProgressState, RunSettings, ScalerState
from dissect_clip.training.step import Counters


def through_a_file(state: dict[str, Any], path: Path) -> dict[str, Any]:
    torch.save(state, path / "state.pt")
    loaded: dict[str, Any] = torch.load(path / "state.pt", weights_only=True)
    return loaded


def make_optimizer(outputs: int = 2, groups: int = 1) -> torch.optim.AdamW:
    parameters = [*torch.nn.Linear(3, outputs).parameters()]
    optimizer = torch.optim.AdamW([{"params": part} for part in (parameters, [])[:groups]], lr=0.5)
    for parameter in parameters:
        parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    return optimizer


def test_an_optimizer_comes_back_from_a_file(tmp_path: Path):
    first, second = make_optimizer(), make_optimizer()
    first.step()
    part, state = OptimizerState(second), through_a_file(OptimizerState(first).state_dict(), tmp_path)
    assert part.misfits(state) == part.misfits(None) == []
    part.load_state_dict(state)
    assert str(second.state_dict()["state"]) == str(first.state_dict()["state"])


@pytest.mark.parametrize("state", [{}, {"param_groups": 3}, {"param_groups": [{}]}, {"param_groups": [{"params": 1}]}])
def test_an_optimizer_without_groups_is_damaged(state: dict[str, Any]):
    assert "damaged" in OptimizerState(make_optimizer()).misfits(state)[0]


def test_an_optimizer_of_other_groups_does_not_fit():
    state = make_optimizer(groups=2).state_dict()
    (misfit,) = OptimizerState(make_optimizer()).misfits(state)
    assert "--opt" in misfit


def test_a_scaler_comes_back_from_a_file(tmp_path: Path):
    scaler = torch.amp.GradScaler("cpu", init_scale=8.0)
    part = ScalerState(torch.amp.GradScaler("cpu"))
    state = through_a_file(ScalerState(scaler).state_dict(), tmp_path)
    assert part.misfits(state) == []
    part.load_state_dict(state)
    assert part.scaler.get_scale() == 8.0


def progress(counters: Counters, left: int = 0, accum_freq: int = 2, steps_per_epoch: int = 10) -> ProgressState:
    data: Any = SimpleNamespace(remaining_batches=left)
    return ProgressState(counters, data, accum_freq, steps_per_epoch)


DONE = Counters(epoch=3, epoch_step=4, step=34, batch=68, seen=700, trained=350, scored=500, seconds={"load": 2.5})


def test_progress_comes_back_from_a_file(tmp_path: Path, caplog: pytest.LogCaptureFixture):
    part = progress(Counters(), left=12)
    state = through_a_file(progress(DONE).state_dict(), tmp_path)
    assert part.misfits(state) == []
    part.load_state_dict(state)
    assert part.counters.seconds["load"] == 2.5
    part.counters.seconds = DONE.seconds
    assert part.counters == DONE
    assert caplog.text == ""


def test_with_other_batches_epochs_end_where_they_would_have(caplog: pytest.LogCaptureFixture):
    part = progress(Counters(), left=9, accum_freq=3, steps_per_epoch=5)
    part.load_state_dict(progress(DONE).state_dict())
    assert (part.counters.step, part.counters.batch) == (17, 51)
    assert "step 17 of the run, which the checkpoint counts as 34" in caplog.text


@pytest.mark.parametrize("wrong", [{"seen": 1.5}, {"seconds": {"load": "long"}}, {"epoch": None}])
def test_progress_of_another_type_is_damaged(wrong: dict[str, Any]):
    assert "damaged" in progress(Counters()).misfits({**progress(DONE).state_dict(), **wrong})[0]
    assert progress(Counters()).misfits(None)


def test_changed_settings_are_named(tmp_path: Path, caplog: pytest.LogCaptureFixture):
    then = RunSettings(Config.of(seed=3, batch_size=4, accum_freq=2, workers=0), World())
    now = RunSettings(Config.of(seed=4, batch_size=8, accum_freq=1, workers=2), World())
    state = through_a_file(then.state_dict(), tmp_path)
    assert now.misfits(state) == now.misfits(None) == []
    now.load_state_dict(state)
    assert "seed is 4, was 3; batch_size is 8, was 4; accum_freq is 1, was 2; workers is 2, was 0" in caplog.text
    assert then.changed(state) == []
    assert now.changed({**state, "workers": None, "seed": None})[0].startswith("batch_size")
    assert "damaged" in now.misfits({**state, "seed": "3"})[0]
