"""Decoys: samples that get a wrong caption on purpose, always the same one, for the first epochs of a run.

What a model makes of wrong pairs changes while it trains: at first it ignores them, then it learns them by heart.
Decoys go through the same, whatever that is, and so say what the scores of wrong pairs look like by then, as decoy
sequences do in the search for peptides (Elias and Gygi, Nature Methods 2007). A few thousand are enough for a data set
of any size.

Shapes: N pairs of this rank, P decoys, L tokens.
"""

from __future__ import annotations

import torch
from torch import Tensor

from dissect_clip.distributed.world import World
from dissect_clip.seeding import Stream, derive_seed
from dissect_clip.selection.store import last_occurrence

MOST = 4096
"""Decoys, at most."""

_UNSET = -1


def decoy_ids(num_samples: int, share: float, seed: int) -> Tensor:
    """The ids [P] int64 of the decoys among so many samples, rising; the same wherever they are asked for.

    With a list of samples to train on these are their numbers on the list.
    """
    count = min(MOST, round(share * num_samples))
    found: set[int] = set()
    number = 0
    while len(found) < count:
        found.add(derive_seed(seed, Stream.DECOYS, number) % num_samples)
        number += 1
    return torch.tensor(sorted(found), dtype=torch.int64)


class Decoys:
    """Gives the decoys among the samples of a batch their wrong captions.

    A decoy gets the own caption of the decoy that this rank met before it, and keeps it for as long as there are
    decoys. So no image is seen with its own caption while a decoy has that, too: beside its true image a wrong caption
    would be harder to learn by heart. The first decoy of a rank gets the caption of its neighbour in the batch.

    In an epoch a sample comes on one rank alone: ranks need not know of each other's until it is over.
    """

    def __init__(self, ids: Tensor, world: World) -> None:
        self.ids = ids.to(world.device)  # [P] int64, rising
        self.world = world
        self._captions: Tensor | None = None  # [P + 1, L] int64; the last row is for those that are no decoys
        self._last = torch.empty(0)  # [L] int64, the own caption of the decoy that this rank met last
        self._of_all: Tensor | None = None  # [P + W, L] int64, the captions of all ranks, and what they met last

    def move_to(self, world: World) -> None:
        """Put all tensors on the device of ``world``."""
        self.world = world
        self.ids, self._last = self.ids.to(world.device), self._last.to(world.device)
        self._captions = None if self._captions is None else self._captions.to(world.device)

    def swap_captions(self, sample_id: Tensor, text: Tensor) -> Tensor:
        """Captions [N, L] of ``sample_id`` [N] with those of the decoys replaced. Not collective, no device sync."""
        if self._captions is None or self._captions.shape[1] != text.shape[1]:  # or those of another tokenizer
            self._captions = text.new_full((len(self.ids) + 1, text.shape[1]), _UNSET)
            self._last = text.new_full((text.shape[1],), _UNSET)
        place, decoy = self._find(sample_id)
        place = place.where(decoy, len(self.ids))
        known = self._captions[place]
        wrong = torch.where(known[:, :1] == _UNSET, self._captions_before(text, place, decoy), known)
        self._captions[place] = wrong.where(decoy[:, None], _UNSET)[last_occurrence(place)]
        return torch.where(decoy[:, None], wrong, text)

    def _captions_before(self, text: Tensor, place: Tensor, decoy: Tensor) -> Tensor:
        """For each pair the own caption [N, L] of the decoy before it, if that is another; takes note of the last."""
        number = torch.arange(len(text), device=text.device).where(decoy, -1)
        upto = number.cummax(0).values
        before = torch.cat([number.new_full((1,), -1), upto[:-1]])
        other = (before >= 0) & (place[before.clamp(min=0)] != place)  # it may come twice
        last = torch.where(self._last[0] == _UNSET, text.roll(1, dims=0), self._last)
        found = torch.where(other[:, None], text[before.clamp(min=0)], last)
        # Indexing with a single number on the device would have the host wait for it.
        self._last = torch.where(upto[-1] >= 0, text.index_select(0, upto[-1:].clamp(min=0))[0], self._last)
        return found

    def _find(self, ids: Tensor) -> tuple[Tensor, Tensor]:
        place = torch.searchsorted(self.ids, ids).clamp(max=len(self.ids) - 1)
        return place, self.ids[place] == ids

    def among(self, ids: Tensor) -> Tensor:
        """Which of the samples ``ids`` [N] are decoys, [N] bool. Not collective, no device sync."""
        return self._find(ids)[1]

    def agree(self, adopt: bool = True) -> None:
        """Bring the captions of all ranks together. Collective: all_reduces of [P] and [P, L], an all_gather of [L].

        ``adopt``: go on with those of all. Inside an epoch that would make a difference to samples that come on two
        ranks, and a run that is saved there would go on otherwise than one that is not.
        """
        if self._captions is None:
            return
        lasts = self.world.all_gather(self._last[None])
        captions = self._captions[:-1]
        if self.world.size > 1:
            captions = self._union(captions)
        self._of_all = torch.cat([captions, lasts])
        if adopt:
            self._captions[:-1] = captions

    def _union(self, captions: Tensor) -> Tensor:
        mine = captions[:, 0] != _UNSET
        # Of several ranks that know one, the last counts.
        owner = self.world.max(torch.where(mine, self.world.rank, -1))
        shared = self.world.sum(torch.where((owner == self.world.rank)[:, None], captions, 0))
        return torch.where((owner >= 0)[:, None], shared, _UNSET)

    @property
    def captions(self) -> Tensor | None:
        """Of all ranks, by the last :meth:`agree`: [P + W, L] int32, -1 in a row that has none yet; None without any.

        Those of the decoys, then for each rank the own caption of the decoy that it met last.
        """
        return None if self._of_all is None else self._of_all.int()

    def load(self, captions: Tensor, ranks: int) -> bool:
        """Take over the ``captions`` [P + W, L] of a run with W ``ranks``; False where they are of other decoys."""
        count = len(self.ids)
        if len(captions) != count + ranks:
            return False
        captions = captions.long().to(self.ids.device)
        nothing = captions.new_full((1, captions.shape[1]), _UNSET)
        self._captions, lasts = torch.cat([captions[:count], nothing]), captions[count:]
        # With another number of ranks the rest of the epoch is laid out anew.
        self._last = lasts[self.world.rank] if len(lasts) == self.world.size else nothing[0]
        return True
