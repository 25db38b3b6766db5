"""torch loaders of batches that streams make whole, and the end of their worker processes."""

from __future__ import annotations

import atexit
import weakref
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader, IterableDataset

from dissect_clip.distributed.signals import leave_to_the_parent
from dissect_clip.distributed.world import World
from dissect_clip.models.openclip_compat import shut_down_workers

Transform = Callable[[Any], Tensor]
"""PIL image -> [3, H, W] float."""
Tokenizer = Callable[[list[str]], Tensor]
"""N texts -> [N, L] int64."""


def make_loader(stream: IterableDataset[Any], workers: int, world: World) -> DataLoader[Any]:
    """A loader of a stream's whole batches, in ``workers`` processes that stay alive between epochs."""
    loader: DataLoader[Any] = DataLoader(
        stream,
        batch_size=None,
        num_workers=workers,
        persistent_workers=workers > 0,
        pin_memory=world.device.type == "cuda",
        # Without its own generator the loader draws a seed from the training process's in every epoch.
        generator=torch.Generator(),
        worker_init_fn=leave_to_the_parent,
    )
    atexit.register(_end_workers, weakref.ref(loader))
    return loader


def _end_workers(reference: weakref.ref[DataLoader[Any]]) -> None:
    """End the workers of a loader that still exists when Python exits, as after an error.

    Python itself would send them one SIGTERM, which they leave to the training process, and wait forever.
    """
    loader = reference()
    if loader is not None:
        shut_down_workers(loader)
