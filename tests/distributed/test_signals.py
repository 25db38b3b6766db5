"""Signals that ask for a stop, in this process; whole runs are in test_ranks_that_fail.py."""

import multiprocessing
import os
import signal
import subprocess
import time
from collections.abc import Iterator
from typing import Any

import pytest
from torch.utils.data import DataLoader

from dissect_clip.distributed.signals import STOPPING, Signals, leave_to_the_parent
from dissect_clip.distributed.watchdog import Watchdog


@pytest.fixture
def watchdog() -> Iterator[Watchdog]:
    watchdog = Watchdog()
    watchdog.start()
    yield watchdog
    watchdog.close()


@pytest.mark.parametrize("number", STOPPING)
def test_a_signal_asks_for_a_stop_and_nothing_else(watchdog: Watchdog, number: signal.Signals):
    with Signals(watchdog, is_main=False):
        assert watchdog.poll(False).stop is None
        os.kill(os.getpid(), number)
        assert watchdog.poll(False).stop == number.name


def test_the_first_signal_is_the_one_that_counts(watchdog: Watchdog):
    with Signals(watchdog, is_main=False):
        os.kill(os.getpid(), signal.SIGUSR1)
        os.kill(os.getpid(), signal.SIGTERM)
        assert watchdog.poll(False).stop == "SIGUSR1"


def test_ctrl_c_says_what_it_does_and_twice_stops_at_once(
    watchdog: Watchdog, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
):
    with Signals(watchdog, is_main=True):
        os.kill(os.getpid(), signal.SIGINT)
        os.kill(os.getpid(), signal.SIGINT)  # torchrun passes on what came from the terminal
        assert capfd.readouterr().err.count("Ctrl-C again") == 1
        now = time.monotonic()
        monkeypatch.setattr(time, "monotonic", lambda: now + 3)
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)


def test_only_rank_0_speaks(watchdog: Watchdog, capfd: pytest.CaptureFixture[str]):
    with Signals(watchdog, is_main=False):
        os.kill(os.getpid(), signal.SIGINT)
    assert capfd.readouterr().err == ""


def test_handlers_are_put_back(watchdog: Watchdog):
    before = [signal.getsignal(number) for number in STOPPING]
    with Signals(watchdog, is_main=False):
        assert signal.getsignal(signal.SIGTERM) != before[0]
    assert [signal.getsignal(number) for number in STOPPING] == before
    assert signal.set_wakeup_fd(-1) == -1


def test_the_watch_hears_sigterm_while_the_main_thread_is_blocked(watchdog: Watchdog):
    """Python's handlers wait for the main thread, which a collective may block for ever."""
    asked: list[str] = []
    watchdog.request_stop = asked.append  # type: ignore[method-assign]
    with Signals(watchdog, is_main=False):
        signal.signal(signal.SIGTERM, lambda *_: None)  # as if it were never run
        os.kill(os.getpid(), signal.SIGTERM)
        for _ in range(100):
            if asked:
                break
            time.sleep(0.05)
    assert asked == ["SIGTERM"]


class Pids:
    """A data set whose samples are the workers' process ids."""

    def __len__(self) -> int:
        return 1000

    def __getitem__(self, index: int) -> int:
        return os.getpid()


def test_a_loader_worker_survives_what_a_scheduler_sends_to_all(watchdog: Watchdog):
    with Signals(watchdog, is_main=False):
        loader = DataLoader(Pids(), batch_size=None, num_workers=1, worker_init_fn=leave_to_the_parent)
        batches = iter(loader)
        worker = next(batches)
        for number in STOPPING:
            subprocess.run(["sh", "-c", f"kill -{int(number)} {worker}"], check=True)
        time.sleep(0.2)
        assert sum(pid == worker for pid in batches) == 999
        assert watchdog.poll(False).stop is None, "what a worker gets is not the training process's"


def test_a_worker_ends_when_its_parent_says_so():
    """Also with the interpreter: a loader that is still there then leaves it to multiprocessing."""
    context = multiprocessing.get_context("fork")
    ready = context.Event()
    worker = context.Process(target=_worker, args=(ready,))
    worker.start()
    assert ready.wait(60)
    subprocess.run(["kill", "-TERM", str(worker.pid)], check=True)
    worker.join(0.5)
    assert worker.is_alive(), "another's signal"
    worker.terminate()
    worker.join(20)
    assert worker.exitcode == 0


def _worker(ready: Any) -> None:
    leave_to_the_parent(0)
    ready.set()
    time.sleep(60)
