"""Whole runs of two processes in which something goes wrong on one: the other ends soon, and says where it was."""

import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from conftest import ROOT
from processes import Ranks
from runs import arguments
from shards_util import make_shards

from dissect_clip.checkpoint import writer
from dissect_clip.cli import main
from dissect_clip.cli.exit_status import EXIT_INTERRUPT, EXIT_REQUEUE, EXIT_SETUP, EXIT_TRAINING
from dissect_clip.evaluation import retrieval
from dissect_clip.training import epoch as train
from dissect_clip.training import step as step_module

pytestmark = pytest.mark.dist

SOON = 25.0  # seconds; five without a sign of life, and a busy machine


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> str:
    """4,000 pairs."""
    return make_shards(tmp_path_factory.mktemp("data"), [2000, 2000])


@pytest.fixture
def words(tmp_path: Path, data: str) -> list[str]:
    """A run whose epochs take long, and which loads with one worker a rank."""
    return arguments(tmp_path, data, batch_size=4, epochs=100, workers=1, rank_timeout=5)


def started(ranks: Ranks) -> None:
    """Until the run trains, and its ranks have told each other."""
    ranks.wait_for("Train Epoch: 0 [10/")
    time.sleep(2.5)


@pytest.fixture
def running(tmp_path: Path, words: list[str]) -> Iterator[Ranks]:
    """Two ranks in the middle of training."""
    with Ranks(tmp_path, 2, main, words) as ranks:
        started(ranks)
        yield ranks


def complaints(ranks: Ranks, rank: int) -> list[str]:
    """What a rank says of the end, without the word before it."""
    return re.findall(r"^error(?: on rank \d+)?: (.*)$", ranks.said(rank), re.MULTILINE)


def checkpoints(folder: Path) -> list[str]:
    return sorted(path.name for path in (folder / "logs" / "run" / "checkpoints").glob("epoch_*.pt"))


# ---- ranks that die or stall


@pytest.mark.parametrize("victim", [0, 1])
def test_a_rank_that_is_killed(running: Ranks, victim: int):
    running.signal(victim, signal.SIGKILL)
    assert running.ends([1 - victim], SOON) == [EXIT_TRAINING]
    (said,) = complaints(running, 1 - victim)
    assert re.search(rf"rank {victim} \(.*\) died .* last in phase \w+ at step \d+", said)
    assert "Traceback" not in running.said(1 - victim), "the broken connection is not the story"


def test_a_rank_that_is_frozen(tmp_path: Path, running: Ranks):
    running.signal(1, signal.SIGSTOP)
    assert running.ends([0], SOON) == [EXIT_TRAINING]
    (said,) = complaints(running, 0)
    assert said in (tmp_path / "logs" / "run" / "out.log").read_text()
    assert re.search(r"rank 1 \(.*\) died or lost the network: no sign of life .* at step \d+", said)


def test_a_loader_worker_that_is_killed(running: Ranks):
    (worker,) = running.children(1)
    os.kill(worker, signal.SIGKILL)
    assert running.ends([0, 1], SOON) == [EXIT_TRAINING, EXIT_TRAINING]
    (said,) = complaints(running, 0)
    assert re.search(r"rank 1 failed while it was in phase \w+ at step \d+: a loader worker is gone", said)
    assert complaints(running, 1) == []


def test_a_loader_worker_that_is_frozen(running: Ranks):
    (worker,) = running.children(1)
    os.kill(worker, signal.SIGSTOP)
    assert running.ends([0, 1], SOON) == [EXIT_TRAINING, EXIT_TRAINING]
    (said,) = complaints(running, 0)
    assert re.search(r"rank 1 \(.*\) has not got on for \d+ s .* in phase load at step \d+.*--workers", said)
    stat = Path(f"/proc/{worker}/stat")
    assert not stat.exists() or stat.read_text().split()[2] == "Z", "nothing is left behind"


def test_a_loader_worker_that_is_frozen_in_a_run_of_one_process(tmp_path: Path, words: list[str]):
    with Ranks(tmp_path, 1, main, words) as ranks:
        ranks.wait_for("Train Epoch: 0 [10/")
        (worker,) = ranks.children(0)
        os.kill(worker, signal.SIGSTOP)
        assert ranks.ends([0], SOON) == [EXIT_TRAINING]
    assert "in phase load at step" in ranks.said(0)


# ---- ranks that fail


