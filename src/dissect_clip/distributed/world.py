"""This process among those of the run, and the collectives that the rest of the code may call.

Legend: N rows of this rank, W ranks.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass, field
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from open_clip_train.distributed import is_using_distributed, set_device, world_info_from_env
from torch import Tensor

from dissect_clip.distributed.torch_compat import PrefixStore, Store, all_gather_single, rendezvous
from dissect_clip.distributed.watchdog import Watchdog
from dissect_clip.errors import SetupError

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
    watchdog: Watchdog = field(default_factory=Watchdog, compare=False, repr=False)

    @classmethod
    def of_default_group(cls, device: torch.device | str | None = None) -> World:
        """This process in the default process group, if one is initialised, without a watch over the ranks.

        Without ``device`` the current GPU if the group is NCCL's, which moves nothing else, and the CPU otherwise. Not
        collective.
        """
        if not dist.is_available() or not dist.is_initialized():
            return cls(device=torch.device("cpu" if device is None else device))
        if device is None:
            device = f"cuda:{torch.cuda.current_device()}" if "nccl" in dist.get_backend() else "cpu"
        device = torch.device(device)
        local_rank = 0 if device.index is None else device.index  # of the barrier, which wants the GPU's number
        return cls(dist.get_rank(), local_rank, dist.get_world_size(), device)

    @property
    def is_main(self) -> bool:
        """Whether this process writes the logs and checkpoints. Not collective."""
        return self.rank == 0

    def barrier(self) -> None:
        """Wait until every rank is here."""
        if self.size > 1:
            # A barrier on NCCL needs to know the device, else it guesses one and warns.
            with self.watchdog.wait_for_ranks():
                dist.barrier(device_ids=[self.local_rank] if self.device.type == "cuda" else None)

    def all_gather(self, rows: Tensor) -> Tensor:
        """[N, ...] of each rank, N equal on all ranks -> [W * N, ...], rank by rank."""
        if self.size == 1:
            return rows
        out = rows.new_empty((self.size * rows.shape[0], *rows.shape[1:]))
        with self.watchdog.wait_for_ranks():
            all_gather_single(out, rows.contiguous())
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
        with self.watchdog.wait_for_ranks():
            dist.all_reduce(total)
        return total

    def max(self, value: Tensor) -> Tensor:
        """The maximum over all ranks, elementwise; any shape, equal on all ranks."""
        if self.size == 1:
            return value
        largest = value.clone()
        with self.watchdog.wait_for_ranks():
            dist.all_reduce(largest, op=dist.ReduceOp.MAX)
        return largest

    def broadcast(self, value: T) -> T:
        """Rank 0's value, on every rank; any picklable object."""
        if self.size == 1:
            return value
        box: list[Any] = [value]
        with self.watchdog.wait_for_ranks():
            dist.broadcast_object_list(box, src=0, device=self.device)
        result: T = box[0]
        return result

    def copy_from_main(self, value: Tensor) -> None:
        """Overwrite a tensor with rank 0's, which has the same shape."""
        if self.size > 1:
            with self.watchdog.wait_for_ranks():
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


_FOREVER = timedelta(days=1)
"""Time limit of collectives: the watchdog ends a run, since it knows the state of the others."""

_BACKENDS = {"cuda": "nccl", "npu": "hccl", "hpu": "hccl", "xpu": "ccl"}  # as in OpenCLIP; gloo elsewhere


def _available(device: str) -> str:
    """The device asked for, or the CPU if this machine has none of its kind, as OpenCLIP does.

    Raises:
        SetupError: torch knows no such device.
    """
    try:
        kind = torch.device(device).type
    except RuntimeError as error:
        raise SetupError(f"--device {device} is no device of torch: give cuda or cpu, for instance") from error
    module = torch.backends.mps if kind == "mps" else getattr(torch, kind, None)  # absent if its extension is
    return device if module is not None and module.is_available() else "cpu"


def missing_device(device: str, world: World) -> str | None:
    """The kind of accelerator asked for, in capitals, if the run is on the CPU in its place; else None."""
    kind = torch.device(device).type
    return kind.upper() if world.device.type == "cpu" != kind else None


def init_world(
    device: str,
    backend: str | None = None,
    url: str | None = None,
    set_device_rank: bool = True,
    timeout: float = 600,
) -> World:
    """Join the process group that torchrun or Slurm describe in the environment; a single process joins none.

    The rules are those of OpenCLIP. The watchdog runs from here; after ``timeout`` seconds without progress it ends
    the run.

    Raises:
        SetupError: there is no such device, or the processes do not find each other.
    """
    device = _available(device)
    if not is_using_distributed():
        world = World(device=torch.device(device), watchdog=Watchdog(timeout=timeout))
        world.watchdog.start()
        return world
    local_rank, rank, size = world_info_from_env()
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(local_rank), "WORLD_SIZE": str(size)}  # also under Slurm
    kind = torch.device(device).type
    if set_device_rank and kind not in ("cpu", "mps"):
        device = f"{kind}:{local_rank}"
        set_device(device)
    watchdog = Watchdog(rank, size, timeout)
    try:
        # Two connections: a thread that waits for an answer holds its own.
        store, beats = (_meet(url or "env://", rank, size, timeout) for _ in range(2))
        watchdog.start(beats, store)
    except dist.DistError as error:
        raise SetupError(
            f"the {size} processes of the run did not find each other at {url or _master()}: "
            f"{str(error).partition(chr(10))[0]}. --rank-timeout {timeout:g} is how long they wait"
        ) from error
    dist.init_process_group(
        backend or _BACKENDS.get(kind, "gloo"),
        store=store,
        rank=rank,
        world_size=size,
        timeout=_FOREVER,
    )
    return World(rank, local_rank, size, torch.device(device), watchdog)


def _master() -> str:
    return f"MASTER_ADDR={os.environ.get('MASTER_ADDR')} MASTER_PORT={os.environ.get('MASTER_PORT')}"


def _meet(url: str, rank: int, size: int, timeout: float) -> Store:
    store: Store = next(rendezvous(url, rank, size, timeout=timedelta(seconds=timeout)))[0]
    store.set_timeout(_FOREVER)
    return PrefixStore("dissect_clip", store)


def is_loss_of_others(error: BaseException) -> bool:
    """Whether a collective failed, which says nothing of the cause: most often another process is gone."""
    # gloo raises a plain RuntimeError, with the path of its source in the message.
    return isinstance(error, dist.DistError) or (isinstance(error, RuntimeError) and "/gloo/" in str(error))


def shutdown_world() -> None:
    """Leave the process group, if one was joined."""
    if dist.is_available() and dist.is_initialized():
        dist.destroy_process_group()
