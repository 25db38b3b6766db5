"""Collectives on two real processes, and their meaning in one."""

from typing import Any

import pytest
import torch
from distributed import run_on_ranks

from dissect_clip.dist import World
from dissect_clip.errors import SetupError


def _collectives(world: World) -> dict[str, Any]:
    mine = torch.tensor([world.rank, 10 + world.rank])
    uneven = torch.arange(2 * world.rank).reshape(-1, 2)  # [0, 2] on rank 0, [1, 2] on rank 1
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
