"""What is remembered about every sample of the data set, the same on all ranks.

Shapes: N rows of this rank, G rows of all ranks, C columns.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from dissect_clip.distributed.torch_compat import assert_async
from dissect_clip.distributed.world import World


def last_occurrence(ids: Tensor) -> Tensor:
    """For each id [G] int64 the place of its last occurrence in ``ids``, [G] int64. No device sync.

    An indexed write with duplicate indices has no defined winner on CUDA. When every duplicate writes what its last
    occurrence holds, the order does not matter.
    """
    ordered, place = ids.sort(stable=True)
    return place[torch.searchsorted(ordered, ids, right=True) - 1]


def check_ids(ids: Tensor, num_samples: int) -> None:
    """See that ``ids`` are [N] int64 in 0..num_samples - 1. No device sync: on a GPU a wrong id ends the process.

    Raises:
        ValueError: they are not.
    """
    if ids.dim() != 1 or ids.dtype != torch.int64:
        raise ValueError(f"sample_id must be [N] int64, and is {list(ids.shape)} {ids.dtype}")
    is_inside = (ids >= 0) & (ids < num_samples)
    allowed = f"sample_id must be in 0..{num_samples - 1}"
    try:
        assert_async(is_inside.all(), allowed)  # later, and in the log of the device, on a GPU
    except RuntimeError:
        raise ValueError(f"{allowed}, and has {int(ids[~is_inside][0])}") from None


class ScoreStore:
    """A dense table [num_samples, C] of float32 on the device, 4 bytes a sample and column; NaN = never seen."""

    def __init__(self, num_samples: int, columns: tuple[str, ...], world: World) -> None:
        self.columns = columns
        self.world = world
        self.scores = torch.full((num_samples, len(columns)), torch.nan, device=world.device)

    def move_to(self, world: World) -> None:
        """Put the table on the device of ``world``."""
        self.world = world
        self.scores = self.scores.to(world.device)

    def read(self, ids: Tensor) -> Tensor:
        """The rows [N, C] of these ids [N] int64. Not collective."""
        return self.scores[ids]

    def write(self, ids: Tensor, values: Tensor) -> None:
        """Store [N, C] float32 under ids [N] int64, of all ranks on all ranks. N is equal on all ranks.

        Collective: one all_gather of N * (2 + C) int32. Where an id occurs more than once, the last occurrence on the
        last rank wins.
        """
        packed = torch.cat([ids.view(torch.int32).reshape(-1, 2), values.float().view(torch.int32)], dim=1)
        gathered = self.world.all_gather(packed)
        all_ids = gathered[:, :2].reshape(-1).view(torch.int64)
        all_values = gathered[:, 2:].contiguous().view(torch.float32)
        self.scores[all_ids] = all_values[last_occurrence(all_ids)]

    def state_dict(self) -> dict[str, Any]:
        """The table and the names of its columns."""
        return {"columns": self.columns, "scores": self.scores}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take over a saved table.

        Raises:
            ValueError: if it is of another size or has other columns.
        """
        if tuple(state["columns"]) != self.columns or state["scores"].shape != self.scores.shape:
            raise ValueError(
                f"saved scores {tuple(state['columns'])} {list(state['scores'].shape)} do not fit "
                f"{self.columns} {list(self.scores.shape)}"
            )
        self.scores.copy_(state["scores"])
