"""Checkpoints: whole or absent whatever happens, loadable by others, and refused where they do not fit."""

from __future__ import annotations

import contextlib
import errno
import json
import logging
import os
import resource
import shutil
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import open_clip
import pytest
import torch
from processes import context
from safetensors import safe_open
from torch import Tensor

from dissect_clip.checkpoint import (
    Checkpoint,
    CheckpointWriter,
    HostCopies,
    Moment,
    Plan,
    Policy,
    find_latest,
    find_resume,
    load_checkpoint,
    pack,
    restore,
    save_checkpoint,
)
from dissect_clip.checkpoint import read as read_module
from dissect_clip.checkpoint import write as write_module
from dissect_clip.checkpoint import writer as writer_module
from dissect_clip.checkpoint.format import Content
from dissect_clip.config.settings import Config
from dissect_clip.distributed.world import World
from dissect_clip.errors import SetupError, TrainingError
from dissect_clip.run.folder import RunFolder
from dissect_clip.run.stateful import Stateful

CONFIG = Config.of(epochs=10)


class Kept(Stateful):
    """A part that holds whatever state it has got, and takes note of what is loaded into it."""

    def __init__(self, *misfits: str) -> None:
        self.loaded: Any = None
        self._misfits = list(misfits)

    def state_dict(self) -> dict[str, Any]:
        return {}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.loaded = state

    def misfits(self, state: Mapping[str, Any] | None) -> list[str]:
        return self._misfits


class Table(Kept):
    """A part with a big tensor."""

    big_tensors = ("scores",)


PARTS = {"state_dict": Kept(), "optimizer": Kept(), "scaler": Kept(), "counts": Kept(), "memory": Table()}


def make_table(value: float = 1.0) -> Tensor:
    table = torch.full((5, 1), value)
    table[0] = torch.nan
    return table


def content_of(states: dict[str, Any]) -> Content:
    return pack(states, PARTS, name="run", model="tiny")


def make_content(value: float = 1.0, table: bool = True, **counts: Any) -> Content:
    """As of a run that remembers a score; ``counts`` are the state of a plain part."""
    memory = {"columns": ("clip_score",), "scores": make_table(value)}
    return content_of(
        {
            "state_dict": {"weight": torch.full((2, 3), value), "bias": torch.zeros(2)},
            "optimizer": {
                "state": {0: {"exp_avg": torch.ones(2)}},
                "param_groups": [{"lr": np.float64(0.1), "params": [0]}],
            },
            "counts": {"step": 12, **counts},
            **({"memory": memory} if table else {}),
        }
    )


def policy_of(config: Config) -> Policy:
    return Policy(config.checkpoint, config.training.epochs)


def plan_of(config: Config, epoch: int, step: int | None = None, stopping: bool = False) -> Plan:
    """What is due after an epoch; with ``step`` inside an epoch, where a checkpoint is due by the clock."""
    return policy_of(config).plan(
        Moment(epoch=epoch, step=step or 0, inside=step is not None, minutes_over=step is not None, stopping=stopping)
    )


def put(
    folder: Path,
    epoch: int,
    content: Content,
    config: Config = CONFIG,
    step: int | None = None,
) -> Path | None:
    plan = plan_of(config, epoch, step)
    return save_checkpoint(folder, content, plan=plan, policy=policy_of(config)) if plan else None


def save(folder: Path, epoch: int, config: Config = CONFIG, value: float = 1.0, step: int | None = None) -> Path | None:
    return put(folder, epoch, make_content(value), config=config, step=step)


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def weight(checkpoint: Checkpoint) -> float:
    return float(checkpoint.parts["state_dict"]["weight"][0, 0])


def score(checkpoint: Checkpoint) -> float:
    return float(checkpoint.parts["memory"]["scores"][1, 0])


def fail_at(
    monkeypatch: pytest.MonkeyPatch, fails: Callable[[str], bool], kind: type[BaseException] = KeyboardInterrupt
) -> None:
    """The process dies just before a file whose name ``fails`` is put in its place."""
    replace = os.replace

    def die_or_replace(source: Any, target: Any) -> None:
        if fails(Path(target).name):
            raise kind("died")
        replace(source, target)

    monkeypatch.setattr(os, "replace", die_or_replace)


# ---- saving and loading


def test_what_is_saved_is_loaded(tmp_path: Path) -> None:
    path = put(tmp_path, 2, make_content(7.0, layout={"world size": 1}, workers=[torch.arange(3), None, (1, 2.5)]))
    assert path == tmp_path / "epoch_2.pt"
    loaded = load_checkpoint(path)
    assert (loaded.epoch, loaded.model) == (2, "tiny")
    assert str(loaded.parts["counts"]) == str(
        {"step": 12, "layout": {"world size": 1}, "workers": [torch.arange(3), None, (1, 2.5)]}
    )
    assert weight(loaded) == 7.0
    memory = loaded.parts["memory"]
    assert memory["columns"] == ("clip_score",)
    torch.testing.assert_close(memory["scores"], make_table(7.0), equal_nan=True, rtol=0, atol=0)
    assert loaded.parts["optimizer"]["param_groups"][0]["lr"] == 0.1


def test_the_file_has_openclips_keys_and_plain_types_only(tmp_path: Path) -> None:
    save(tmp_path, 1)
    content = torch.load(tmp_path / "epoch_1.pt", weights_only=True)
    assert set(content) == {"epoch", "name", "state_dict", "optimizer", "dissect"}
    assert set(content["state_dict"]) == {"weight", "bias"}
    assert content["dissect"]["format_version"] == 3
    assert set(content["dissect"]["parts"]) == {"counts", "memory"}