def test_a_rank_whose_samples_are_all_bad(tmp_path: Path):
    bad = {number: {"png": b""} for number in range(40, 80)}
    data = make_shards(tmp_path / "data", [40, 40], bad)
    words = arguments(tmp_path, data, batch_size=4, workers=1, max_skip_fraction=1, log_every_n_steps=100)
    with Ranks(tmp_path, 2, main, words) as ranks:
        assert ranks.ends([0, 1], 60) == [EXIT_TRAINING, EXIT_TRAINING]
    (said,) = complaints(ranks, 0)
    assert re.match(r"rank \d failed while it was in phase load at step \d+: no usable image-caption pair", said)
    assert complaints(ranks, 1) == []


def _evaluation_fails(words: list[str]) -> int:
    encode_batch = retrieval.encode_batch

    def fail_on_rank_1(*given: Any) -> Any:
        if os.environ["RANK"] == "1":
            raise ValueError("an image of no size")
        return encode_batch(*given)

    retrieval.encode_batch = fail_on_rank_1
    return main(words)


def test_a_rank_that_fails_in_the_evaluation(tmp_path: Path):
    data = make_shards(tmp_path / "data", [40, 40])
    words = arguments(tmp_path, data, batch_size=4, val_data=data)
    with Ranks(tmp_path, 2, _evaluation_fails, words) as ranks:
        assert ranks.ends([0, 1], 60) == [EXIT_TRAINING, EXIT_TRAINING]
    assert complaints(ranks, 0) == [
        "rank 1 failed while it was in phase evaluate at step 10: ValueError: an image of no size"
    ]
    assert "Traceback" not in ranks.said(0)
    assert "in fail_on_rank_1" in ranks.said(1), "what nobody expects keeps its traceback"
    assert checkpoints(tmp_path) == ["epoch_1.pt"]


def _update_fails(words: list[str]) -> int:
    def fail(*given: Any) -> Any:
        raise MemoryError("of the GPU, say")

    if os.environ["RANK"] == "0":
        step_module.optimizer_step = fail
    return main(words)


def test_rank_0_tells_the_others_before_it_ends(tmp_path: Path, words: list[str]):
    with Ranks(tmp_path, 2, _update_fails, words) as ranks:
        assert ranks.ends([0, 1], 60) == [EXIT_TRAINING, EXIT_TRAINING]
    assert complaints(ranks, 0) == [
        "rank 0 failed while it was in phase optimizer at step 0: MemoryError: of the GPU, say"
    ]
    assert complaints(ranks, 1) == []
    assert "Traceback" not in ranks.said(1)


@pytest.mark.parametrize("wrong", [["--resume", "/nowhere/epoch_1.pt"], ["--val-data", "/nowhere/val.tar"]])
def test_what_is_wrong_with_the_flags_is_said_once(tmp_path: Path, words: list[str], wrong: list[str]):
    with Ranks(tmp_path, 2, main, [*words, *wrong]) as ranks:
        assert ranks.ends([0, 1], 60) == [EXIT_SETUP, EXIT_SETUP]
    (said,) = complaints(ranks, 0)
    assert wrong[1] in said
    assert "rank" not in said
    assert complaints(ranks, 1) == []


# ---- signals


def processes(ranks: Ranks) -> list[int]:
    """All of a run, as a scheduler signals them."""
    return [pid for rank, p in enumerate(ranks.processes) for pid in (p.pid, *ranks.children(rank)) if pid]


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_to_all_processes_saves_and_ends(tmp_path: Path, running: Ranks, number: signal.Signals):
    for pid in processes(running):
        os.kill(pid, number)
    status = EXIT_INTERRUPT if number == signal.SIGINT else EXIT_REQUEUE
    assert running.ends([0, 1], SOON) == [status, status]
    assert f"Stopped by {number.name}" in running.said(0)
    assert complaints(running, 0) + complaints(running, 1) == []
    assert "Traceback" not in running.said(0) + running.said(1)
    (saved,) = checkpoints(tmp_path)
    assert re.fullmatch(r"epoch_0_step_\d+\.pt", saved)


def test_a_signal_to_one_rank_stops_all(tmp_path: Path, running: Ranks):
    running.signal(1, signal.SIGUSR1)
    assert running.ends([0, 1], SOON) == [EXIT_REQUEUE, EXIT_REQUEUE]
    assert len(checkpoints(tmp_path)) == 1


