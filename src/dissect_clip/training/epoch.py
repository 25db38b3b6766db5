"""The epoch: load batches, take steps, log, save, and stop when a signal asks for it."""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Iterator
from typing import Protocol

import torch

from dissect_clip.data import TrainData
from dissect_clip.data.batch import Batch
from dissect_clip.data.transfer import Transfer
from dissect_clip.distributed.agreement import StepDecision
from dissect_clip.errors import Stopped, TrainingError
from dissect_clip.run.reporters import Reporter
from dissect_clip.training.metrics import LogInterval
from dissect_clip.training.step import TrainState, train_step
from dissect_clip.training.timer import PhaseClock

log = logging.getLogger(__name__)


def next_batch(batches: Iterator[Batch]) -> Batch | None:
    """The loader's next batch; None after the last.

    Raises:
        TrainingError: of a loader worker.
        RuntimeError: a loader worker was killed.
    """
    try:
        return next(batches, None)
    except TrainingError as error:  # torch puts the worker's traceback into the message
        raise TrainingError(str(error).rpartition("TrainingError: ")[2]) from None
    except (ConnectionError, EOFError) as error:  # it was killed while it sent a batch
        raise RuntimeError(f"DataLoader worker: {error!r}") from error


def batches_of_steps(state: TrainState, data: TrainData, clock: PhaseClock) -> Iterator[list[Batch]]:
    """The remaining batches of the epoch, on the device, ``accum_freq`` for each step. Not collective."""
    loader = iter(data.loader)
    transfer = Transfer(state.world.device, state.input_dtype)
    group: list[Batch] = []
    state.world.watchdog.begin_phase("load", state.counters.step)
    while (batch := next_batch(loader)) is not None:
        data.consume(batch)
        batch = transfer(batch)
        if state.selection is not None:  # before scoring and training, which both need the decoys' captions
            batch = dataclasses.replace(batch, text=state.selection.swap_captions(batch.sample_id, batch.text))
        group.append(batch)
        if len(group) == state.config.training.accum_freq:
            clock.lap("load")
            yield group
            group = []
            state.world.watchdog.begin_phase("load", state.counters.step)


class SavePoints(Protocol):
    """Decides after each step whether to save, and saves. Both are called on all ranks."""

    def after_step(self, last: bool) -> StepDecision:
        """What to do after a step, which may be the ``last`` of its epoch; called once for each step."""
        ...

    def save(self) -> None:
        """Save inside an epoch, as ordered."""
        ...


def train_epoch(
    state: TrainState, data: TrainData, reporter: Reporter, checkpoints: SavePoints | None = None
) -> str | None:
    """Train one epoch, or what is left of one; logs every ``--log-every-n-steps`` steps and at the end. Collective.

    Saves ``checkpoints`` inside the epoch when they are due; at its end the caller saves. Returns the name of a signal
    that asks to stop and came with the last step.

    Raises:
        Stopped: on all ranks at the same step, after a checkpoint, once any rank has received a signal to stop.
        TrainingError: on all ranks at the next log, after too many steps in a row that were not finite, or too many
            samples that could not be used; on one rank, if its loader fails.
    """
    counters, watchdog = state.counters, state.world.watchdog
    state.model.train()
    data.set_epoch(counters.epoch)
    first = counters.epoch_step  # above 0 in a run that resumes inside the epoch
    steps = first + data.remaining_batches // state.config.training.accum_freq
    if state.selection is not None:
        state.selection.start_epoch(counters.epoch)
    # Files of the epoch continue behind the step that the run resumes from; what was written later is cut off.
    state.recorder.begin(counters.epoch, first)
    state.skip_log.begin(counters.epoch, 0 if data.recounts_skips else first)
    clock = PhaseClock(state.world.device)
    if state.preselector is not None and state.selection is not None:
        # Before the loader's workers start: they choose by the scores of this moment throughout the epoch.
        state.preselector.publish(state.selection.store.scores, state.selection.survey)
    if state.reference is not None:
        state.reference.begin(counters.epoch, state.module)
    interval = LogInterval(state, data, steps, clock)
    signal = None
    with state.progress.epoch(counters.epoch, first) as progress:
        for batches in batches_of_steps(state, data, clock):
            outputs = train_step(state, batches, clock)
            progress.advance()
            done = counters.epoch_step
            last = done == steps
            if (done - 1) % state.config.run.log_every_n_steps == 0 or last:
                metrics = interval.close(outputs, batches)  # the only place where an epoch waits for the device
                progress.show(loss=metrics["loss"])
                reporter.train(counters.step, metrics)
            # All ranks get the same decision, so that they save and stop at the same step.
            decision = watchdog.poll(False) if checkpoints is None else checkpoints.after_step(last)
            signal = decision.stop
            if checkpoints is not None and decision.save:
                interval.count_seconds()
                save_inside(state, data, checkpoints)
                clock.start()
            if signal is not None and not last:
                raise Stopped(signal)
    state.recorder.end()
    state.skip_log.add(data.drain_skips())
    state.skip_log.end()
    counters.epoch += 1
    counters.epoch_step = 0
    warn_of_skips(state, data)
    return signal


def save_inside(state: TrainState, data: TrainData, checkpoints: SavePoints) -> None:
    """Save in the middle of an epoch: first the rows of its files, which the checkpoint relies on. Collective."""
    state.world.watchdog.begin_phase("save", state.counters.step)
    state.recorder.cut(state.counters.epoch_step)
    state.skip_log.add(data.drain_skips())
    state.skip_log.cut(state.counters.epoch_step)
    checkpoints.save()


def warn_of_skips(state: TrainState, data: TrainData) -> None:
    """Log how many samples of the epoch could not be used, by reason. Collective: one all_reduce if any can occur."""
    skipped = data.skip_counts()
    counts = (
        state.world.sum(torch.tensor(list(skipped.values()), device=state.world.device)).tolist() if skipped else []
    )
    named = {kind: count for kind, count in zip(skipped, counts, strict=True) if count}
    if named and state.world.is_main:
        log.warning("Skipped in this epoch, over all ranks: %s", ", ".join(f"{n} {kind}" for kind, n in named.items()))
