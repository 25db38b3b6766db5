"""Batches on their way to the device, while it still works on the ones before."""

from __future__ import annotations

import torch

from dissect_clip.data.batch import Batch


class Transfer:
    """Copies batches to a device, and makes floats of their pixels there.

    On a GPU this happens on a separate stream, beside the computation of the step before: the host is ahead of the
    device by a step or more, so that the copy is done when its own step begins. Nothing waits on the host.
    """

    def __init__(self, device: torch.device, dtype: torch.dtype | None = None) -> None:
        self._device, self._dtype = device, dtype
        self._stream = torch.cuda.Stream(device) if device.type == "cuda" else None  # type: ignore[no-untyped-call]

    def __call__(self, batch: Batch) -> Batch:
        """The batch on the device; ``dtype`` is the image's. For work on the stream that is current now."""
        if self._stream is None:
            return batch.to(self._device, self._dtype)
        with torch.cuda.stream(self._stream):
            moved = batch.to(self._device, self._dtype)
        current = torch.cuda.current_stream(self._device)
        current.wait_stream(self._stream)
        for tensor in (moved.image, moved.text, moved.sample_id):
            tensor.record_stream(current)  # else its memory could be reused while the step still reads it
        return moved
