"""From a rank of the samples of a batch to the places of those that are kept.

Shapes: N pairs of this rank, K kept.
"""

from __future__ import annotations

import torch
from torch import Tensor


def top_k(rank: Tensor, k: int, generator: torch.Generator) -> Tensor:
    """Places [K] int64 of the k largest of ``rank`` [N], rising. Ties are broken at random; NaN and inf come last."""
    shuffled = torch.randperm(len(rank), generator=generator, device=rank.device)
    rank = torch.where(rank.isfinite(), rank.float(), -torch.inf)
    order = rank[shuffled].argsort(descending=True, stable=True)
    return shuffled[order[:k]].sort().values


def replace_unusable(index: Tensor, usable: Tensor) -> Tensor:
    """``index`` [K], rising, with each place that is not ``usable`` [N] bool replaced by a usable one, in turn.

    K is the same on all ranks whatever their batches hold, so usable samples are repeated when there are fewer than K.
    If no sample is usable, the choice stays as it is. No device sync.
    """
    usable_first = usable.float().argsort(descending=True, stable=True)
    turn = torch.arange(len(index), device=index.device) % usable.sum().clamp(min=1)
    replaced = torch.where(usable[index], index, usable_first[turn])
    return torch.where(usable.any(), replaced, index).sort().values