def test_a_scaler_is_kept(tmp_path: Path) -> None:
    put(tmp_path, 1, content_of({"state_dict": {"w": torch.ones(1)}, "scaler": {"scale": 8.0}}))
    assert torch.load(tmp_path / "epoch_1.pt", weights_only=True)["scaler"] == {"scale": 8.0}
    assert load_checkpoint(tmp_path / "epoch_1.pt").parts["scaler"] == {"scale": 8.0}


def test_a_real_optimizer_goes_through(tmp_path: Path) -> None:
    model = torch.nn.Linear(3, 2)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, betas=(0.9, 0.98))
    model(torch.ones(1, 3)).sum().backward()
    optimizer.step()
    put(tmp_path, 1, content_of({"state_dict": model.state_dict(), "optimizer": optimizer.state_dict()}))
    fresh = torch.optim.AdamW(model.parameters())
    fresh.load_state_dict(load_checkpoint(tmp_path / "epoch_1.pt").parts["optimizer"])
    assert str(fresh.state_dict()) == str(optimizer.state_dict())


def test_the_scores_name_their_columns(tmp_path: Path) -> None:
    save(tmp_path, 1)
    with safe_open(tmp_path / "epoch_1.scores.safetensors", framework="pt") as file:
        assert json.loads(file.metadata()["columns"]) == ["clip_score"]


def test_an_empty_tensor_has_no_file(tmp_path: Path) -> None:
    memory = {"columns": (), "scores": torch.zeros(5, 0)}
    put(tmp_path, 1, content_of({"state_dict": {"w": torch.ones(1)}, "memory": memory}))
    assert names(tmp_path) == ["epoch_1.pt"]
    assert load_checkpoint(tmp_path / "epoch_1.pt").parts["memory"]["scores"].shape == (5, 0)


def test_big_tensors_of_several_parts_share_a_file(tmp_path: Path) -> None:
    class Other(Kept):
        big_tensors = ("more", "absent")

    states = {
        "state_dict": {"w": torch.ones(1)},
        "memory": {"scores": torch.ones(2, 1)},
        "b": {"more": torch.arange(3.0)},
    }
    put(tmp_path, 1, pack(states, {**PARTS, "b": Other()}, name="run", model="tiny"))
    loaded = load_checkpoint(tmp_path / "epoch_1.pt").parts
    assert torch.equal(loaded["memory"]["scores"], torch.ones(2, 1))
    assert loaded["b"]["more"].tolist() == [0.0, 1.0, 2.0]


def test_scores_of_an_earlier_run_are_not_left_beside_a_checkpoint_without(tmp_path: Path) -> None:
    save(tmp_path, 1)
    put(tmp_path, 1, make_content(table=False))
    assert names(tmp_path) == ["epoch_1.pt"]


def test_remote_checkpoints_are_read_with_their_scores(tmp_path: Path) -> None:
    save(tmp_path, 1, value=6.0)
    loaded = load_checkpoint(f"file://{tmp_path}/epoch_1.pt")
    assert (weight(loaded), score(loaded)) == (6.0, 6.0)


def test_what_is_loaded_needs_the_file_no_more(tmp_path: Path) -> None:
    save(tmp_path, 1, value=3.0)
    loaded = load_checkpoint(tmp_path / "epoch_1.pt")
    for path in tmp_path.iterdir():
        path.write_bytes(b"")
    assert (weight(loaded), score(loaded)) == (3.0, 3.0)


def test_format_1_is_read() -> None:
    loaded = load_checkpoint(Path(__file__).resolve().parents[1] / "assets" / "checkpoint_v1" / "epoch_2.pt")
    assert (loaded.epoch, loaded.model, weight(loaded)) == (2, "tiny", 7.0)
    parts = loaded.parts
    assert parts["scaler"] == {"scale": 8.0}
    assert float(parts["selection"].pop("scores")[1, 0]) == 4.0
    assert parts["selection"] == {
        "strategy": "warmup_base_sampling", "num_samples": 5, "columns": ("clip_score",), "depends_on": None,
        "survey": (), "survey_of": None, "world_size": 1, "seed": 3, "epoch": 1, "step": 24, "inside": False,
        "decoy_captions": None,
    }  # fmt: skip
    assert parts["data"] == {
        "epoch": 2, "inside": False, "num_samples": 5, "fingerprint": "abc", "shards": None, "position": None,
    }  # fmt: skip
    assert parts["progress"] == {
        "epoch": 2, "epoch_step": 0, "step": 12, "batch": 24, "seen": 96, "trained": 48, "scored": 0,
        "seconds": {"load": 0.5},
    }  # fmt: skip
    assert parts["reference"] == {"digest": None, "weights": None, "epochs_begun": 2}
    assert parts["run"] == {
        "seed": 3, "select_rate": 0.5, "world_size": 1, "batch_size": None, "accum_freq": None, "workers": None,
        "score_refresh": None, "select_before_load": None,
    }  # fmt: skip


# ---- which are kept


@pytest.mark.parametrize(("frequency", "kept"), [(1, [1, 2, 3, 4, 5]), (2, [2, 4, 5]), (0, [5]), (7, [5])])
def test_save_frequency_and_the_last_epoch(tmp_path: Path, frequency: int, kept: list[int]) -> None:
    config = Config.of(epochs=5, save_frequency=frequency)
    saved = [put(tmp_path, epoch, make_content(table=False), config=config) for epoch in range(1, 6)]
    assert names(tmp_path) == [f"epoch_{epoch}.pt" for epoch in kept]
    assert [path for path in saved if path is not None] == [tmp_path / f"epoch_{epoch}.pt" for epoch in kept]


