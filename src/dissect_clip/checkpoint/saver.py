"""Saves a run when a checkpoint is due: the states of its parts, copied and handed to the writer."""

from __future__ import annotations

import time
from collections.abc import Mapping
from types import TracebackType
from typing import Any

from dissect_clip.checkpoint.format import pack
from dissect_clip.checkpoint.policy import Moment, Plan, Policy
from dissect_clip.checkpoint.writer import CheckpointWriter
from dissect_clip.config.settings import Config
from dissect_clip.distributed.agreement import StepDecision
from dissect_clip.distributed.world import World
from dissect_clip.errors import Stopped, TrainingError
from dissect_clip.run.folder import RunFolder
from dissect_clip.run.remote_sync import NoSync, RemoteSync
from dissect_clip.run.stateful import Stateful
from dissect_clip.training.step import Counters


class Saver:
    """Saves checkpoints when they are due, on all ranks together; a context manager that waits for the last write.

    Without a run folder nothing is written.
    """

    def __init__(
        self,
        parts: Mapping[str, Stateful],
        counters: Counters,
        config: Config,
        world: World,
        folder: RunFolder | None,
        sync: RemoteSync | NoSync,
    ) -> None:
        self.parts = parts
        self.counters = counters
        self.config = config
        self.world = world
        self.folder = folder
        self.sync = sync
        self.policy = Policy(config.checkpoint, config.training.epochs)
        self.writer: CheckpointWriter | None = None
        self._plan = Plan((), (0, 0))
        self._minutes_over = False
        self._began = time.monotonic()  # of the last checkpoint
        if folder is not None and world.is_main:
            self.writer = CheckpointWriter(folder.checkpoints, self.policy)
            world.watchdog.before_exit = self.writer.finish

    def __enter__(self) -> Saver:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Raises TrainingError on rank 0 if the run ends well otherwise, but its last checkpoint was not written."""
        if self.writer is None:
            return
        self.writer.close()
        if self.writer.failed and (error is None or isinstance(error, Stopped)):
            raise TrainingError(
                f"the last checkpoint could not be written to {self.writer.folder}, see the error above: what was "
                "trained since the one before is lost. Make room, and go on with --resume latest"
            )

    def after_step(self, last: bool) -> StepDecision:
        """What all ranks do after an optimizer step, which may be the last of its epoch; equal on all ranks.

        To be called once for each step. If it orders a save, :meth:`save` is to follow. At the end of an epoch it
        never does, since :meth:`after_epoch` saves there.
        """
        decision = self.world.watchdog.poll(self.policy.minutes_over(time.monotonic() - self._began))
        self._minutes_over = decision.save
        self._decide(inside=not last, stopping=decision.stop is not None)
        return StepDecision(not last and bool(self._plan), decision.stop)

    def after_epoch(self, stopping: bool) -> None:
        """Save if a checkpoint is due at the end of an epoch. Collective; raises as :meth:`save` does."""
        self._decide(inside=False, stopping=stopping)
        if self._plan:
            self.save()

    def _decide(self, inside: bool, stopping: bool) -> None:
        counters = self.counters
        moment = Moment(
            epoch=counters.epoch,
            step=counters.step,
            inside=inside,
            minutes_over=self._minutes_over,
            stopping=stopping,
        )
        self._plan = self.policy.plan(moment)

    def save(self) -> None:
        """Save where the run is, as decided last. Collective.

        Raises:
            TrainingError: with --on-save-error stop, if the one before could not be written, or not be copied to
                --remote-sync.
        """
        self._began, self._minutes_over = time.monotonic(), False
        if self.folder is None:
            return
        self.world.watchdog.begin_phase("save", self.counters.step)
        states = {name: part.state_dict() for name, part in self.parts.items()}
        self.world.on_main(lambda: self._write(states))

    def _write(self, states: Mapping[str, Mapping[str, Any]]) -> None:
        assert self.writer is not None
        assert self.folder is not None
        if self.sync.failed is not None and self.config.checkpoint.on_save_error == "stop":
            raise TrainingError(f"{self.sync.failed} (--on-save-error stop); see that it can be reached, then resume")
        self.writer.save(self._plan, pack(states, self.parts, name=self.folder.name, model=self.config.model.model))
