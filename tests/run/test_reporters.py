"""Reporters: complete files, and nothing where nothing is asked for."""

from __future__ import annotations

import dataclasses
import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from dissect_clip.config.settings import Config
from dissect_clip.distributed.world import World
from dissect_clip.errors import SetupError, TrainingError
from dissect_clip.run.folder import RunFolder
from dissect_clip.run.reporters import JsonLines, earlier_evaluations, make_reporter


@pytest.fixture
def run(tmp_path: Path) -> RunFolder:
    folder = RunFolder(tmp_path / "run", "run", tmp_path / "run" / "out.log")
    folder.checkpoints.mkdir(parents=True)
    return folder


def lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_json_lines_hold_steps_and_epochs(run: RunFolder) -> None:
    reporter = make_reporter(Config.of(), run, World())
    reporter.train(100, {"loss": 2.5, "lr": 1e-4})
    reporter.train(200, {"loss": 2.0})
    reporter.evaluation(1, 250, {"image_to_text_R@1": 0.5, "num_samples": 7})
    reporter.close()
    assert lines(run.train_log) == [{"step": 100, "loss": 2.5, "lr": 1e-4}, {"step": 200, "loss": 2.0}]
    assert lines(run.results) == [{"image_to_text_R@1": 0.5, "num_samples": 7, "epoch": 1}]


def test_lines_are_on_the_disk_at_once_and_appended(run: RunFolder) -> None:
    run.train_log.write_text('{"step": 1}\n')
    reporter = JsonLines(run.train_log, run.results)
    reporter.train(2, {})
    assert lines(run.train_log) == [{"step": 1}, {"step": 2}]
    reporter.close()


@pytest.mark.parametrize("choice", ["continue", "stop"])
def test_lines_that_cannot_be_written(run: RunFolder, caplog: pytest.LogCaptureFixture, choice: str) -> None:
    reporter = make_reporter(Config.of(on_save_error=choice), run, World())
    run.train_log.mkdir()
    if choice == "stop":
        with pytest.raises(TrainingError, match=r"cannot write .*train\.jsonl: .*Make room"):
            reporter.train(1, {})
        return
    for step in (1, 2):
        reporter.train(step, {})
    run.train_log.rmdir()
    reporter.train(3, {})
    assert lines(run.train_log) == [{"step": 3}]
    messages = [record.getMessage() for record in caplog.records]
    assert len(messages) == 2
    assert "lines are lost until it can be written" in messages[0]
    assert messages[1].endswith("can be written again; 2 lines are lost")


@pytest.mark.parametrize("torn", [b'{"step": 2, "lo', b"\0\0\0\0"])
def test_a_torn_line_does_not_spoil_the_next(run: RunFolder, torn: bytes) -> None:
    for path in (run.train_log, run.results):
        path.write_bytes(b'{"step": 1, "epoch": 1}\n' + torn)
    reporter = make_reporter(Config.of(), run, World())
    reporter.train(2, {})
    reporter.evaluation(2, 2, {})
    assert lines(run.train_log) == [{"step": 1, "epoch": 1}, {"step": 2}]
    assert lines(run.results) == [{"step": 1, "epoch": 1}, {"epoch": 2}]


def test_earlier_evaluations_are_read_by_epoch(tmp_path: Path) -> None:
    results = tmp_path / "results.jsonl"
    assert earlier_evaluations(results) == {}
    results.write_bytes(b'{"R": 1, "epoch": 1}\n{"epoch": 3}\n[]\n{"R": 2}\n\xff\n{"R": 4, "epoch": 1}\n{"epoch": 4')
    assert earlier_evaluations(results) == {1: {"R": 4, "epoch": 1}, 3: {"epoch": 3}}


def test_what_is_not_finite_is_null(run: RunFolder) -> None:
    reporter = make_reporter(Config.of(), run, World())
    reporter.train(1, {"loss": float("nan"), "norm": float("inf"), "scale": float(np.float32(2))})
    reporter.evaluation(1, 1, {"loss": float("-inf")})
    reporter.close()
    assert lines(run.train_log) == [{"step": 1, "loss": None, "norm": None, "scale": 2.0}]
    assert lines(run.results) == [{"loss": None, "epoch": 1}]


def test_only_rank_0_reports(run: RunFolder) -> None:
    class Second(World):
        """The second rank, whose partner found nothing to complain about."""

        def on_main(self, work: Any) -> Any:
            return None

    reporter = make_reporter(Config.of(report_to="wandb,tensorboard"), run, Second(rank=1, size=2))
    reporter.train(1, {"loss": 1.0})
    reporter.evaluation(1, 1, {})
    reporter.close()
    assert not run.train_log.exists()


def test_without_a_folder_nothing_is_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    reporter = make_reporter(Config.of(logs="none"), None, World())
    reporter.train(1, {"loss": 1.0})
    reporter.evaluation(1, 1, {"loss": 1.0})
    reporter.close()
    assert list(tmp_path.iterdir()) == []