def test_delete_previous_keeps_the_newest_only(tmp_path: Path) -> None:
    config = Config.of(epochs=10, save_frequency=2, delete_previous_checkpoint=True)
    for epoch in range(1, 8):
        save(tmp_path, epoch, config)
    assert names(tmp_path) == ["epoch_6.pt", "epoch_6.scores.safetensors"]


def test_most_recent_is_replaced_with_its_scores(tmp_path: Path) -> None:
    config = Config.of(epochs=10, save_frequency=0, save_most_recent=True)
    for epoch in (1, 2):
        assert save(tmp_path, epoch, config, value=float(epoch)) == tmp_path / "epoch_latest.pt"
    assert len(names(tmp_path)) == 2
    loaded = load_checkpoint(tmp_path / "epoch_latest.pt")
    assert (loaded.epoch, weight(loaded), score(loaded)) == (2, 2.0, 2.0)


@pytest.mark.parametrize("step", [None, 30])
def test_a_newer_checkpoint_replaces_those_inside_the_epoch(tmp_path: Path, step: int | None) -> None:
    save(tmp_path, 2)
    save(tmp_path, 2, step=14)
    (tmp_path / "epoch_2_step_12.scores.safetensors").write_bytes(b"of a crash")
    assert save(tmp_path, 3, step=step) is not None
    newest = "epoch_3" if step is None else "epoch_3_step_30"
    assert names(tmp_path) == [f"{stem}{end}" for stem in ("epoch_2", newest) for end in (".pt", ".scores.safetensors")]


def test_with_save_frequency_0_the_newest_inside_an_epoch_stays(tmp_path: Path) -> None:
    config = Config.of(epochs=3, save_frequency=0)
    for epoch in (0, 1):
        save(tmp_path, epoch, config, step=10 * epoch + 5)
        assert save(tmp_path, epoch + 1, config) is None
    assert names(tmp_path) == ["epoch_1_step_15.pt", "epoch_1_step_15.scores.safetensors"]
    save(tmp_path, 3, config)
    assert names(tmp_path) == ["epoch_3.pt", "epoch_3.scores.safetensors"]


def test_the_most_recent_replaces_those_inside_the_epoch(tmp_path: Path) -> None:
    config = Config.of(epochs=10, save_frequency=0, save_most_recent=True)
    save(tmp_path, 1, config, step=8)
    save(tmp_path, 2, config)
    assert names(tmp_path) == ["epoch_latest.pt", "epoch_latest.scores.safetensors"]


def test_one_inside_an_epoch_replaces_those_of_smaller_batches(tmp_path: Path) -> None:
    save(tmp_path, 2, step=30)
    save(tmp_path, 2, step=16)
    assert names(tmp_path) == ["epoch_2_step_16.pt", "epoch_2_step_16.scores.safetensors"]


def test_later_ones_of_a_longer_run_stay(tmp_path: Path) -> None:
    save(tmp_path, 5, step=50)
    save(tmp_path, 2, step=14)
    save(tmp_path, 5)
    assert find_latest(tmp_path) == tmp_path / "epoch_5_step_50.pt"


def test_what_cannot_be_deleted_is_a_warning(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    save(tmp_path, 2, step=14)

    def refuse(path: Path, missing_ok: bool = False) -> None:
        raise PermissionError(13, "not yours")

    monkeypatch.setattr(Path, "unlink", refuse)
    assert save(tmp_path, 2, step=16) == tmp_path / "epoch_2_step_16.pt"
    assert "Cannot delete" in caplog.text
    assert find_latest(tmp_path) == tmp_path / "epoch_2_step_16.pt"


# ---- interrupted writes


@pytest.mark.parametrize("victim", ["epoch_2.scores.safetensors", "epoch_2.pt"])
def test_dying_while_saving_leaves_the_checkpoint_before(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, victim: str
) -> None:
    config = Config.of(epochs=10, delete_previous_checkpoint=True)
    save(tmp_path, 1, config)
    with monkeypatch.context() as patch:
        fail_at(patch, lambda name: name == victim)
        with pytest.raises(KeyboardInterrupt):
            save(tmp_path, 2, config)
    latest = find_latest(tmp_path)
    assert latest == tmp_path / "epoch_1.pt"
    assert load_checkpoint(latest).epoch == 1
    save(tmp_path, 2, config)
    assert names(tmp_path) == ["epoch_2.pt", "epoch_2.scores.safetensors"]


@pytest.mark.parametrize("victim", [".scores.safetensors", "epoch_latest.pt"])
def test_dying_while_replacing_the_most_recent_leaves_the_one_before(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, victim: str
) -> None:
    config = Config.of(epochs=10, save_frequency=0, save_most_recent=True)
    save(tmp_path, 1, config, value=1.0)
    with monkeypatch.context() as patch:
        fail_at(patch, lambda name: name.endswith(victim))
        with pytest.raises(KeyboardInterrupt):
            save(tmp_path, 2, config, value=2.0)
    loaded = load_checkpoint(tmp_path / "epoch_latest.pt")
    assert (loaded.epoch, weight(loaded), score(loaded)) == (1, 1.0, 1.0)
    save(tmp_path, 2, config, value=2.0)
    assert len(names(tmp_path)) == 2


@pytest.mark.parametrize("victim", [".scores.safetensors", "epoch_2.pt"])
def test_dying_while_an_epoch_is_saved_again_leaves_what_was_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, victim: str
) -> None:
    save(tmp_path, 2)
    with monkeypatch.context() as patch:
        fail_at(patch, lambda name: name.endswith(victim))
        with pytest.raises(KeyboardInterrupt):
            save(tmp_path, 2, value=5.0)
    latest = find_latest(tmp_path)
    assert latest == tmp_path / "epoch_2.pt"
    loaded = load_checkpoint(latest)
    assert (weight(loaded), score(loaded)) == (1.0, 1.0)
    save(tmp_path, 2, value=6.0)
    loaded = load_checkpoint(latest)
    assert (weight(loaded), score(loaded)) == (6.0, 6.0)
    assert len(names(tmp_path)) == 2


