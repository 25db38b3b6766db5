"""What a training stream needs: a source of raw samples and, before decoding, a choice among them.

Shapes: N samples.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Protocol

from torch import Tensor

from dissect_clip.data.formats.decode import RawSample
from dissect_clip.data.sampling.bitmap import Bitmap
from dissect_clip.data.sampling.plan import Coverage
from dissect_clip.data.sampling.workers import WorkerInfo
from dissect_clip.data.skips import SkipCounter


class Samples(Protocol):
    """A worker's raw samples of one attempt, to be iterated once."""

    def __iter__(self) -> Iterator[RawSample]: ...

    @property
    def position(self) -> tuple[int, ...]:
        """What :meth:`Source.samples` needs to resume after the sample that was given last."""
        ...


class Source(Protocol):
    """Where a worker's raw samples come from. Picklable."""

    @property
    def coverage(self) -> Coverage:
        """What of the dataset an epoch reads."""
        ...

    @property
    def shuffle_buffer(self) -> int:
        """In how many samples a worker shuffles; 0 if rows are read in a shuffled order."""
        ...

    def samples(
        self, worker: WorkerInfo, epoch: int, attempt: int, skips: SkipCounter, position: tuple[int, ...]
    ) -> Samples:
        """The worker's samples of an epoch from ``position`` on, in an order that each attempt draws again.

        What lies before ``position`` is neither decoded nor counted.
        """
        ...

    def rest(self, visits: Bitmap, num_batches: int) -> Source:
        """The samples that are not in ``visits``, each once, as ``num_batches`` batches of each rank.

        Later attempts read the whole epoch's. Only with the coverage ``ONCE``.
        """
        ...

    def describe(self, worker: WorkerInfo, epoch: int) -> str:
        """The files that the samples come from, for a message."""
        ...


class Preselection(Protocol):
    """Which of N samples to decode."""

    @property
    def order(self) -> Tensor:
        """[N] int64, positions in the candidates, the most wanted first."""
        ...

    @property
    def count(self) -> int:
        """Number of samples wanted."""
        ...


class Preselector(Protocol):
    """Chooses which of the samples that were read are decoded. Picklable."""

    def __call__(self, ids: Tensor, once: Tensor, epoch: int, seed: int) -> Preselection:
        """``ids`` [N] int64; ``once`` [N] bool: whether this is the sample's only visit in the epoch."""
        ...
