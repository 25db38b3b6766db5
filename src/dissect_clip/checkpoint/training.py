"""Between a run and its checkpoints: what is saved of a training state, and how it is put back."""

from __future__ import annotations

import logging
import time
from types import TracebackType
from typing import Any

import torch

from dissect_clip.checkpoint import (
    Checkpoint,
    CheckpointWriter,
    Moment,
    Plan,
    Policy,
    RunState,
    SavedReference,
    Shards,
    changed_settings,
    check_fits,
    checkpoint_content,
    goes_on_with_reference,
)
from dissect_clip.data import TrainData
from dissect_clip.distributed.agreement import StepDecision
from dissect_clip.errors import SetupError, Stopped, TrainingError
from dissect_clip.run.folder import RunFolder
from dissect_clip.run.remote_sync import NoSync, RemoteSync
from dissect_clip.selection.mixins import memory_settings, survey_format
from dissect_clip.training.step import TrainState

log = logging.getLogger(__name__)


def run_state(state: TrainState, data: TrainData) -> RunState:
    config, counters, selection = state.config, state.counters, state.selection
    return RunState(
        step=counters.step,
        epoch_step=counters.epoch_step,
        steps_per_epoch=data.num_batches // config.training.accum_freq,
        batch=counters.batch,
        seen=counters.seen,
        trained=counters.trained,
        scored=counters.scored,
        seconds=dict(counters.seconds),
        seed=config.training.seed,
        model=config.model.model,
        strategy=None if selection is None else config.selection.select_strategy,
        select_rate=config.selection.select_rate,
        num_samples=data.num_samples,
        fingerprint=data.fingerprint,
        world_size=state.world.size,
        workers=config.data.workers,
        batch_size=config.training.batch_size,
        accum_freq=config.training.accum_freq,
        columns=() if selection is None else selection.store.columns,
        score_refresh=config.selection.score_refresh,
        select_before_load=config.selection.select_before_load,
        survey=() if selection is None else selection.survey,
        survey_of="" if selection is None else survey_format(selection.strategy),
        depends_on="" if selection is None else memory_settings(selection.strategy),
    )


def restore(state: TrainState, checkpoint: Checkpoint, data: TrainData, steps_per_epoch: int) -> None:
    """Put a run where the checkpoint left it; of bare weights or OpenCLIP's checkpoints what there is."""
    now = run_state(state, data)
    check_fits(
        checkpoint,
        model_name=now.model,
        model_state_dict=state.module.state_dict(),
        num_samples=now.num_samples,
        fingerprint=now.fingerprint,
        strategy=now.strategy,
        columns=now.columns,
        depends_on=now.depends_on or "",
        shards=Shards(data.shard_names, data.shard_sizes),
        reference_after=None if state.reference is None else state.reference.after,
    )
    state.module.load_state_dict(checkpoint.state_dict)
    state.buffers.snapshot()
    if checkpoint.optimizer is not None:
        state.optimizer.load_state_dict(_for_the_same_kernel(checkpoint.optimizer, state.optimizer))
    if state.scaler is not None and checkpoint.scaler is not None:
        state.scaler.load_state_dict(checkpoint.scaler)
    _resume_selection(state, checkpoint)
    _resume_reference(state, checkpoint)
    _resume_counters(state, checkpoint, data, steps_per_epoch)
    if checkpoint.state is not None:
        changes = changed_settings(checkpoint.state, now)
        if checkpoint.state.step != state.counters.step:
            changes.append(f"this is step {state.counters.step} now, was {checkpoint.state.step}")
        if changes:
            log.warning("The run goes on with other settings than it had: %s", "; ".join(changes))
    inside = f" and {state.counters.epoch_step} steps" if state.counters.epoch_step else ""
    log.info("Resumed from %s after %d epochs%s", checkpoint.path, state.counters.epoch, inside)