def test_a_second_run_of_the_same_name_puts_no_half_file_in_place(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = Config.of(epochs=10, delete_previous_checkpoint=True)
    put(tmp_path, 1, make_content(table=False), config=config)
    real_save = torch.save

    def half(content: dict[str, Any], file: BinaryIO) -> None:
        file.write(b"half")
        file.flush()
        raise KeyboardInterrupt

    def while_another_begins(content: dict[str, Any], file: BinaryIO) -> None:
        real_save(content, file)
        monkeypatch.setattr(torch, "save", half)
        with pytest.raises(KeyboardInterrupt):
            put(tmp_path, 2, make_content(table=False), config=config)

    monkeypatch.setattr(torch, "save", while_another_begins)
    with pytest.raises(TrainingError, match="no second run of this name"):
        put(tmp_path, 2, make_content(table=False), config=config)
    assert find_latest(tmp_path) == tmp_path / "epoch_1.pt"


def test_scores_of_another_checkpoint_are_recognised(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    for epoch in (1, 2):
        save(tmp_path, epoch)
    shutil.copy(tmp_path / "epoch_1.scores.safetensors", tmp_path / "epoch_2.scores.safetensors")
    with pytest.raises(SetupError, match="belongs to another checkpoint"):
        load_checkpoint(tmp_path / "epoch_2.pt")
    assert find_latest(tmp_path) == tmp_path / "epoch_1.pt"
    assert "Passed over" in caplog.text


def test_a_full_disk_names_the_file_and_leaves_earlier_checkpoints(tmp_path: Path) -> None:
    save(tmp_path, 1)
    content = make_content()
    content.pt["state_dict"]["weight"] = torch.zeros(100_000)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, limits[1]))
    try:
        with pytest.raises(TrainingError, match=r"epoch_2\.pt: \[Errno 27\] File too large"):
            put(tmp_path, 2, content)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert names(tmp_path) == ["epoch_1.pt", "epoch_1.scores.safetensors"]
    assert find_latest(tmp_path) == tmp_path / "epoch_1.pt"


def test_what_a_crash_left_is_deleted_at_the_next_save(tmp_path: Path) -> None:
    save(tmp_path, 1)
    left = [
        "epoch_2_step_9.scores.safetensors",
        "epoch_2-ab12.scores.safetensors",
        "epoch_latest-ab.scores.safetensors",
    ]
    for name in ("epoch_3.pt.tmp", "epoch_5.scores.safetensors", *left):
        (tmp_path / name).write_bytes(b"")
    save(tmp_path, 1, step=8)
    stems = ("epoch_1", "epoch_1_step_8")
    kept = [f"{stem}{end}" for stem in stems for end in (".pt", ".scores.safetensors")]
    assert names(tmp_path) == [*kept, "epoch_5.scores.safetensors"]


