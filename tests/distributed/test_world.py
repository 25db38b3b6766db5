"""Collectives on two real processes, and their meaning in one."""

import os
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from processes import Ranks, free_port, run_on_ranks

from dissect_clip.distributed.world import (
    World,
    _available,
    init_world,
    is_loss_of_others,
    missing_device,
    shutdown_world,
)
from dissect_clip.errors import SetupError


def _collectives(world: World) -> dict[str, Any]:
    mine = torch.tensor([world.rank, 10 + world.rank])
    uneven = torch.arange(2 * world.rank).reshape(-1, 2)  # [0, 2] on rank 0, [1, 2] on rank 1
    warnings.simplefilter("error")  # as of names that torch gives up
    return {
        "gather": world.all_gather(mine).tolist(),
        "uneven": world.all_gather_uneven(uneven).tolist(),
        "nothing": world.all_gather_uneven(uneven[:0]).tolist(),
        "sum": world.sum(mine).tolist(),
        "max": world.max(mine).tolist(),
        "mine": mine.tolist(),
        "broadcast": world.broadcast({"from": world.rank}),
        "on_main": world.on_main(lambda: f"made by {world.rank}"),
    }


@pytest.mark.dist
def test_two_ranks():
    answers = run_on_ranks(2, _collectives)
    for rank, answer in enumerate(answers):
        assert answer.pop("mine") == [rank, 10 + rank]
        assert answer == {
            "gather": [0, 10, 1, 11],
            "uneven": [[0, 1]],
            "nothing": [],
            "sum": [1, 21],
            "max": [1, 11],
            "broadcast": {"from": 0},
            "on_main": "made by 0",
        }


def _failing_main(world: World) -> str:
    def work() -> None:
        raise SetupError("no such shard")

    try:
        world.on_main(work)
    except SetupError as error:
        return str(error)
    return "no error"


@pytest.mark.dist
def test_what_fails_on_the_main_rank_fails_on_all():
    assert run_on_ranks(2, _failing_main) == ["no such shard"] * 2


def test_one_process_needs_no_group():
    world = World()
    rows = torch.arange(4)
    for result in (world.all_gather(rows), world.all_gather_uneven(rows), world.sum(rows), world.max(rows)):
        assert result.tolist() == [0, 1, 2, 3]
    world.barrier()
    assert world.on_main(lambda: 3) == 3


# ---- how processes meet


def _as_under_slurm() -> int:
    """srun sets these for each task; sbatch scripts export MASTER_ADDR and MASTER_PORT."""
    for ours, theirs in (("RANK", "SLURM_PROCID"), ("LOCAL_RANK", "SLURM_LOCALID"), ("WORLD_SIZE", "SLURM_NTASKS")):
        os.environ[theirs] = os.environ.pop(ours)
    world = init_world("cpu", timeout=60)
    print(world.rank, world.local_rank, world.size, world.sum(torch.tensor(1)).item(), os.environ["RANK"], flush=True)
    print(dist.distributed_c10d._get_default_group()._get_backend(torch.device("cpu")).options._timeout, flush=True)
    shutdown_world()
    world.watchdog.close()
    return 0


@pytest.mark.dist
def test_slurm_tasks_meet_without_torchrun(tmp_path: Path):
    with Ranks(tmp_path, 2, _as_under_slurm) as ranks:
        assert ranks.ends(range(2), 60) == [0, 0]
    for rank in range(2):
        assert ranks.said(rank).splitlines()[0] == f"{rank} {rank} 2 2 {rank}"
        assert "1 day" in ranks.said(rank), "collectives have no short time limit of their own"


def test_a_process_that_finds_no_other_says_where_it_looked(monkeypatch: pytest.MonkeyPatch):
    port = free_port()
    environment = {"RANK": 1, "LOCAL_RANK": 1, "WORLD_SIZE": 2, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    for name, value in environment.items():
        monkeypatch.setenv(name, str(value))
    with pytest.raises(SetupError, match=rf"MASTER_PORT={port}.*--rank-timeout 1"):
        init_world("cpu", timeout=1)


def test_the_cpu_stands_in_for_a_device_that_is_not_there():
    world = init_world("cuda")
    world.watchdog.close()
    assert (world.device, world.size) == (torch.device("cpu"), 1)


@pytest.mark.parametrize("device", ["cuda", "cuda:3", "mps", "xpu", "hpu"])
def test_an_accelerator_that_is_not_there_is_named(device: str):
    world = World(device=torch.device(_available(device)))
    assert missing_device(device, world) == device.partition(":")[0].upper()


def test_a_device_that_is_used_is_not_missing():
    assert missing_device("cpu", World()) is None
    assert missing_device("cuda", World(device=torch.device("cuda:1"))) is None


def _peer_gone() -> int:
    world = init_world("cpu", timeout=60)
    world.barrier()  # else the other may still be on its way
    if world.is_main:
        os._exit(0)
    try:
        for _ in range(100):
            world.barrier()
    except RuntimeError as error:
        print("lost" if is_loss_of_others(error) else error, flush=True)
    os._exit(0)


@pytest.mark.dist
def test_a_collective_without_its_peer_is_known_as_such(tmp_path: Path):
    with Ranks(tmp_path, 2, _peer_gone) as ranks:
        assert ranks.ends(range(2), 60) == [0, 0]
    assert "lost" in ranks.said(1)
    assert not is_loss_of_others(RuntimeError("CUDA out of memory"))
