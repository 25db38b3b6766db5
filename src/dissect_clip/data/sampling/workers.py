"""The split of an epoch's batches over ranks and loader workers. Pure functions of numbers."""

from __future__ import annotations

from typing import NamedTuple

from torch.utils.data import get_worker_info


class WorkerInfo(NamedTuple):
    """A loader worker among all workers of the run."""

    rank: int
    world_size: int
    id: int  # in its rank
    num_workers: int  # per rank, at least 1

    @property
    def global_id(self) -> int:
        """Number of this worker among those of all ranks, rank by rank."""
        return self.rank * self.num_workers + self.id

    @property
    def total_workers(self) -> int:
        """Workers of all ranks."""
        return self.world_size * self.num_workers


def current_worker(rank: int, world_size: int) -> WorkerInfo:
    """The worker that calls this; the training process itself counts as the only worker."""
    info = get_worker_info()
    if info is None:
        return WorkerInfo(rank, world_size, 0, 1)
    return WorkerInfo(rank, world_size, info.id, info.num_workers)


def count_batches(num_samples: int, batch_size: int, world_size: int, accum_freq: int = 1) -> int:
    """Batches of a rank in an epoch: the samples, rounded up to whole optimizer steps of all ranks."""
    steps = -(-num_samples // (batch_size * world_size * accum_freq))
    return steps * accum_freq


def worker_batches(num_batches: int, worker: int, num_workers: int) -> int:
    """How many of a rank's batches a worker makes; torch's DataLoader takes them from the workers in turn."""
    return max(0, -(-(num_batches - worker) // num_workers))


def worker_span(num_batches: int, batch_size: int, worker: WorkerInfo) -> tuple[int, int]:
    """The first sample of a worker, and the first after its last, in the epoch's sequence of samples."""
    before = sum(worker_batches(num_batches, other, worker.num_workers) for other in range(worker.id))
    first = worker.rank * num_batches + before
    count = worker_batches(num_batches, worker.id, worker.num_workers)
    return first * batch_size, (first + count) * batch_size
