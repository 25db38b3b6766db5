"""Ranks that keep an eye on each other, as real processes without any training."""

import json
import os
import signal
import time
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
from processes import Ranks
from torch.distributed import TCPStore

from dissect_clip.distributed.agreement import StepDecision
from dissect_clip.distributed.watchdog import Watchdog
from dissect_clip.errors import SetupError

TIMEOUT = 3.0  # a rank is dead after 5 s all the same


def start(timeout: float = TIMEOUT) -> tuple[Watchdog, int]:
    """This rank's watchdog, started, and its rank; stores as ``init_world`` makes them."""
    rank, size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    watchdog = Watchdog(rank, size, timeout)
    if size == 1:
        watchdog.start()
    else:
        limit = timedelta(seconds=60)
        stores = [
            TCPStore("127.0.0.1", int(os.environ["MASTER_PORT"]), size, rank == 0, limit, multi_tenant=True)
            for _ in range(2)
        ]
        watchdog.start(*stores)
    print("started", flush=True)
    return watchdog, rank


# ---- failures


def _one_fails(failing: int) -> int:
    watchdog, rank = start(timeout=60)
    watchdog.begin_phase("load", 120)
    if rank == failing:
        watchdog.abort("no usable pair", 3)
    time.sleep(30)
    return 0


@pytest.mark.dist
@pytest.mark.parametrize("failing", [0, 1])
def test_last_words_end_all_ranks_in_seconds(tmp_path: Path, failing: int):
    with Ranks(tmp_path, 3, _one_fails, failing) as ranks:
        ranks.wait_for("started")
        assert ranks.ends(range(3), 10) == [3, 3, 3]
    assert f"error: rank {failing} failed while it was in phase load at step 120: no usable pair" in ranks.said(0)
    assert "error" not in ranks.said(1) + ranks.said(2), "rank 0 speaks for all"


def _all_fail() -> int:
    watchdog, rank = start(timeout=60)
    time.sleep(0.3 * rank)
    watchdog.abort("no such shard", 2)
    return 0


@pytest.mark.dist
def test_what_all_ranks_find_is_said_once(tmp_path: Path):
    with Ranks(tmp_path, 3, _all_fail) as ranks:
        assert ranks.ends(range(3), 20) == [2, 2, 2]
    assert [ranks.said(rank).count("no such shard") for rank in range(3)] == [1, 0, 0]
    assert "error: no such shard" in ranks.said(0)


def _one_has_work_left(folder: Path) -> int:
    watchdog, rank = start(timeout=60)

    def finish(seconds: float) -> None:
        time.sleep(3)
        (folder / f"finished by {rank}").touch()

    if rank == 1:
        watchdog.abort("no usable pair", 3)
    watchdog.before_exit = finish
    time.sleep(30)
    return 0


@pytest.mark.dist
def test_what_is_about_to_be_finished_is_waited_for(tmp_path: Path):
    with Ranks(tmp_path, 2, _one_has_work_left, tmp_path) as ranks:
        ranks.wait_for("started")
        assert ranks.ends(range(2), 15) == [3, 3]
    assert (tmp_path / "finished by 0").exists()
    assert ranks.said(0).count("no usable pair") == 1


def test_a_single_process_says_why_and_returns(capsys: pytest.CaptureFixture[str]):
    watchdog = Watchdog()
    watchdog.start()
    watchdog.abort("no such shard", 2)
    watchdog.close()
    assert capsys.readouterr().err == "error: no such shard\n"


# ---- deaths


def _wait(collective_fails: bool) -> int:
    watchdog, rank = start()
    watchdog.begin_phase("score", 31)
    time.sleep(2.5)  # the mark is told
    print("ready", flush=True)
    time.sleep(1)
    if collective_fails and rank == 1:
        watchdog.report_lost_peers(RuntimeError("connection closed by peer"))
    while True:
        watchdog.report_progress()
        time.sleep(0.1)


@pytest.mark.dist
@pytest.mark.parametrize(("victim", "number"), [(2, signal.SIGKILL), (0, signal.SIGSTOP)])
def test_a_rank_that_is_killed_or_frozen_is_named(tmp_path: Path, victim: int, number: int):
    with Ranks(tmp_path, 3, _wait, victim == 2) as ranks:
        ranks.wait_for("ready", victim)
        ranks.signal(victim, number)
        others = [rank for rank in range(3) if rank != victim]
        assert ranks.ends(others, 25) == [1, 1]
    speakers = [0] if victim else [1, 2]
    for rank in speakers:
        assert f"rank {victim} (" in ranks.said(rank)
        assert "last in phase score at step 31" in ranks.said(rank)
    if victim:
        assert "error" not in ranks.said(1)


# ---- stalls


