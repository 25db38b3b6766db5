"""How far loader workers are in an epoch, so that it can resume after a stop.

Shapes: P numbers of a worker's progress, V workers.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, slots=True)
class WorkerProgress:
    """A loader worker's progress after a batch: all that it needs to continue with its next."""

    worker: int  # in its rank
    attempt: int = 0  # how often its samples did not suffice for its batches
    usable: int = 0  # samples of this attempt that went into batches
    batches: int = 0  # made in this pass
    counts: tuple[int, ...] = ()  # samples skipped in this epoch, by the number of the kind
    position: tuple[int, ...] = ()  # of its source in this attempt; empty is the beginning

    def pack(self) -> Tensor:
        """[P] int64."""
        head = (self.worker, self.attempt, self.usable, self.batches, len(self.counts))
        return torch.tensor((*head, *self.counts, *self.position))

    @staticmethod
    def unpack(numbers: Sequence[int]) -> WorkerProgress:
        """The inverse of :meth:`pack`."""
        worker, attempt, usable, batches, kinds, *rest = numbers
        return WorkerProgress(worker, attempt, usable, batches, tuple(rest[:kinds]), tuple(rest[kinds:]))


def initial_progress(workers: int, attempt: int = 0) -> tuple[WorkerProgress, ...]:
    """The progress of workers that have not made a batch."""
    return tuple(WorkerProgress(worker, attempt) for worker in range(workers))


def pack_all(workers: Sequence[WorkerProgress]) -> Tensor:
    """V workers -> [sum of P + V] int64, the length of each before its numbers."""
    packed = [progress.pack() for progress in workers]
    return torch.cat([part for row in packed for part in (torch.tensor([len(row)]), row)])


def unpack_all(numbers: Tensor) -> list[WorkerProgress]:
    """[sum of P + V] int64 of one :func:`pack_all`, or several joined, -> V workers."""
    flat, workers = numbers.tolist(), []
    begin = 0
    while begin < len(flat):
        end = begin + 1 + flat[begin]
        workers.append(WorkerProgress.unpack(flat[begin + 1 : end]))
        begin = end
    return workers