def test_tensorboard_needs_a_folder() -> None:
    pytest.importorskip("tensorboard")
    with pytest.raises(SetupError, match="--logs none"):
        make_reporter(Config.of(logs="none", report_to="tensorboard"), None, World())


@pytest.mark.parametrize(("package", "module"), [("wandb", "wandb"), ("tensorboard", "torch.utils.tensorboard")])
def test_a_missing_package_is_named(run: RunFolder, package: str, module: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(SetupError, match=f"pip install {package}"):
        make_reporter(Config.of(report_to=package), run, World())


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_tensorboard_holds_train_by_step_and_val_by_epoch(run: RunFolder) -> None:
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    reporter = make_reporter(Config.of(report_to="tensorboard"), run, World())
    reporter.train(100, {"loss": 2.5})
    reporter.evaluation(3, 300, {"clip_val_loss": 1.25})
    reporter.close()
    events = EventAccumulator(str(run.tensorboard))
    events.Reload()
    (train,) = events.Scalars("train/loss")
    (val,) = events.Scalars("val/clip_val_loss")
    assert (train.step, train.value) == (100, 2.5)
    assert (val.step, val.value) == (3, 1.25)


@pytest.mark.parametrize("choice", ["continue", "stop"])
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_tensorboard_that_cannot_be_written(
    run: RunFolder, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, choice: str
) -> None:
    pytest.importorskip("tensorboard")
    from torch.utils.tensorboard import SummaryWriter

    def full(*_: object) -> None:
        raise OSError("the disk is full")

    reporter = make_reporter(Config.of(report_to="tensorboard", on_save_error=choice), run, World())
    monkeypatch.setattr(SummaryWriter, "add_scalar", full)
    if choice == "stop":
        with pytest.raises(TrainingError, match=r"cannot write to .*tensorboard: the disk is full"):
            reporter.train(1, {"loss": 2.5})
        return
    reporter.train(1, {"loss": 2.5})
    reporter.evaluation(1, 10, {"clip_val_loss": 1.25})
    reporter.close()
    (told,) = (record.getMessage() for record in caplog.records)
    assert "the disk is full. Training goes on" in told
    assert [line["step"] for line in lines(run.train_log)] == [1]


class FakeWandb:
    """Stands for the package and for a run of it."""

    def __init__(self) -> None:
        self.asked: dict[str, Any] = {}
        self.logged: list[tuple[int, dict[str, Any]]] = []
        self.finished = False

    def init(self, **asked: Any) -> FakeWandb:
        self.asked = asked
        return self

    def log(self, values: dict[str, Any], step: int) -> None:
        self.logged.append((step, values))

    def finish(self) -> None:
        self.finished = True


@pytest.mark.parametrize(("resume", "expected"), [("latest", "auto"), ("some.pt", None), (None, None)])
def test_wandb_is_used_as_openclip_does(
    run: RunFolder, resume: str | None, expected: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    fake = FakeWandb()
    monkeypatch.setitem(sys.modules, "wandb", fake)  # type: ignore[arg-type]
    config = Config.of(report_to="all", wandb_notes="why", resume=resume)
    monkeypatch.setattr("dissect_clip.run.reporters.TensorBoard", lambda folder, _: JsonLines(folder, folder))
    reporter = make_reporter(config, run, World())
    reporter.train(5, {"loss": 2.0})
    reporter.evaluation(1, 10, {"R": 0.5})
    reporter.close()
    assert fake.asked["config"]["wandb_notes"] == "why"
    del fake.asked["config"]
    assert fake.asked == {
        "project": "open-clip", "name": "run", "id": "run", "notes": "why", "resume": expected,
    }  # fmt: skip
    assert fake.logged == [(5, {"train/loss": 2.0, "step": 5}), (10, {"val/R": 0.5, "epoch": 1})]
    assert fake.finished


def test_wandb_takes_any_name_of_a_run(monkeypatch: pytest.MonkeyPatch, run: RunFolder) -> None:
    fake = FakeWandb()
    monkeypatch.setitem(sys.modules, "wandb", fake)  # type: ignore[arg-type]
    make_reporter(Config.of(report_to="wandb"), dataclasses.replace(run, name="a/model_hf-hub:x"), World())
    assert (fake.asked["name"], fake.asked["id"]) == ("a/model_hf-hub:x", "a-model_hf-hub-x")


@pytest.mark.filterwarnings("ignore")
def test_wandb_works_offline(tmp_path: Path, run: RunFolder, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("wandb")
    for name, value in {"MODE": "offline", "SILENT": "true", "CONSOLE": "off", "DIR": str(tmp_path)}.items():
        monkeypatch.setenv(f"WANDB_{name}", value)
    reporter = make_reporter(Config.of(report_to="wandb"), run, World())
    reporter.train(1, {"loss": 2.0, "norm": float("nan")})
    reporter.evaluation(1, 1, {"R": 0.5})
    reporter.close()
    (folder,) = (tmp_path / "wandb").glob("offline-run-*-run")
    assert (folder / "run-run.wandb").stat().st_size > 0