def _stall(size: int) -> int:
    watchdog, rank = start(timeout=2)
    if rank == size - 1:
        watchdog.begin_phase("load", 5)
        time.sleep(30)
    watchdog.begin_phase("train", 5)
    time.sleep(30)
    return 0


@pytest.mark.dist
@pytest.mark.parametrize("size", [1, 3])
def test_the_rank_that_holds_up_the_others_is_named_with_a_traceback(tmp_path: Path, size: int):
    with Ranks(tmp_path, size, _stall, size) as ranks:
        ranks.wait_for("started")
        assert ranks.ends(range(size), 15) == [1] * size
    assert f"rank {size - 1} (" in ranks.said(0)
    assert "in phase load at step 5" in ranks.said(0)
    assert "in _stall" in ranks.said(size - 1), "where it stands"


def _long_work() -> int:
    watchdog, rank = start()
    if rank == 0:
        for _ in range(20):
            time.sleep(0.25)
            watchdog.report_progress()
    else:
        with watchdog.suspend_timeout():
            time.sleep(5)
    watchdog.close()
    return 0


@pytest.mark.dist
def test_long_work_with_signs_of_life_goes_on(tmp_path: Path):
    with Ranks(tmp_path, 2, _long_work) as ranks:
        assert ranks.ends(range(2), 30) == [0, 0]


def _frozen_together() -> int:
    watchdog, _ = start()
    for _ in range(70):
        time.sleep(0.1)
        watchdog.begin_phase("train", 1)
    watchdog.close()
    return 0


@pytest.mark.dist
def test_a_job_that_a_scheduler_suspends_goes_on_afterwards(tmp_path: Path):
    with Ranks(tmp_path, 2, _frozen_together) as ranks:
        for rank in range(2):
            ranks.wait_for("started", rank)
        for number in (signal.SIGSTOP, signal.SIGCONT):
            for rank in range(2):
                ranks.signal(rank, number)
            time.sleep(7 if number == signal.SIGSTOP else 0)
        assert ranks.ends(range(2), 30) == [0, 0]


# ---- beginning and end


def test_ranks_that_do_not_start_are_named():
    with pytest.raises(SetupError, match=r"ranks 1, 2 of 3 have not started after 0\.5 s"):
        Watchdog(0, 3, 0.5).start(TCPStore("127.0.0.1", 0, 1, True), TCPStore("127.0.0.1", 0, 1, True))


def _leave_one_by_one() -> int:
    watchdog, rank = start()
    time.sleep(rank)
    print("done", flush=True)
    watchdog.close()
    return 75


@pytest.mark.dist
def test_ranks_leave_together(tmp_path: Path):
    """So that torchrun does not kill a rank that still has work, such as the last copy to remote storage."""
    with Ranks(tmp_path, 3, _leave_one_by_one) as ranks:
        ranks.wait_for("done", 0)
        while "done" not in ranks.said(2):
            assert ranks.processes[0].is_alive()
            assert ranks.processes[1].is_alive()
            time.sleep(0.05)
        assert ranks.ends(range(3), 10) == [75, 75, 75]


# ---- orders


def _follow_orders(asks: list[int]) -> int:
    watchdog, rank = start(timeout=60)
    orders: list[Any] = []
    asked: int | None = None
    for step in range(100_000):
        time.sleep(0.002 * (1 + rank))  # ranks are not of one speed
        given = watchdog.poll(rank == 0 and step == 20)
        orders.append([given.save, given.stop])
        if asked is None and rank in asks and given.save:
            asked = step
            watchdog.request_stop("SIGUSR1")
        if given.stop:
            break
    print("orders", json.dumps({"orders": orders, "asked": asked}), flush=True)
    watchdog.close()
    return 0


@pytest.mark.dist
@pytest.mark.parametrize("asks", [[0], [1, 2]])
def test_orders_are_the_same_on_all_ranks_at_the_same_step(tmp_path: Path, asks: list[int]):
    with Ranks(tmp_path, 3, _follow_orders, asks) as ranks:
        assert ranks.ends(range(3), 40) == [0, 0, 0]
    answers = [json.loads(ranks.said(rank).rpartition("orders ")[2]) for rank in range(3)]
    first = answers[0]["orders"]
    assert all(answer["orders"] == first for answer in answers)
    assert sum(save for save, _ in first) == 1, "asked for once, done once"
    assert [save for save, _ in first].index(True) > 20
    assert first[-1] == [False, "SIGUSR1"]
    assert [stop for _, stop in first[:-1]] == [None] * (len(first) - 1)


def test_a_single_process_follows_at_once():
    watchdog = Watchdog()
    assert watchdog.poll(False) == StepDecision(False, None)
    assert watchdog.poll(True) == StepDecision(True, None)
    watchdog.request_stop("SIGTERM")
    watchdog.request_stop("SIGINT")
    assert watchdog.poll(False) == StepDecision(False, "SIGTERM")