def _for_the_same_kernel(saved: dict[str, Any], optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    """A saved state whose groups do not say otherwise than ``optimizer`` whether it is fused, as OpenCLIP's do."""
    if "fused" not in optimizer.defaults:
        return saved
    fused = optimizer.defaults["fused"]
    return {**saved, "param_groups": [{**group, "fused": fused} for group in saved["param_groups"]]}


def _resume_reference(state: TrainState, checkpoint: Checkpoint) -> None:
    """The reference model that the run had, unless its weights are those of a file."""
    reference, saved = state.reference, checkpoint.reference
    if reference is None or saved is None:
        return
    if saved.weights is not None and goes_on_with_reference(checkpoint, reference.after):
        reference.load(saved.weights)
    if reference.after is None and saved.digest != reference.digest:
        log.warning("The run goes on with another reference model than it had: --select-reference has other weights")


def _resume_selection(state: TrainState, checkpoint: Checkpoint) -> None:
    """The table of the scores and what goes with it.

    Raises:
        SetupError: if these are not what the strategy keeps.
    """
    selection, then = state.selection, checkpoint.state
    if selection is None or then is None:
        return
    inside = checkpoint.loader is not None or then.epoch_step > 0
    own_decoys = then.seed == state.config.training.seed
    saved = {
        "strategy": then.strategy,
        "num_samples": then.num_samples,
        "columns": then.columns,
        "scores": checkpoint.scores,
        "depends_on": then.depends_on,
        # Between two epochs it is derived again before the next one.
        "survey": then.survey if inside else (),
        "survey_of": then.survey_of,
        "epoch": checkpoint.epoch if inside else checkpoint.epoch - 1,
        "step": then.batch,
        "world_size": then.world_size,
        "decoy_captions": checkpoint.decoys if own_decoys else None,
    }
    try:
        selection.load_state_dict(saved)
    except ValueError as error:
        raise SetupError(
            f"cannot resume from {checkpoint.path}: {error}. Resume with the strategy's flags as they were, or from "
            "the end of an epoch"
        ) from None


def _resume_counters(state: TrainState, checkpoint: Checkpoint, data: TrainData, steps_per_epoch: int) -> None:
    """Where the run is; with other batches or ranks the steps are counted so that epochs end where they would have."""
    counters, then = state.counters, checkpoint.state
    counters.epoch = checkpoint.epoch
    counters.step = checkpoint.epoch * steps_per_epoch
    if checkpoint.loader is not None:
        note = data.resume(checkpoint.loader, checkpoint.epoch)
        if note is not None:
            log.warning("%s", note)
        data.set_epoch(checkpoint.epoch)
        counters.step += steps_per_epoch - data.remaining_batches // state.config.training.accum_freq
    counters.batch = counters.step * state.config.training.accum_freq
    if then is not None:
        counters.epoch_step = then.epoch_step
        counters.seen, counters.trained, counters.scored = then.seen, then.trained, then.scored
        counters.seconds = dict(then.seconds)
        if state.selection is not None:
            state.selection.continue_at(counters.batch)


class Saver:
    """Saves checkpoints when they are due, on all ranks together; a context manager that waits for the last write.

    Without a run folder nothing is written.
    """

    def __init__(self, state: TrainState, data: TrainData, folder: RunFolder | None, sync: RemoteSync | NoSync) -> None:
        self.state = state
        self.data = data
        self.folder = folder
        self.sync = sync
        self.policy = Policy(state.config.checkpoint, state.config.training.epochs)
        self.writer: CheckpointWriter | None = None
        self._plan = Plan((), (0, 0))
        self._minutes_over = False
        self._began = time.monotonic()  # of the last checkpoint
        if folder is not None and state.world.is_main:
            self.writer = CheckpointWriter(folder.checkpoints, self.policy)
            state.world.watchdog.before_exit = self.writer.finish

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
        decision = self.state.world.watchdog.poll(self.policy.minutes_over(time.monotonic() - self._began))
        self._minutes_over = decision.save
        self._decide(inside=not last, stopping=decision.stop is not None)
        return StepDecision(not last and bool(self._plan), decision.stop)

    def after_epoch(self, stopping: bool) -> None:
        """Save if a checkpoint is due at the end of an epoch. Collective; raises as :meth:`save` does."""
        self._decide(inside=False, stopping=stopping)
        if self._plan:
            self.save()

    def _decide(self, inside: bool, stopping: bool) -> None:
        counters = self.state.counters
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
        state, world = self.state, self.state.world
        self._began, self._minutes_over = time.monotonic(), False
        if self.folder is None:
            return
        world.watchdog.begin_phase("save", state.counters.step)
        inside = state.counters.epoch_step > 0
        loader = self.data.state_dict() if inside else None
        # Collective, so not in what rank 0 does alone.
        selection = None if state.selection is None else state.selection.state_dict()
        world.on_main(lambda: self._save(loader, selection))

    def _save(self, loader: dict[str, Any] | None, selection: dict[str, Any] | None) -> None:
        assert self.writer is not None
        assert self.folder is not None
        state = self.state
        if self.sync.failed is not None and state.config.checkpoint.on_save_error == "stop":
            raise TrainingError(f"{self.sync.failed} (--on-save-error stop); see that it can be reached, then resume")
        content = checkpoint_content(
            name=self.folder.name,
            model=state.module.state_dict(),
            optimizer=state.optimizer.state_dict(),
            scaler=None if state.scaler is None else state.scaler.state_dict(),
            state=run_state(state, self.data),
            loader=loader,
            shards=Shards(self.data.shard_names, self.data.shard_sizes),
            reference=None if state.reference is None else SavedReference(*state.reference.saved()),
            decoys=None if selection is None else selection["decoy_captions"],
        )
        self.writer.save(self._plan, content, None if state.selection is None else state.selection.store)
