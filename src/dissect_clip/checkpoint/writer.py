"""Checkpoints that are written while training goes on."""

from __future__ import annotations

import logging
import time
from concurrent.futures import Future, ThreadPoolExecutor, wait
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dissect_clip.checkpoint.format import Content, map_tensors
from dissect_clip.checkpoint.policy import Plan, Policy
from dissect_clip.checkpoint.write import save_checkpoint
from dissect_clip.errors import TrainingError

log = logging.getLogger(__name__)


class HostCopies:
    """Copies of tensors in main memory, which are kept and filled again; pinned ones of what is on a GPU."""

    def __init__(self) -> None:
        self._kept: dict[tuple[Any, ...], Tensor] = {}  # by the path to it
        self._pinned = False

    def take(self, value: Any) -> Any:
        """The same nested containers with copies of all tensors, valid until the next call. At most one device sync."""
        copied = map_tensors(value, self._copy)
        if self._pinned:
            torch.cuda.current_stream().synchronize()
        return copied

    def _copy(self, path: tuple[Any, ...], tensor: Tensor) -> Tensor:
        kept = self._kept.get(path)
        if kept is None or kept.shape != tensor.shape or kept.dtype != tensor.dtype:
            kept = torch.empty_like(tensor, device="cpu", pin_memory=tensor.is_cuda)
            self._kept[path] = kept
        self._pinned |= tensor.is_cuda
        return kept.copy_(tensor, non_blocking=True)


_PATIENCE = 1.0
"""Seconds that a save may wait for the one before without a word."""


class CheckpointWriter:
    """Saves checkpoints while training goes on; on rank 0, from one thread. See :func:`save_checkpoint` for the files.

    A save copies all tensors to main memory and returns; another thread writes them. Where that fails,
    ``--on-save-error`` decides: an error in the log and a new attempt at the next save, or a TrainingError.
    """

    def __init__(self, folder: Path, policy: Policy) -> None:
        self.folder = folder
        self.policy = policy
        self._failed = False
        self._last: Path | None = None
        self._copies = HostCopies()
        self._thread = ThreadPoolExecutor(1, "checkpoint")
        self._pending: Future[None] | None = None

    @property
    def failed(self) -> bool:
        """Whether the last save that came to an end could not be written; with --on-save-error continue."""
        return self._failed

    def save(self, plan: Plan, content: Content) -> None:
        """Copy all tensors, to be written as the checkpoints of a plan. A device sync.

        Waits for the save before.

        Args:
            plan: with at least one name.

        Raises:
            TrainingError: if the save before has failed, with ``--on-save-error stop``.
        """
        began = time.monotonic()
        self.wait()
        waited = time.monotonic() - began
        if waited > _PATIENCE:
            log.warning("Training waited %.0f s for the checkpoint before to be written: save less often", waited)
        pt, tensors = self._copies.take((content.pt, content.tensors))
        self._pending = self._thread.submit(self._write, plan, Content(pt, tensors, content.names))

    def wait(self) -> None:
        """Wait until what was saved is on the disk.

        Raises:
            TrainingError: if it could not be written, with ``--on-save-error stop``; once.
        """
        try:
            if self._pending is not None:
                self._pending.result()
        finally:
            self._pending = None

    def finish(self, seconds: float) -> None:
        """Wait up to so long for what is being written, whatever becomes of it; also while another thread waits."""
        if (pending := self._pending) is not None:
            wait([pending], seconds)

    def close(self) -> None:
        """:meth:`wait`, and end the thread."""
        try:
            self.wait()
        finally:
            self._thread.shutdown()

    def _write(self, plan: Plan, content: Content) -> None:
        try:
            self._last = save_checkpoint(self.folder, content, plan=plan, policy=self.policy)
        except TrainingError as error:
            if self.policy.settings.on_save_error == "stop":
                raise
            self._failed = True
            newest = self._last or "the one that this run began from, if any"
            log.error(
                "CHECKPOINT NOT SAVED: %s. Training goes on (--on-save-error continue) and tries again at the next "
                "save. The newest checkpoint is %s", error, newest,
            )  # fmt: skip
        else:
            self._failed = False
            log.info("Saved %s", self._last)
