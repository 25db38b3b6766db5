"""What the packages below models use of torch that is private, or not exported under one name (checked: 2.15).

``Store``, ``PrefixStore`` and ``rendezvous`` are documented as ``torch.distributed.*``, but type checkers find them in
their own modules only. ``all_gather_single`` is the name of ``all_gather_into_tensor`` since torch 2.14, which
warns of the older one in every call.

``assert_async`` checks a condition on the device without waiting for it; it has a private name only.
"""

from __future__ import annotations

import torch.distributed as dist
from torch import _assert_async as assert_async
from torch.distributed.distributed_c10d import PrefixStore, Store
from torch.distributed.rendezvous import rendezvous

__all__ = ["PrefixStore", "Store", "all_gather_single", "assert_async", "rendezvous"]

all_gather_single = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
