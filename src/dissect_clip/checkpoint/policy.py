"""When a checkpoint is due, what it is called, and which older ones it replaces.

All of it is decided here, from the settings and the moment alone, so that every rank decides the same. Nothing here
touches a file.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass

from dissect_clip.config.settings import CheckpointSettings

LATEST = "epoch_latest"
"""Name, without .pt, of what ``--save-most-recent`` keeps."""

EpochStep = tuple[int, int]
"""Complete epochs, and inside an epoch the optimizer steps of the run, else 0. Rises as training proceeds."""

_NAME = re.compile(r"epoch_(\d+)(?:_step_(\d+))?")


def epoch_step_of(name: str) -> EpochStep | None:
    """What the name of a checkpoint, without .pt, says about it; None for epoch_latest and for other files."""
    match = _NAME.fullmatch(name)
    return None if match is None else (int(match[1]), int(match[2] or 0))


@dataclass(frozen=True, slots=True, kw_only=True)
class Moment:
    """A moment at which a run may save: after an optimizer step inside an epoch, or at the end of an epoch."""

    epoch: int  # complete epochs
    step: int  # optimizer steps of the run
    inside: bool  # an epoch: it goes on after this step
    minutes_over: bool = False  # --save-every-minutes have passed, by the clock of rank 0
    stopping: bool = False  # the run ends here


@dataclass(frozen=True, slots=True)
class Plan:
    """The checkpoints to write at a moment."""

    names: tuple[str, ...]  # without .pt; none if no checkpoint is due
    epoch_step: EpochStep

    def __bool__(self) -> bool:
        """Whether a checkpoint is due."""
        return bool(self.names)


@dataclass(frozen=True, slots=True)
class Policy:
    """Decides by the settings of a run."""

    settings: CheckpointSettings
    epochs: int  # of the run

    def minutes_over(self, seconds: float) -> bool:
        """Whether ``--save-every-minutes`` asks for a checkpoint so many seconds after the last was begun."""
        return 0 < self.settings.save_every_minutes <= seconds / 60

    def plan(self, moment: Moment) -> Plan:
        """What to write now.

        Inside an epoch a checkpoint is due by steps, by minutes, or because the run stops. At the end of an epoch
        ``--save-frequency`` decides; the last epoch is always saved. ``--save-most-recent`` adds epoch_latest. If an
        epoch ends that neither of them saves, what is due by steps or minutes is saved as inside an epoch.
        """
        if not moment.inside and (names := self._of_epoch(moment)):
            return Plan(names, (moment.epoch, 0))
        every = self.settings.save_every_n_steps
        due = moment.minutes_over or moment.stopping or (every > 0 and moment.step % every == 0)
        names = (f"epoch_{moment.epoch}_step_{moment.step}",) if due else ()
        return Plan(names, (moment.epoch, moment.step))

    def _of_epoch(self, moment: Moment) -> tuple[str, ...]:
        frequency, most_recent = self.settings.save_frequency, self.settings.save_most_recent
        kept = frequency > 0 and moment.epoch % frequency == 0
        kept |= moment.epoch == self.epochs or (moment.stopping and not most_recent)
        return (f"epoch_{moment.epoch}",) * kept + (LATEST,) * most_recent

    def replaced(self, plan: Plan, present: Iterable[str]) -> list[str]:
        """The names among those ``present`` to delete once the checkpoints of ``plan`` are complete.

        A newer checkpoint replaces all step checkpoints of earlier epochs. A step checkpoint replaces all others of its
        epoch, too: those with more steps are of smaller batches, or of an attempt that was abandoned. With
        ``--delete-previous-checkpoint`` one that is kept also replaces the newest of an earlier epoch's end.
        """
        epoch, step = plan.epoch_step
        found = [(epoch_step_of(name), name) for name in present]
        others = [(at, name) for at, name in found if at is not None and at != plan.epoch_step]
        replaced = [
            name
            for (its_epoch, its_step), name in others
            if its_step > 0 and (its_epoch < epoch or (its_epoch == epoch and step > 0))
        ]
        kept = plan.names[:1] != (LATEST,)
        earlier = [(at, name) for at, name in others if at[1] == 0 and at < plan.epoch_step]
        if self.settings.delete_previous_checkpoint and kept and earlier:
            replaced.append(max(earlier)[1])
        return replaced