def test_a_checkpoint_in_place_keeps_its_scores_where_the_folder_is_not_put_on_the_disk(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail_for_checkpoint(folder: Path) -> None:
        if (folder / "epoch_1.pt").exists():
            raise OSError("died")

    monkeypatch.setattr("dissect_clip.run.atomic.sync_folder", fail_for_checkpoint)
    with pytest.raises(TrainingError, match=r"epoch_1\.pt: died"):
        save(tmp_path, 1)
    assert score(load_checkpoint(tmp_path / "epoch_1.pt")) == 1.0


def test_scores_that_cannot_be_written_are_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fail_at(monkeypatch, lambda name: name.endswith(".safetensors"), OSError)
    with pytest.raises(TrainingError, match=r"epoch_1\.scores\.safetensors"):
        save(tmp_path, 1)
    assert names(tmp_path) == []


# ---- written while training goes on


class Held:
    """Lets the writing of checkpoints begin when it is released."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.gate = threading.Event()

        def save_later(*args: Any, **settings: Any) -> Path | None:
            assert self.gate.wait(20)
            return save_checkpoint(*args, **settings)

        monkeypatch.setattr(writer_module, "save_checkpoint", save_later)


@pytest.fixture
def make_writer(tmp_path: Path) -> Iterator[Callable[..., CheckpointWriter]]:
    with contextlib.ExitStack() as stack:

        def make(**settings: Any) -> CheckpointWriter:
            writer = CheckpointWriter(tmp_path, policy_of(Config.of(epochs=10, **settings)))
            stack.callback(writer.close)
            return writer

        yield make


def save_with(writer: CheckpointWriter, epoch: int, step: int | None = None, value: float = 1.0) -> None:
    name = f"epoch_{epoch}" + ("" if step is None else f"_step_{step}")
    writer.save(Plan((name,), (epoch, step or 0)), make_content(value))


def test_a_checkpoint_is_of_the_moment_it_was_saved_at(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, make_writer: Callable[..., CheckpointWriter]
) -> None:
    held, writer = Held(monkeypatch), make_writer()
    content = make_content(2.0)
    writer.save(Plan(("epoch_1_step_7",), (1, 7)), content)
    exp_avg = content.pt["optimizer"]["state"][0]["exp_avg"]
    for tensor in (content.pt["state_dict"]["weight"], exp_avg, content.tensors["scores"]):
        tensor.fill_(9.0)
    assert names(tmp_path) == []
    held.gate.set()
    writer.wait()
    loaded = load_checkpoint(tmp_path / "epoch_1_step_7.pt")
    assert (weight(loaded), score(loaded)) == (2.0, 2.0)
    assert loaded.parts["optimizer"]["state"][0]["exp_avg"].tolist() == [1.0, 1.0]


def test_a_save_waits_for_the_one_before(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    make_writer: Callable[..., CheckpointWriter],
    caplog: pytest.LogCaptureFixture,
) -> None:
    held, writer = Held(monkeypatch), make_writer()
    monkeypatch.setattr(writer_module, "_PATIENCE", 0.1)
    save_with(writer, 1)
    threading.Timer(0.2, held.gate.set).start()
    save_with(writer, 2, value=2.0)
    writer.close()
    assert [score(load_checkpoint(tmp_path / f"epoch_{epoch}.pt")) for epoch in (1, 2)] == [1.0, 2.0]
    assert "save less often" in caplog.text


def test_the_copies_are_kept_and_filled_again() -> None:
    copies = HostCopies()
    tensors = {"a": torch.ones(3), "b": [torch.zeros(2, 2).t(), 5, None], "c": (torch.tensor(True),)}
    first = copies.take(tensors)
    assert str(first) == str(tensors)
    tensors["a"].fill_(4.0)  # type: ignore[union-attr]
    second = copies.take({"new": torch.ones(1), **tensors})
    assert second["a"].tolist() == [4.0, 4.0, 4.0]
    assert second["a"].data_ptr() == first["a"].data_ptr() != tensors["a"].data_ptr()  # type: ignore[union-attr]
    assert copies.take({"a": torch.ones(5)})["a"].tolist() == [1.0] * 5


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_copies_from_a_gpu_are_pinned_and_whole() -> None:
    copies = HostCopies()
    table = torch.rand(1000, 1000, device="cuda")
    for _ in range(2):
        table += 1
        copied = copies.take({"table": table})["table"]
        assert copied.is_pinned()
        assert torch.equal(copied, table.cpu())


def full_disk(folder: Path) -> Callable[[], None]:
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, limits[1]))
    return lambda: resource.setrlimit(resource.RLIMIT_FSIZE, limits)


def deleted_folder(folder: Path) -> Callable[[], None]:
    aside = folder.with_name("aside")
    folder.rename(aside)
    return lambda: (aside.rename(folder), None)[1]


def read_only(folder: Path) -> Callable[[], None]:
    if os.geteuid() == 0:
        pytest.skip("root writes to read-only folders")
    folder.chmod(0o500)
    return lambda: folder.chmod(0o700)


TROUBLES = (full_disk, deleted_folder, read_only)


@pytest.mark.parametrize("trouble", TROUBLES)
def test_on_save_error_continue_it_is_said_and_tried_again(
    tmp_path: Path,
    trouble: Callable[[Path], Callable[[], None]],
    make_writer: Callable[..., CheckpointWriter],
    caplog: pytest.LogCaptureFixture,
) -> None:
    writer = make_writer(on_save_error="continue")
    save_with(writer, 1, step=10)
    writer.wait()
    before = names(tmp_path)
    mend = trouble(tmp_path)
    try:
        save_with(writer, 1, step=11)
        writer.wait()
    finally:
        mend()
    assert writer.failed
    (error,) = [record.getMessage() for record in caplog.records if record.levelno == logging.ERROR]
    assert error.startswith("CHECKPOINT NOT SAVED: cannot write the checkpoint ")
    assert "epoch_1_step_11" in error
    assert error.endswith(f"The newest checkpoint is {tmp_path / 'epoch_1_step_10.pt'}")
    assert names(tmp_path) == before
    assert find_latest(tmp_path) == tmp_path / "epoch_1_step_10.pt"
    save_with(writer, 1, step=12)
    writer.wait()
    assert not writer.failed
    assert names(tmp_path) == ["epoch_1_step_12.pt", "epoch_1_step_12.scores.safetensors"]


@pytest.mark.parametrize("choice", ["continue", "stop"])
def test_a_folder_that_cannot_be_read_is_a_save_that_failed(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    make_writer: Callable[..., CheckpointWriter],
    caplog: pytest.LogCaptureFixture,
    choice: str,
) -> None:
    def stale(self: Path, pattern: str) -> Iterator[Path]:
        raise OSError(errno.ESTALE, "Stale file handle")

    writer = make_writer(on_save_error=choice)
    with monkeypatch.context() as patch:
        patch.setattr(Path, "glob", stale)
        save_with(writer, 1)
        if choice == "stop":
            with pytest.raises(TrainingError, match="Stale file handle"):
                writer.wait()
        else:
            writer.wait()
            assert "CHECKPOINT NOT SAVED" in caplog.text
    save_with(writer, 2)
    writer.wait()
    assert find_latest(tmp_path) == tmp_path / "epoch_2.pt"


@pytest.mark.parametrize("then", ["save", "wait", "close"])
def test_on_save_error_stop_the_next_call_raises(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, make_writer: Callable[..., CheckpointWriter], then: str
) -> None:
    writer = make_writer(on_save_error="stop")
    with monkeypatch.context() as patch:
        fail_at(patch, lambda name: name == "epoch_1.pt", OSError)
        save_with(writer, 1)
        calls = {"save": lambda: save_with(writer, 2), "wait": writer.wait, "close": writer.close}
        with pytest.raises(TrainingError, match=r"epoch_1\.pt: died"):
            calls[then]()
    assert names(tmp_path) == []


@pytest.mark.parametrize("rows", [0, 1, 10_001])
def test_the_library_reads_the_scores_that_we_write(tmp_path: Path, rows: int) -> None:
    table = torch.arange(2 * rows, dtype=torch.float32).reshape(rows, 2)
    write_module._write_tensors(tmp_path / "x.safetensors", {"scores": table, "b": table + 1}, {"token": "t"})
    with safe_open(tmp_path / "x.safetensors", framework="pt") as file:
        assert torch.equal(file.get_tensor("scores"), table)
        assert torch.equal(file.get_tensor("b"), table + 1)
        assert file.metadata() == {"token": "t"}


# ---- killed


def save_for_ever(folder: Path, complete: Any) -> None:
    """Go on from the newest checkpoint, saving at every step, five an epoch; ``complete`` gets the last on the disk."""
    os.fsync = lambda handle: None  # type: ignore[assignment] # the machine stays up, and this takes most of the time
    logging.disable()
    config = Config.of(epochs=1000, delete_previous_checkpoint=True, save_most_recent=True)
    writer = CheckpointWriter(folder, policy_of(config))
    latest = find_latest(folder)
    at = 0 if latest is None else int(weight(load_checkpoint(latest)))
    while True:
        inside = at % 5 != 0
        writer.save(plan_of(config, at // 5, at if inside else None), make_content(float(at)))
        writer.wait()
        complete.value = at
        at += 1


def test_killed_at_any_moment_the_newest_checkpoint_is_whole(tmp_path: Path) -> None:
    processes = context()
    random = np.random.default_rng(0)
    complete = processes.Value("i", -1, lock=False)
    for _ in range(30):
        process = processes.Process(target=save_for_ever, args=(tmp_path, complete))
        process.start()
        before, deadline = complete.value, time.monotonic() + 60
        while complete.value == before and time.monotonic() < deadline:
            time.sleep(0.001)
        time.sleep(random.uniform(0, 0.1))
        process.kill()
        process.join()
        latest = find_latest(tmp_path)
        if latest is None:
            assert complete.value == -1
            continue
        loaded = load_checkpoint(latest)
        assert weight(loaded) == score(loaded) >= complete.value
        assert loaded.epoch == weight(loaded) // 5
    assert complete.value >= 29


# ---- other people's files, and damage


def test_openclips_checkpoints_are_read(tmp_path: Path) -> None:
    content = {
        "epoch": 4,
        "name": "theirs",
        "state_dict": {"module.weight": torch.ones(2)},
        "optimizer": {"state": {}, "param_groups": [{"lr": np.float64(5e-4)}]},
        "scaler": {"scale": 2.0},
    }
    torch.save(content, tmp_path / "epoch_4.pt")
    loaded = load_checkpoint(tmp_path / "epoch_4.pt")
    assert (loaded.epoch, list(loaded.parts["state_dict"]), loaded.model) == (4, ["weight"], None)
    assert set(loaded.parts) == {"state_dict", "optimizer", "scaler", "progress"}
    assert loaded.parts["progress"]["epoch"] == 4
    assert loaded.parts["optimizer"]["param_groups"][0]["lr"] == 5e-4


def test_bare_weights_start_at_epoch_zero(tmp_path: Path) -> None:
    torch.save({"weight": torch.ones(2)}, tmp_path / "weights.pt")
    loaded = load_checkpoint(tmp_path / "weights.pt")
    assert (loaded.epoch, list(loaded.parts["state_dict"])) == (0, ["weight"])
    assert set(loaded.parts) == {"state_dict", "progress"}


class _Harmful:
    def __reduce__(self) -> tuple[Any, ...]:
        return (os.system, ("false",))


def damaged(folder: Path, kind: str) -> Path:
    path = folder / "epoch_1.pt"
    save(folder, 1)
    whole = path.read_bytes()
    if kind == "truncated":
        path.write_bytes(whole[: len(whole) // 2])
    elif kind == "empty":
        path.write_bytes(b"")
    elif kind == "text":
        path.write_text("hello\n")
    elif kind == "list":
        torch.save([1, 2], path)
    elif kind == "no weights":
        torch.save({"epoch": 3}, path)
    elif kind == "code":
        torch.save({"state_dict": _Harmful()}, path)
    elif kind == "missing":
        path.unlink()
    elif kind == "newer":
        content = torch.load(path, weights_only=True)
        content["dissect"]["format_version"] = 99
        torch.save(content, path)
    elif kind == "without its scores":
        (folder / "epoch_1.scores.safetensors").unlink()
    elif kind == "scores truncated":
        scores = folder / "epoch_1.scores.safetensors"
        scores.write_bytes(scores.read_bytes()[:-3])
    return path


DAMAGES = (
    "truncated", "empty", "text", "list", "no weights", "code", "missing", "newer", "without its scores",
    "scores truncated",
)  # fmt: skip


@pytest.mark.parametrize("kind", DAMAGES)
def test_what_cannot_be_used_is_refused_by_name(tmp_path: Path, kind: str) -> None:
    path = damaged(tmp_path, kind)
    with pytest.raises(SetupError, match="epoch_1"):
        load_checkpoint(path)


# ---- resuming from it


def checkpoint_at(folder: Path) -> Checkpoint:
    path = put(folder, 1, make_content(3.0))
    assert path is not None
    return load_checkpoint(path)


def test_every_part_gets_its_state(tmp_path: Path) -> None:
    parts = {name: Kept() for name in ("memory", "state_dict", "counts")}
    restore(checkpoint_at(tmp_path), parts)
    assert parts["counts"].loaded == {"step": 12}
    assert torch.equal(parts["state_dict"].loaded["weight"], torch.full((2, 3), 3.0))
    assert parts["memory"].loaded["scores"].shape == (5, 1)


def test_parts_are_restored_in_the_order_of_the_run(tmp_path: Path) -> None:
    order: list[str] = []

    class Noting(Kept):
        def load_state_dict(self, state: Mapping[str, Any]) -> None:
            order.extend(state)

    restore(checkpoint_at(tmp_path), {name: Noting() for name in ("counts", "memory")})
    assert order == ["step", "columns", "scores"]


def test_a_part_that_the_file_lacks_is_asked_and_stays_as_it_is(tmp_path: Path) -> None:
    class Wanting(Kept):
        def misfits(self, state: Mapping[str, Any] | None) -> list[str]:
            return ["it has nothing"] if state is None else []

    checkpoint, new = checkpoint_at(tmp_path), Kept()
    restore(checkpoint, {"new": new})
    assert new.loaded is None
    with pytest.raises(SetupError, match="it has nothing"):
        restore(checkpoint, {"new": Wanting()})


def test_everything_that_does_not_fit_is_named_at_once_and_nothing_is_changed(tmp_path: Path) -> None:
    checkpoint = checkpoint_at(tmp_path)
    parts = {"counts": Kept("--lr is wrong", "--wd is wrong"), "memory": Kept(), "state_dict": Kept("it lacks w")}
    with pytest.raises(SetupError) as error:
        restore(checkpoint, parts)
    said = str(error.value)
    assert [line for line in said.splitlines() if line.startswith("  - ")] == [
        "  - --lr is wrong", "  - --wd is wrong", "  - it lacks w"
    ]  # fmt: skip
    assert f"--pretrained {checkpoint.path}" in said
    assert "--model tiny" in said
    assert all(part.loaded is None for part in parts.values())


def test_an_evaluation_is_told_to_give_the_model(tmp_path: Path) -> None:
    with pytest.raises(SetupError, match=r"(?s)cannot evaluate .*it lacks w.*--siglip"):
        restore(checkpoint_at(tmp_path), {"state_dict": Kept("it lacks w")}, evaluating=True)


# ---- finding


def test_the_newest_is_found_by_number_not_by_name(tmp_path: Path) -> None:
    for epoch in (2, 10, 9):
        save(tmp_path, epoch)
    assert find_latest(tmp_path) == tmp_path / "epoch_10.pt"


def test_those_inside_an_epoch_come_after_its_beginning_and_before_its_end(tmp_path: Path) -> None:
    config = Config.of(epochs=10)
    found = []
    for epoch, step in ((2, None), (2, 9), (2, 10), (3, None)):
        save(tmp_path, epoch, config, step=step)
        found.append(find_latest(tmp_path))
    expected = ("epoch_2.pt", "epoch_2_step_9.pt", "epoch_2_step_10.pt", "epoch_3.pt")
    assert found == [tmp_path / name for name in expected]


def test_a_damaged_one_inside_an_epoch_is_passed_over_and_stays(tmp_path: Path) -> None:
    save(tmp_path, 2)
    save(tmp_path, 2, step=15)
    (tmp_path / "epoch_2_step_15.scores.safetensors").unlink()
    (tmp_path / "epoch_9_step_99.pt.tmp").write_bytes(b"half")
    before = names(tmp_path)
    assert find_latest(tmp_path) == tmp_path / "epoch_2.pt"
    assert names(tmp_path) == before


def test_only_what_must_be_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for epoch in (1, 2, 3):
        save(tmp_path, epoch)
    read, opened = read_module._read_file, []
    monkeypatch.setattr(read_module, "_read_file", lambda path: (opened.append(path.name), read(path))[1])
    find_latest(tmp_path)
    assert opened == ["epoch_3.pt"]


def test_values_that_changed_on_the_disk_are_noticed(tmp_path: Path) -> None:
    save(tmp_path, 1)
    path = save(tmp_path, 2, value=7.0)
    assert path is not None
    whole = path.read_bytes()
    seven = np.full(6, 7.0, np.float32).tobytes()
    assert seven in whole
    path.write_bytes(whole.replace(seven, np.full(6, 7.5, np.float32).tobytes()))
    with pytest.raises(SetupError, match=r"epoch_2\.pt.*checksums"):
        load_checkpoint(path)
    assert find_latest(tmp_path) == tmp_path / "epoch_1.pt"


def test_an_empty_or_missing_folder_has_no_newest(tmp_path: Path) -> None:
    assert find_latest(tmp_path) is None
    assert find_latest(tmp_path / "missing") is None


def test_temporary_files_are_not_found(tmp_path: Path) -> None:
    save(tmp_path, 1)
    (tmp_path / "epoch_2.pt.tmp").write_bytes((tmp_path / "epoch_1.pt").read_bytes())
    assert find_latest(tmp_path) == tmp_path / "epoch_1.pt"


@pytest.mark.parametrize("kind", [kind for kind in DAMAGES if kind != "newer"])
def test_a_damaged_one_is_passed_over(tmp_path: Path, kind: str, caplog: pytest.LogCaptureFixture) -> None:
    damaged(tmp_path, kind)
    save(tmp_path, 0)
    assert find_latest(tmp_path) == tmp_path / "epoch_0.pt"
    assert ("Passed over" in caplog.text) == (kind != "missing")


def test_one_of_a_newer_version_is_not_passed_over(tmp_path: Path) -> None:
    damaged(tmp_path, "newer")
    save(tmp_path, 0)
    with pytest.raises(SetupError, match="saved by a newer version"):
        find_latest(tmp_path)


def test_one_whose_storage_cannot_be_read_is_not_passed_over(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save(tmp_path, 0)
    save(tmp_path, 1)

    def fail(*args: Any, **kwargs: Any) -> Any:
        raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr(torch, "load", fail)
    with pytest.raises(SetupError, match=r"epoch_1\.pt cannot be read \(Input/output error\).*start again"):
        find_latest(tmp_path)


@pytest.mark.parametrize(("latest", "expected"), [(5, "epoch_latest.pt"), (3, "epoch_4.pt")])
def test_the_most_recent_counts_by_the_epoch_inside(tmp_path: Path, latest: int, expected: str) -> None:
    save(tmp_path, latest, Config.of(epochs=10, save_frequency=0, save_most_recent=True))
    save(tmp_path, 4)
    assert find_latest(tmp_path) == tmp_path / expected


# ---- --resume


def make_run(folder: Path) -> RunFolder:
    run = RunFolder(folder / "run", "run", None)
    run.checkpoints.mkdir(parents=True, exist_ok=True)
    return run


def test_resume_takes_a_path_as_it_is(tmp_path: Path) -> None:
    assert find_resume(Config.of(resume="some.pt"), make_run(tmp_path), World()) == "some.pt"
    assert find_resume(Config.of(), make_run(tmp_path), World()) is None


def test_resume_latest_finds_the_runs_newest(tmp_path: Path) -> None:
    run = make_run(tmp_path)
    save(run.checkpoints, 3)
    assert find_resume(Config.of(resume="latest"), run, World()) == str(run.checkpoints / "epoch_3.pt")


def test_resume_latest_of_nothing_starts_anew_and_says_so(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO):
        assert find_resume(Config.of(resume="latest"), make_run(tmp_path), World()) is None
    assert "starting anew" in caplog.text


def test_resume_latest_does_not_start_anew_where_no_checkpoint_can_be_read(tmp_path: Path) -> None:
    run = make_run(tmp_path)
    damaged(run.checkpoints, "truncated")
    (run.checkpoints / "epoch_latest.pt").write_bytes(b"")
    with pytest.raises(SetupError, match=r"none .* can be read \(epoch_1\.pt, epoch_latest\.pt; see.*to start anew"):
        find_resume(Config.of(resume="latest"), run, World())


def test_resume_latest_fetches_one_inside_an_epoch_with_its_scores(tmp_path: Path) -> None:
    run = make_run(tmp_path / "here")
    remote = tmp_path / "there" / "run" / "checkpoints"
    remote.mkdir(parents=True)
    save(remote, 2, value=1.0)
    for value in (2.0, 3.0):
        save(remote, 2, value=value, step=15)  # the second has scores of another name
    config = Config.of(resume="latest", remote_sync=f"file://{tmp_path}/there", remote_sync_protocol="fsspec")
    found = find_resume(config, run, World())
    assert found == str(run.checkpoints / "epoch_2_step_15.pt")
    assert score(load_checkpoint(found)) == 3.0


def test_resume_latest_fetches_the_newest_whole_remote_one(tmp_path: Path) -> None:
    run = make_run(tmp_path / "here")
    remote = tmp_path / "there" / "run" / "checkpoints"
    remote.mkdir(parents=True)
    for epoch in (1, 2, 3):
        save(remote, epoch, value=float(epoch))
    (remote / "epoch_3.scores.safetensors").unlink()
    config = Config.of(resume="latest", remote_sync=f"file://{tmp_path}/there", remote_sync_protocol="fsspec")
    found = find_resume(config, run, World())
    assert found == str(run.checkpoints / "epoch_2.pt")
    assert score(load_checkpoint(found)) == 2.0


# ---- open_clip


def test_open_clip_loads_it_as_pretrained(tmp_path: Path) -> None:
    tower = {"layers": 1, "width": 16}
    config = {
        "embed_dim": 8,
        "vision_cfg": {**tower, "image_size": 16, "patch_size": 8, "head_width": 8},
        "text_cfg": {**tower, "context_length": 8, "vocab_size": 64, "heads": 2},
    }
    (tmp_path / "checkpoint-test-tiny.json").write_text(json.dumps(config))
    open_clip.add_model_config(tmp_path / "checkpoint-test-tiny.json")
    torch.manual_seed(5)
    model = open_clip.create_model("checkpoint-test-tiny")
    path = put(tmp_path, 1, content_of({"state_dict": model.state_dict(), "memory": {"scores": make_table()}}))
    loaded: dict[str, Tensor] = open_clip.create_model("checkpoint-test-tiny", pretrained=str(path)).state_dict()
    assert all(torch.equal(loaded[name], value) for name, value in model.state_dict().items())
