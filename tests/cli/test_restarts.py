"""Runs that are stopped inside an epoch go on as if they had not been."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pyarrow.parquet as pq
import pytest
import torch
from runs import arguments, lines, losses, record, results, selection, train
from safetensors.torch import load_file

from dissect_clip.checkpoint import saver as saving
from dissect_clip.cli import train as cli
from dissect_clip.cli import training_run
from dissect_clip.data.batch import Batch
from dissect_clip.selection import STRATEGIES
from dissect_clip.training import epoch as training
from dissect_clip.training.timer import PhaseClock

ROOT = Path(__file__).resolve().parents[2]
SMALL = "train-{0,1}.tar"  # 400 pairs: ten steps of forty


class Killed(BaseException):
    """Stands for kill -9: nothing catches it, and nothing is saved."""


def run_until(step: int, words: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """Run, and be killed before this optimizer step."""
    real_step = training.train_step

    def killed_at(state: training.TrainState, batches: Sequence[Batch], clock: PhaseClock) -> dict[str, torch.Tensor]:
        if state.counters.step == step:
            raise Killed
        return real_step(state, batches, clock)

    with monkeypatch.context() as patch:
        patch.setattr(training, "train_step", killed_at)
        with pytest.raises(Killed):
            cli.main(words)


def checkpoint(run: Path, name: str) -> dict[str, Any]:
    content: dict[str, Any] = torch.load(run / "checkpoints" / f"{name}.pt", weights_only=True)
    return content


def last_lines(run: Path, file: str, key: str) -> dict[Any, Any]:
    """The last line for each step or epoch: a resumed run repeats some."""
    timed = ("_seconds", "_time", "_per_second", "_per_gpu")
    return {
        line[key]: {name: value for name, value in line.items() if not name.endswith(timed)}
        for line in lines(run / file)
    }


def assert_same(whole: Path, stopped: Path, epochs: int, strategy: str | None) -> None:
    """Weights, optimizer, scores, losses, evaluations, choices and skips are those of the run that was not stopped."""
    first, second = (checkpoint(run, f"epoch_{epochs}") for run in (whole, stopped))
    assert all(torch.equal(value, second["state_dict"][name]) for name, value in first["state_dict"].items())
    for number, moments in first["optimizer"]["state"].items():
        assert all(torch.equal(value, second["optimizer"]["state"][number][name]) for name, value in moments.items())
    counters = ("step", "batch", "seen", "trained", "scored", "epoch_step")
    parts, others = first["dissect"]["parts"], second["dissect"]["parts"]
    assert [parts["progress"][name] for name in counters] == [others["progress"][name] for name in counters]
    assert last_lines(whole, "train.jsonl", "step") == last_lines(stopped, "train.jsonl", "step")
    assert last_lines(whole, "checkpoints/results.jsonl", "epoch") == last_lines(
        stopped, "checkpoints/results.jsonl", "epoch"
    )
    assert pq.read_table(whole / "skipped.parquet").equals(pq.read_table(stopped / "skipped.parquet"))
    if strategy is not None:
        for epoch in range(epochs):
            key = lambda row: (row["step"], row["rank"], row["sample_id"])  # noqa: E731
            assert sorted(record(whole, epoch), key=key) == sorted(record(stopped, epoch), key=key)
    if strategy is None:
        return
    captions = [each["selection"]["decoy_captions"] for each in (parts, others)]
    assert (captions[0] is None) == (captions[1] is None)
    if captions[0] is not None:
        assert torch.equal(*captions)
        assert (captions[0][:, 0] >= 0).all()
    if parts["selection"]["columns"]:
        scores = [load_file(run / "checkpoints" / f"epoch_{epochs}.scores.safetensors") for run in (whole, stopped)]
        assert torch.equal(scores[0]["scores"].nan_to_num(-1), scores[1]["scores"].nan_to_num(-1))


VARIANTS: list[dict[str, Any]] = [
    {},
    {"accum_freq": 2},
    {"dataset_resampled": True, "train_num_samples": 400},
]


ONE_VARIANT: dict[str, dict[str, Any]] = {
    "infobatch": {"infobatch_prune_ratio": 0.9, "select_rate": None, "accum_freq": 2},
    "scan": {"epochs": 3},
    "clean_posterior": {"clean_decoys": 0.2, "clean_gate": 0.0, "accum_freq": 2},
    "divbs": {"accum_freq": 2},
    "learnability": {"dataset_resampled": True, "train_num_samples": 400},
    "jest": {},
    "negcliploss": {},
    "clipscore:1+warmup_base_sampling:2": {"warmup_point": 1, "select_rate_schedule": "linear", "accum_freq": 2},
}
"""Strategies that go through one variant of their own, since the machinery is that of the others."""


@pytest.mark.parametrize("variant", VARIANTS, ids=lambda v: "-".join(v) or "plain")
@pytest.mark.parametrize("strategy", [None, *(name for name in STRATEGIES if name not in ONE_VARIANT)])
def test_a_run_killed_inside_an_epoch_goes_on_exactly(
    tmp_path: Path, pairs: Path, strategy: str | None, variant: dict[str, Any], monkeypatch: pytest.MonkeyPatch
):
    flags = selection(strategy) | {"epochs": 2, "save_every_n_steps": 2, "force_patch_dropout": 0.3, **variant}
    flags |= {"val_data": pairs / "val.tar", "record": True if strategy else None}
    data = str(pairs / SMALL)
    epochs = flags["epochs"]
    whole = train(tmp_path, data, "whole", **flags)
    steps = checkpoint(whole, f"epoch_{epochs}")["dissect"]["parts"]["progress"]["step"]
    words = arguments(tmp_path, data, "stopped", resume="latest", **flags)
    run_until(steps // 2 - 2, words, monkeypatch)
    run_until(steps // 2 + 3, words, monkeypatch)
    assert cli.main(words) == 0
    assert_same(whole, tmp_path / "logs" / "stopped", epochs, strategy)
    left = [path.name for path in (tmp_path / "logs" / "stopped" / "checkpoints").glob("*step*")]
    assert left == []


@pytest.mark.parametrize(("strategy", "variant"), ONE_VARIANT.items(), ids=ONE_VARIANT)
def test_the_same_with_other_strategies(
    tmp_path: Path, pairs: Path, strategy: str, variant: dict[str, Any], monkeypatch: pytest.MonkeyPatch
):
    test_a_run_killed_inside_an_epoch_goes_on_exactly(tmp_path, pairs, strategy, variant, monkeypatch)


REUSE: dict[str, dict[str, Any]] = {
    "small_loss": {"select_preset": "fast"},
    "random": {"select_preset": "fast"},
    "historical_base_sampling": {"score_refresh": 0.2, "dataset_resampled": True, "train_num_samples": 400},
    "warmup_base_sampling": {"score_refresh": 0.2, "select_before_load": True, "accum_freq": 2},
    "clean_posterior": {"score_refresh": 0.2, "clean_decoys": 0.0},
}


@pytest.mark.parametrize(("strategy", "variant"), REUSE.items(), ids=REUSE)
def test_the_same_where_scores_are_used_again(
    tmp_path: Path, pairs: Path, strategy: str, variant: dict[str, Any], monkeypatch: pytest.MonkeyPatch
):
    flags = selection(strategy) | {"epochs": 2, "save_every_n_steps": 2, "force_patch_dropout": 0.3, **variant}
    flags |= {"record": True, "val_data": pairs / "val.tar", "val_frequency": 2}
    data = break_some(pairs, tmp_path / "data")
    whole = train(tmp_path, data, "whole", **flags)
    steps = checkpoint(whole, "epoch_2")["dissect"]["parts"]["progress"]["step"]
    words = arguments(tmp_path, data, "stopped", resume="latest", **flags)
    for step in (steps // 2 - 1, steps - 2):
        run_until(step, words, monkeypatch)
    assert cli.main(words) == 0
    assert_same(whole, tmp_path / "logs" / "stopped", 2, strategy)


@pytest.mark.parametrize("preset", ["exact", "fast"])
def test_the_same_on_a_list_of_samples(tmp_path: Path, pairs: Path, preset: str, monkeypatch: pytest.MonkeyPatch):
    data = break_some(pairs, tmp_path / "data")
    kept = range(0, 400, 3)  # 134 samples in nine steps of sixteen: some come twice
    listed = tmp_path / "list.txt"
    listed.write_text("".join(f"{number}\n" for number in kept))
    flags = selection("warmup_base_sampling", select_preset=preset) | {"epochs": 2, "save_every_n_steps": 1}
    flags |= {"record": True, "val_data": pairs / "val.tar", "val_frequency": 2}
    flags |= {"train_keep": listed, "batch_size": 16}
    whole = train(tmp_path, data, "whole", **flags)
    words = arguments(tmp_path, data, "stopped", resume="latest", **flags)
    for step in (4, 12):
        run_until(step, words, monkeypatch)
    assert cli.main(words) == 0
    assert_same(whole, tmp_path / "logs" / "stopped", 2, "warmup_base_sampling")
    assert {row["sample_id"] for epoch in range(2) for row in record(whole, epoch)} <= set(kept)


@pytest.mark.slow
@pytest.mark.parametrize("workers", [1, 2])
def test_the_same_with_loader_workers_and_broken_samples(
    tmp_path: Path, pairs: Path, workers: int, monkeypatch: pytest.MonkeyPatch
):
    data = break_some(pairs, tmp_path / "data")
    flags = selection("warmup_base_sampling") | {"epochs": 2, "save_every_n_steps": 3, "workers": workers}
    flags |= {"record": True, "batch_size": 20, "val_data": pairs / "val.tar"}
    whole = train(tmp_path, data, "whole", **flags)
    words = arguments(tmp_path, data, "stopped", resume="latest", **flags)
    for step in (7, 25):
        run_until(step, words, monkeypatch)
    assert cli.main(words) == 0
    assert_same(whole, tmp_path / "logs" / "stopped", 2, "warmup_base_sampling")


def test_a_run_killed_while_it_evaluates_evaluates_when_it_goes_on(
    tmp_path: Path, pairs: Path, monkeypatch: pytest.MonkeyPatch
):
    flags = {"epochs": 2, "val_data": pairs / "val.tar"}
    data = str(pairs / SMALL)
    whole = train(tmp_path, data, "whole", **flags)
    words = arguments(tmp_path, data, "stopped", resume="latest", **flags)

    def killed(*arguments: object, **named: object) -> None:
        raise Killed

    with monkeypatch.context() as patch:
        patch.setattr(training_run, "evaluate", killed)
        with pytest.raises(Killed):
            cli.main(words)
    assert cli.main(words) == 0
    assert results(tmp_path / "logs" / "stopped") == results(whole)


def break_some(pairs: Path, folder: Path) -> str:
    """Two shards in which four images each have lost what tells a JPEG; returns their pattern."""
    folder.mkdir()
    for number in range(2):
        content = (pairs / f"train-{number}.tar").read_bytes()
        (folder / f"train-{number}.tar").write_bytes(content.replace(b"\xff\xd8\xff", b"\0\0\0", 4))
    return str(folder / "train-{0,1}.tar")


def test_other_batches_after_a_stop_see_what_is_left_once(
    tmp_path: Path, pairs: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    flags = selection("random") | {"epochs": 1, "save_every_n_steps": 2, "record": True}
    data = break_some(pairs, tmp_path / "data")
    run_until(5, arguments(tmp_path, data, **flags), monkeypatch)
    run = train(tmp_path, data, resume="latest", **flags | {"batch_size": 25, "workers": 2})
    ids = [row["sample_id"] for row in record(run, 0)]
    assert len(ids) == 160 + 250  # 232 are left, rounded up to whole batches
    assert len(set(ids)) == 392
    skipped = pq.read_table(run / "skipped.parquet").to_pylist()
    assert sum(row["samples"] for row in skipped) == 8  # those met before the stop are met again, and told once
    said = capsys.readouterr().err
    assert "batch_size is 25, was 40" in said
    assert "the 240 samples not yet seen are distributed again" in said


def test_with_larger_batches_the_oldest_scores_are_still_the_first_to_be_renewed(tmp_path: Path, pairs: Path):
    flags = selection("clipscore", score_refresh=0.2)
    data = str(pairs / SMALL)
    train(tmp_path, data, epochs=1, **flags)
    run = train(tmp_path, data, epochs=2, resume="latest", batch_size=80, **flags)
    when = load_file(run / "checkpoints" / "epoch_2.scores.safetensors")["scores"][:, -1]
    # Five batches an epoch now, where there were ten.
    assert 0 < (when >= 5).sum() <= 5 * (24 + 16)
    assert when.max() == 9


def test_checkpoints_by_the_clock(tmp_path: Path, pairs: Path, monkeypatch: pytest.MonkeyPatch):
    words = arguments(tmp_path, str(pairs / SMALL), epochs=1, save_every_minutes=1e-9)
    run_until(6, words, monkeypatch)
    (saved,) = (tmp_path / "logs" / "run" / "checkpoints").glob("epoch_0_step_*.pt")
    assert saved.name == "epoch_0_step_6.pt"


@pytest.mark.parametrize("due", [{"save_every_n_steps": 20}, {"save_every_minutes": 5}], ids="-".join)
def test_checkpoints_that_are_due_where_an_epoch_ends_that_is_passed_over(
    tmp_path: Path, pairs: Path, due: dict[str, Any], monkeypatch: pytest.MonkeyPatch
):
    data, strategy = str(pairs / SMALL), "warmup_base_sampling"
    flags = selection(strategy) | {"save_frequency": 0, "val_data": pairs / "val.tar", "record": True}
    whole = train(tmp_path, data, "whole", **flags)
    words = arguments(tmp_path, data, "stopped", **flags, **due)
    real_step, steps = training.train_step, []

    def counted(*parts: Any) -> dict[str, torch.Tensor]:
        steps.append(1)
        return real_step(*parts)

    slow = SimpleNamespace(monotonic=lambda: time.monotonic() + 15 * len(steps))  # 15 seconds for each of ten steps
    with monkeypatch.context() as patch:
        patch.setattr(training, "train_step", counted)
        patch.setattr(saving, "time", slow)
        run_until(25, words, monkeypatch)
    (saved,) = (tmp_path / "logs" / "stopped" / "checkpoints").glob("*.pt")
    assert saved.name == "epoch_2_step_20.pt"
    stopped = train(tmp_path, data, "stopped", resume="latest", **flags)
    assert_same(whole, stopped, 3, strategy)


# ---- signals


def start(words: list[str]) -> "subprocess.Popen[str]":
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(
        [sys.executable, str(ROOT / "src" / "main.py"), *words], stderr=subprocess.PIPE, text=True, env=environment
    )


def wait_for_steps(process: "subprocess.Popen[str]", run: Path, count: int) -> None:
    log = run / "train.jsonl"
    while process.poll() is None and not (log.exists() and log.read_bytes().count(b"\n") >= count):
        pass
    assert process.poll() is None


@pytest.mark.slow
@pytest.mark.parametrize(("name", "status"), [("SIGTERM", 75), ("SIGUSR1", 75), ("SIGINT", 130)])
def test_signals_save_and_stop_with_a_status(tmp_path: Path, pairs: Path, name: str, status: int):
    flags = {"epochs": 60, "batch_size": 20}
    words = arguments(tmp_path, str(pairs / SMALL), **flags)
    run = tmp_path / "logs" / "run"
    process = start(words)
    wait_for_steps(process, run, 60)
    process.send_signal(getattr(signal, name))
    _, said = process.communicate(timeout=60)
    assert process.returncode == status, said
    assert "Traceback" not in said
    assert name in said
    done = max(last_lines(run, "train.jsonl", "step"))
    saved = sorted((run / "checkpoints").glob("epoch_*.pt"), key=os.path.getmtime)[-1]
    assert checkpoint(run, saved.stem)["dissect"]["parts"]["progress"]["step"] == done  # nothing is lost


def test_losses_are_equal_whatever_is_saved(tmp_path: Path, pairs: Path):
    data = str(pairs / SMALL)
    plain, often = (train(tmp_path, data, f"every{n}", epochs=1, save_every_n_steps=n) for n in (0, 1))
    assert losses(plain) == losses(often)