def test_ctrl_c_twice_does_not_wait_for_the_step(tmp_path: Path, words: list[str]):
    with Ranks(tmp_path, 1, _slow_steps, words) as ranks:
        ranks.wait_for("in the step")
        ranks.signal(0, signal.SIGINT)
        ranks.wait_for("Ctrl-C again")
        time.sleep(2.5)
        ranks.signal(0, signal.SIGINT)
        assert ranks.ends([0], SOON) == [EXIT_INTERRUPT]
    assert complaints(ranks, 0) == ["interrupted; --resume latest continues from the last checkpoint"]
    assert checkpoints(tmp_path) == []


def _slow_steps(words: list[str]) -> int:
    def step(*given: Any) -> Any:
        print("in the step", flush=True)
        time.sleep(60)

    train.train_step = step
    return main([*words, "--rank-timeout", "600"])


def test_a_rank_dies_while_the_others_save(tmp_path: Path, words: list[str]):
    """As under torchrun, which sends SIGTERM to the others."""
    with Ranks(tmp_path, 2, _dies_in_the_save, words) as ranks:
        started(ranks)
        ranks.signal(0, signal.SIGTERM)
        assert ranks.ends([0], SOON) == [EXIT_TRAINING]
    (said,) = complaints(ranks, 0)
    assert re.search(r"rank 1 \(.*\) died", said)


def _dies_in_the_save(words: list[str]) -> int:
    save_inside = train.save_inside

    def die(*given: Any) -> None:
        if os.environ["RANK"] == "1":
            os.kill(os.getpid(), signal.SIGKILL)
        save_inside(*given)

    train.save_inside = die
    return main(words)


def test_a_checkpoint_that_is_being_written_is_finished(tmp_path: Path, words: list[str]):
    with Ranks(tmp_path, 2, _dies_after_the_save, [*words, "--save-every-n-steps", "20"]) as ranks:
        ranks.wait_for("Train Epoch: 0 [10/")
        assert ranks.ends([0], SOON) == [EXIT_TRAINING]
    assert re.search(r"rank 1 \(.*\) died", ranks.said(0))
    assert checkpoints(tmp_path) == ["epoch_0_step_20.pt"]


def _dies_after_the_save(words: list[str]) -> int:
    save_inside, save_checkpoint = train.save_inside, writer.save_checkpoint

    def die(*given: Any) -> None:
        save_inside(*given)
        if os.environ["RANK"] == "1":
            os.kill(os.getpid(), signal.SIGKILL)

    def save_slowly(*given: Any, **named: Any) -> Any:
        time.sleep(12)
        return save_checkpoint(*given, **named)

    train.save_inside, writer.save_checkpoint = die, save_slowly
    return main(words)


@pytest.mark.slow
def test_torchrun_passes_sigterm_on_and_ends_with_its_own_status(tmp_path: Path, words: list[str]):
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    log = tmp_path / "logs" / "run" / "out.log"
    with subprocess.Popen([*command, str(ROOT / "src" / "main.py"), *words], stderr=subprocess.PIPE, text=True) as run:
        while not log.exists() or "[10/" not in log.read_text():
            assert run.poll() is None
            time.sleep(0.2)
        run.terminate()
        _, said = run.communicate(timeout=60)
    assert run.returncode == 1
    assert "Stopped by SIGTERM" in said
    assert "SIGKILL" not in said
    assert len(checkpoints(tmp_path)) == 1


@pytest.mark.slow
def test_torchruns_sigterm_does_not_keep_a_rank_from_saying_which_has_died(tmp_path: Path, data: str):
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    words = arguments(tmp_path, data, batch_size=4, epochs=100, rank_timeout=5)
    log = tmp_path / "logs" / "run" / "out.log"
    with subprocess.Popen([*command, str(ROOT / "src" / "main.py"), *words], stderr=subprocess.PIPE, text=True) as run:
        while not log.exists() or "[10/" not in log.read_text():
            assert run.poll() is None
            time.sleep(0.2)
        children = Path(f"/proc/{run.pid}/task/{run.pid}/children").read_text().split()
        ranks = [pid for pid in children if b"\0RANK=0\0" in Path(f"/proc/{pid}/environ").read_bytes()]
        os.kill(int(ranks[0]), signal.SIGKILL)
        _, said = run.communicate(timeout=60)
    assert re.search(r"^error on rank 1: rank 0 \(.*\) died", said, re.MULTILINE), said
