"""Run a test's function on several real processes that share a gloo group."""

import os
import socket
import traceback
from collections.abc import Callable
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from dissect_clip.dist import World

TIMEOUT = timedelta(seconds=90)


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def _rank_main(
    rank: int, size: int, port: int, results: Any, function: Callable[..., Any], arguments: tuple[Any, ...]
) -> None:
    torch.set_num_threads(1)
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(size)}
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
    context = mp.get_context("spawn")
    results: Any = context.SimpleQueue()
    port = free_port()
    processes = [
        context.Process(target=_rank_main, args=(rank, world_size, port, results, function, arguments))
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
