"""Run a test's function on several real processes that share a gloo group."""

import os
import signal
import socket
import sys
import time
import traceback
from collections.abc import Callable, Iterable
from datetime import timedelta
from multiprocessing import forkserver
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from dissect_clip.distributed.world import World

TIMEOUT = timedelta(seconds=90)


def context() -> Any:
    """Processes are forked from one that has imported all already, which takes seconds each time."""
    context = mp.get_context("forkserver")
    context.set_forkserver_preload(["dissect_clip.cli.training_run"])
    with mock.patch.dict(os.environ, PYTHONPATH=os.pathsep.join(filter(None, sys.path))):
        forkserver.ensure_running()
    return context


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def _rank_main(
    rank: int,
    size: int,
    port: int,
    results: Any,
    environment: dict[str, str],
    function: Callable[..., Any],
    arguments: tuple[Any, ...],
) -> None:
    torch.set_num_threads(1)
    mp.set_start_method("fork", force=True)  # for loaders; else as this process was started
    os.environ |= environment | {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(size)}
    dist.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=size, timeout=TIMEOUT)
    try:
        results.put((rank, True, function(World(rank=rank, local_rank=rank, size=size), *arguments)))
        dist.barrier()
    except BaseException:
        results.put((rank, False, traceback.format_exc()))
        raise
    finally:
        dist.destroy_process_group()


def run_on_ranks(world_size: int, function: Callable[..., Any], *arguments: Any) -> list[Any]:
    """Call ``function(world, *arguments)`` on ``world_size`` processes; returns what each rank returned, in order.

    ``function`` must be importable (module level) and what it returns picklable; tensors should be turned into
    lists or numpy arrays. Raises AssertionError with the first failing rank's traceback.
    """
    results: Any = context().SimpleQueue()
    port = free_port()
    processes = [
        context().Process(
            target=_rank_main, args=(rank, world_size, port, results, dict(os.environ), function, arguments)
        )
        for rank in range(world_size)
    ]
    for process in processes:
        process.start()
    answers: dict[int, Any] = {}
    try:
        while len(answers) < world_size:
            if not results.empty():
                rank, succeeded, answer = results.get()
                assert succeeded, f"rank {rank} failed:\n{answer}"
                answers[rank] = answer
            elif not any(process.is_alive() for process in processes) and results.empty():
                raise AssertionError(f"ranks ended without an answer: {[p.exitcode for p in processes]}")
            else:
                processes[0].join(0.02)
        for process in processes:
            process.join(TIMEOUT.total_seconds())
    finally:
        for process in processes:
            if process.is_alive():
                process.kill()
    return [answers[rank] for rank in range(world_size)]


# ---- processes that may die


def _stand_in(folder: str, rank: int, size: int, port: int, function: Callable[..., Any], arguments: Any) -> None:
    """A rank as torchrun would start it, with its output in a file."""
    file = os.open(f"{folder}/rank{rank}.err", os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(file, 1)
    os.dup2(file, 2)
    signal.signal(signal.SIGINT, signal.default_int_handler)  # ignored in what a shell runs in the background
    torch.set_num_threads(1)
    mp.set_start_method("fork", force=True)
    master = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)} if size > 1 else {}
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(size), **master}
    sys.exit(function(*arguments))


class Ranks:
    """Processes that run ``function(*arguments)`` as ranks of one run; they may fail, and be killed.

    A context manager. ``function`` must be importable; what it returns is the exit status.
    """

    def __init__(self, folder: Path, size: int, function: Callable[..., Any], *arguments: Any) -> None:
        self.folder = folder
        port = free_port()
        self.processes = [
            context().Process(target=_stand_in, args=(str(folder), rank, size, port, function, arguments))
            for rank in range(size)
        ]

    def __enter__(self) -> "Ranks":
        for process in self.processes:
            process.start()
        return self

    def __exit__(self, *error: object) -> None:
        for process in self.processes:
            process.kill()
            process.join()

    def said(self, rank: int) -> str:
        """Standard output and error of a rank."""
        path = self.folder / f"rank{rank}.err"
        return path.read_text() if path.exists() else ""

    def wait_for(self, text: str, rank: int = 0, seconds: float = 60) -> None:
        """Until a rank has said something."""
        deadline = time.monotonic() + seconds
        while text not in self.said(rank):
            assert time.monotonic() < deadline, f"rank {rank} did not say {text!r}: {self.said(rank)}"
            assert self.processes[rank].is_alive(), f"rank {rank} ended before it said {text!r}: {self.said(rank)}"
            time.sleep(0.05)

    def signal(self, rank: int, number: int) -> None:
        """Send a signal to a rank."""
        pid = self.processes[rank].pid
        assert pid is not None
        os.kill(pid, number)

    def children(self, rank: int) -> list[int]:
        """Process ids of a rank's children."""
        pid = self.processes[rank].pid
        words = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
        return [int(word) for word in words]

    def ends(self, ranks: Iterable[int], seconds: float) -> list[int | None]:
        """Exit statuses of these ranks, which must end within so many seconds; minus the signal that killed one."""
        deadline = time.monotonic() + seconds
        for rank in ranks:
            self.processes[rank].join(max(0.0, deadline - time.monotonic()))
            assert not self.processes[rank].is_alive(), f"rank {rank} goes on after {seconds} s: {self.said(rank)}"
        return [self.processes[rank].exitcode for rank in ranks]
