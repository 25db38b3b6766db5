"""Decoys: samples that get a wrong caption on purpose, always the same one, for the first epochs of a run.

What a model makes of wrong pairs changes while it trains: at first it ignores them, then it learns them by heart.
Decoys go through the same, whatever that is, and so say what the scores of wrong pairs look like by then, as decoy
sequences do in the search for peptides (Elias and Gygi, Nature Methods 2007). A few thousand are enough for a data set
of any size.

Shapes: N pairs of this rank, P decoys, L tokens.
"""

from __future__ import annotations

import dataclasses

import torch
from torch import Tensor

from dissect_clip.batch import Batch
from dissect_clip.dist import World
from dissect_clip.seeding import Stream, derive_seed
from dissect_clip.selection.store import last_occurrence

MOST = 4096
"""Decoys, at most."""

_UNSET = -1


def decoy_ids(num_samples: int, share: float, seed: int) -> Tensor:
    """The ids [P] int64 of the decoys among so many samples, rising; the same wherever they are asked for."""
    count = min(MOST, round(share * num_samples))
    found: set[int] = set()
    number = 0
    while len(found) < count:
        found.add(derive_seed(seed, Stream.DECOYS, number) % num_samples)
        number += 1
    return torch.tensor(sorted(found), dtype=torch.int64)


class Decoys:
    """Gives the decoys among the samples of a batch their wrong captions.

    A decoy gets the caption of its neighbour in the batch in which it first comes, and keeps it for as long as there
    are decoys. In an epoch a sample comes on one rank alone: ranks need not know of each other's until it is over.
    """

    def __init__(self, ids: Tensor, world: World) -> None:
        self.ids = ids.to(world.device)  # [P] int64, rising
        self.world = world
        self._captions: Tensor | None = None  # [P + 1, L] int64; the last row is for those that are no decoys

    def __call__(self, batch: Batch) -> Batch:
        """A batch on the device with the decoys' captions in it. Not collective, no device sync."""
        if self._captions is None or self._captions.shape[1] != batch.text.shape[1]:  # or those of another tokenizer
            self._captions = batch.text.new_full((len(self.ids) + 1, batch.text.shape[1]), _UNSET)
        place, decoy = self._find(batch.sample_id)
        place = place.where(decoy, len(self.ids))
        known = self._captions[place]
        wrong = torch.where(known[:, :1] == _UNSET, batch.text.roll(1, dims=0), known)
        self._captions[place] = wrong.where(decoy[:, None], _UNSET)[last_occurrence(place)]
        return dataclasses.replace(batch, text=torch.where(decoy[:, None], wrong, batch.text))

    def _find(self, ids: Tensor) -> tuple[Tensor, Tensor]:
        place = torch.searchsorted(self.ids, ids).clamp(max=len(self.ids) - 1)
        return place, self.ids[place] == ids

    def among(self, ids: Tensor) -> Tensor:
        """Which of the samples ``ids`` [N] are decoys, [N] bool. Not collective, no device sync."""
        return self._find(ids)[1]

    def agree(self) -> None:
        """Let every rank know the captions of all. Collective: two all_reduces, of [P] and of [P, L]."""
        if self._captions is None or self.world.size == 1:
            return
        captions = self._captions[:-1]
        mine = captions[:, 0] != _UNSET
        # Of several ranks that know one, the last counts.
        owner = self.world.max(torch.where(mine, self.world.rank, -1))
        shared = self.world.sum(torch.where((owner == self.world.rank)[:, None], captions, 0))
        self._captions[:-1] = torch.where((owner >= 0)[:, None], shared, _UNSET)

    @property
    def captions(self) -> Tensor | None:
        """[P, L] int32, -1 in a row that has none yet; None before the first batch."""
        return None if self._captions is None else self._captions[:-1].int()

    def load(self, captions: Tensor) -> None:
        """Take over the ``captions`` [P, L] of an earlier run.

        Raises:
            ValueError: they are those of other decoys.
        """
        if len(captions) != len(self.ids):
            raise ValueError(f"{len(captions)} captions are no captions of {len(self.ids)} decoys")
        last = captions.new_full((1, captions.shape[1]), _UNSET)
        self._captions = torch.cat([captions, last]).long().to(self.ids.device)
