"""The processes of a run: who I am, and the collectives that the rest of the code may call.

Legend: N rows of this rank, W ranks.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from open_clip_train.distributed import init_distributed_device_so
from torch import Tensor

from dissect_clip.errors import SetupError
from dissect_clip.watch import Watch

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class World:
    """This process among those of the run. All methods are collective: every rank must call them in the same order.

    Without a process group (``size == 1``) they return their argument.
    """

    rank: int = 0
    local_rank: int = 0
    size: int = 1
    device: torch.device = torch.device("cpu")
    watch: Watch = field(default_factory=Watch, compare=False, repr=False)

    @property
    def is_main(self) -> bool:
        """Whether this process writes the logs and checkpoints. Not collective."""
        return self.rank == 0

    def barrier(self) -> None:
        """Wait until every rank is here."""
        if self.size > 1:
            # A barrier on NCCL needs to know the device, else it guesses one and warns.
            dist.barrier(device_ids=[self.local_rank] if self.device.type == "cuda" else None)

    def all_gather(self, rows: Tensor) -> Tensor:
        """[N, ...] of each rank, N equal on all ranks -> [W * N, ...], rank by rank."""
        if self.size == 1:
            return rows
        out = rows.new_empty((self.size * rows.shape[0], *rows.shape[1:]))
        dist.all_gather_into_tensor(out, rows.contiguous())
        return out

    def all_gather_uneven(self, rows: Tensor) -> Tensor:
        """[N, ...] of each rank, N of any size and the other dimensions equal -> [sum of N, ...], rank by rank.

        Reads the sizes back from the device (a sync): not for the training step.
        """
        if self.size == 1:
            return rows
        counts = self.all_gather(torch.tensor([rows.shape[0]], device=rows.device)).tolist()
        padded = rows.new_zeros((max(counts), *rows.shape[1:]))
        padded[: rows.shape[0]] = rows
        blocks = self.all_gather(padded).reshape(self.size, *padded.shape)
        return torch.cat([block[:count] for block, count in zip(blocks, counts, strict=True)])

    def sum(self, value: Tensor) -> Tensor:
        """The sum over all ranks, elementwise; any shape, equal on all ranks."""
        if self.size == 1:
            return value
        total = value.clone()
        dist.all_reduce(total)
        return total

    def max(self, value: Tensor) -> Tensor:
        """The maximum over all ranks, elementwise; any shape, equal on all ranks."""
        if self.size == 1:
            return value
        largest = value.clone()
        dist.all_reduce(largest, op=dist.ReduceOp.MAX)
        return largest

    def broadcast(self, value: T) -> T:
        """Rank 0's value, on every rank; any picklable object."""
        if self.size == 1:
            return value
        box: list[Any] = [value]
        dist.broadcast_object_list(box, src=0, device=self.device)
        result: T = box[0]
        return result

    def copy_from_main(self, value: Tensor) -> None:
        """Overwrite a tensor with rank 0's, which has the same shape."""
        if self.size > 1:
            dist.broadcast(value, src=0)

    def on_main(self, work: Callable[[], T]) -> T:
        """Run ``work`` on rank 0 and give its result to every rank.

        Raises:
            Exception: what ``work`` raised, as a SetupError on the other ranks, so that no rank is left waiting.
        """
        result: T | None = None
        error: Exception | None = None
        if self.is_main:
            try:
                result = work()
            except Exception as exception:
                error = exception
        message = self.broadcast(None if error is None else (str(error) or repr(error)))
        if error is not None:
            raise error
        if message is not None:
            raise SetupError(message)
        value: T = self.broadcast(result)  # type: ignore[assignment]
        return value


def init_world(device: str, backend: str | None = None, url: str | None = None, set_device_rank: bool = True) -> World:
    """Join the process group that torchrun or Slurm describe in the environment; a single process joins none.

    Falls back to the CPU with a warning where ``device`` is not available, as OpenCLIP does.
    """
    found = init_distributed_device_so(
        device=device, dist_backend=backend, dist_url=url, no_set_device_rank=not set_device_rank
    )
    return World(
        rank=found["global_rank"],
        local_rank=found["local_rank"],
        size=found["world_size"],
        device=torch.device(found["device"]),
    )


def shutdown_world() -> None:
    """Leave the process group, if one was joined."""
    if dist.is_available() and dist.is_initialized():
        dist.destroy_process_group()
