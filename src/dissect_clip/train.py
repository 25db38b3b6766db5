"""The training step and the epoch around it.

A step: select the part of each batch that is worth it, compute the loss on that part, update. With
``--accum-freq`` above 1 the selected parts of several batches make one contrastive batch: their features are computed
without gradient first, then each part once more with gradient against the features of the others (Gao et al., 2021).

Shapes: N pairs of this rank as loaded, K of them kept, W ranks.
"""

from __future__ import annotations

import contextlib
import functools
import logging
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from dissect_clip.batch import Batch
from dissect_clip.clock import PHASES, PhaseClock
from dissect_clip.config import Config
from dissect_clip.data import TrainData
from dissect_clip.dist import World
from dissect_clip.errors import TrainingError
from dissect_clip.logs import Progress, Reporter
from dissect_clip.model import Autocast, Scorer
from dissect_clip.optim import optimizer_step, set_learning_rate
from dissect_clip.record import NullRecorder, Recorder
from dissect_clip.schedule import Schedule
from dissect_clip.seeding import Stream, derive_seed, seed_everything
from dissect_clip.selection import Selector

MAX_LOG_LOGIT_SCALE = math.log(100)
"""The logit scale is kept from growing past 100 (Radford et al., 2021, section 2.5)."""

_NOT_FEATURES = ("logit_scale", "logit_bias")

log = logging.getLogger(__name__)


@dataclass
class Counters:
    """How far training is. Samples are counted over all ranks; saved in checkpoints."""

    epoch: int = 0  # completed epochs
    step: int = 0  # optimizer steps
    batch: int = 0  # batches of this rank, accum_freq for each step
    seen: int = 0  # samples loaded, and scored where the strategy scores
    trained: int = 0  # samples that the loss was computed on
    seconds: dict[str, float] = field(default_factory=lambda: dict.fromkeys(PHASES, 0.0))  # of this rank, by phase

    def state_dict(self) -> dict[str, Any]:
        """Plain numbers."""
        return {**vars(self), "seconds": dict(self.seconds)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take over saved counters."""
        for name in vars(self):
            setattr(self, name, state[name])


@dataclass
class TrainState:
    """All that a training step touches."""

    config: Config
    world: World
    module: nn.Module  # the open_clip model
    model: nn.Module  # the same, as called in training: wrapped and compiled as asked
    teacher: nn.Module | None
    loss: nn.Module
    optimizer: torch.optim.Optimizer
    scaler: torch.amp.GradScaler | None
    schedule: Schedule
    autocast: Autocast
    input_dtype: torch.dtype | None
    selector: Selector | None
    scorer: Scorer
    recorder: Recorder | NullRecorder
    counters: Counters = field(default_factory=Counters)


def train_step(state: TrainState, batches: Sequence[Batch], clock: PhaseClock) -> dict[str, Tensor]:
    """One optimizer step on ``accum_freq`` batches of this rank, which are on the device. No device sync.

    Returns the losses by name, with their sum as ``loss``, and ``logit_scale``: scalars on the device, detached.
    """
    config, counters = state.config, state.counters
    seed_everything(derive_seed(config.seed, Stream.MODEL, counters.step, state.world.rank))
    if not config.skip_scheduler:
        set_learning_rate(state.optimizer, state.schedule(counters.step))
    chosen = [_select(state, batch) for batch in batches]
    clock.lap("score")
    state.optimizer.zero_grad(set_to_none=True)
    outputs = _forward_backward(state, chosen[0]) if len(chosen) == 1 else _accumulate(state, chosen)
    clock.lap("train")
    optimizer_step(state.optimizer, state.scaler, state.module.parameters(), config.grad_clip_norm)
    with torch.no_grad():
        state.module.logit_scale.clamp_(0, MAX_LOG_LOGIT_SCALE)  # type: ignore[operator]
    clock.lap("optimizer")
    counters.step += 1
    return outputs


def _select(state: TrainState, batch: Batch) -> Batch:
    """The part of a batch that is trained on; the whole batch without ``--select``."""
    counters = state.counters
    chosen = batch
    if state.selector is not None:
        selection = state.selector.select(batch, state.scorer, counters.epoch, counters.batch)
        state.recorder.append(batch, selection)
        chosen = batch.take(selection.index)
    counters.batch += 1
    counters.seen += len(batch) * state.world.size
    counters.trained += len(chosen) * state.world.size
    return chosen


def _backward(state: TrainState, losses: dict[str, Tensor], logit_scale: Tensor) -> dict[str, Tensor]:
    total = functools.reduce(torch.add, losses.values())
    scaled: Tensor = total if state.scaler is None else state.scaler.scale(total)
    scaled.backward()  # type: ignore[no-untyped-call]
    outputs = {**losses, "loss": total, "logit_scale": logit_scale}
    return {name: value.detach() for name, value in outputs.items()}


def _forward_backward(state: TrainState, batch: Batch) -> dict[str, Tensor]:
    with state.autocast():
        out = state.model(batch.image, batch.text)
        if state.teacher is not None:
            with torch.no_grad():
                taught = state.teacher(batch.image, batch.text)
            out |= {f"dist_{name}": value for name, value in taught.items()}
        losses = state.loss(**out, output_dict=True)
    return _backward(state, losses, out["logit_scale"])


def _accumulate(state: TrainState, batches: Sequence[Batch]) -> dict[str, Tensor]:
    with torch.no_grad(), state.autocast():
        cached = [state.module(batch.image, batch.text) for batch in batches]
    outputs: dict[str, Tensor] = {}
    for place, batch in enumerate(batches):
        with _sync_gradients(state.model, place == len(batches) - 1):
            with state.autocast():
                out = state.model(batch.image, batch.text)
                parts = [*cached[:place], out, *cached[place + 1 :]]
                features = {
                    name: torch.cat([part[name] for part in parts]) for name in out if name not in _NOT_FEATURES
                }
                scalars = {name: out[name] for name in _NOT_FEATURES if name in out}
                losses = state.loss(**features, **scalars, output_dict=True)
            outputs = _backward(state, losses, out["logit_scale"])
    return outputs


def _sync_gradients(model: nn.Module, now: bool) -> contextlib.AbstractContextManager[Any]:
    """Let DDP reduce the gradients over the ranks in this backward pass, or hold them back for a later one."""
    inner = model._orig_mod if hasattr(model, "_orig_mod") else model
    if now or not isinstance(inner, DistributedDataParallel):
        return contextlib.nullcontext()
    return inner.no_sync()


def _batches(state: TrainState, data: TrainData, clock: PhaseClock) -> Iterator[list[Batch]]:
    """The epoch's batches on the device, ``accum_freq`` at a time."""
    group: list[Batch] = []
    for batch in data.loader:
        group.append(batch.to(state.world.device, state.input_dtype))
        if len(group) == state.config.accum_freq:
            clock.lap("load")
            yield group
            group = []


def train_epoch(state: TrainState, data: TrainData, reporter: Reporter) -> None:
    """Train one epoch; logs every ``--log-every-n-steps`` steps and at the end.

    Raises:
        TrainingError: on all ranks at the next log, once a loss has not been finite on any rank.
    """
    state.model.train()
    data.set_epoch(state.counters.epoch)
    state.recorder.begin(state.counters.epoch)
    steps = data.num_batches // state.config.accum_freq
    clock = PhaseClock(state.world.device)
    window = Window(state, steps, clock)
    with Progress(state.world, steps, f"Epoch {state.counters.epoch}") as progress:
        for done, batches in enumerate(_batches(state, data, clock), start=1):
            outputs = train_step(state, batches, clock)
            window.add(outputs)
            progress.advance()
            if (done - 1) % state.config.log_every_n_steps == 0 or done == steps:
                metrics = window.close(done, outputs)
                progress.show(loss=metrics["loss"])
                reporter.train(state.counters.step, metrics)
    state.recorder.end()
    _share_buffers(state)
    state.counters.epoch += 1
    _report_skipped(state, data)


def _share_buffers(state: TrainState) -> None:
    """Give all ranks rank 0's BatchNorm statistics.

    DDP does so before every forward pass, so after the last one they differ. Evaluation would then depend on the rank,
    and a resumed run, where all ranks load rank 0's, would not go on as if it had never stopped.
    """
    for buffer in state.module.buffers():
        state.world.copy_from_main(buffer)


def _report_skipped(state: TrainState, data: TrainData) -> None:
    skipped = data.skipped()
    counts = (
        state.world.sum(torch.tensor(list(skipped.values()), device=state.world.device)).tolist() if skipped else []
    )
    named = {kind: count for kind, count in zip(skipped, counts, strict=True) if count}
    if named and state.world.is_main:
        log.warning("Skipped in this epoch, over all ranks: %s", ", ".join(f"{n} {kind}" for kind, n in named.items()))


class Window:
    """The steps between two logs: checks their losses and turns them into metrics. Reads the device at its end only."""

    def __init__(self, state: TrainState, steps: int, clock: PhaseClock) -> None:
        self.state = state
        self.steps = steps
        self.clock = clock
        self.base = dict(state.counters.seconds)
        self._open()

    def _open(self) -> None:
        self.first_step = self.state.counters.step
        self.seconds = dict(self.state.counters.seconds)
        self.seen = self.state.counters.seen
        self.not_finite = torch.zeros((), device=self.state.world.device)

    def add(self, outputs: dict[str, Tensor]) -> None:
        """Note a step's losses, on the device."""
        self.not_finite += ~outputs["loss"].isfinite()

    def close(self, done: int, outputs: dict[str, Tensor]) -> dict[str, float]:
        """Metrics of the steps since the last close, with the losses of the last step, and a line in the log.

        Collective: one all_reduce. ``done`` is the number of steps of the epoch that are done.
        """
        counters = self.state.counters
        values = {name: value.item() for name, value in outputs.items()}
        bad = int(self.state.world.sum(self.not_finite).item())
        totals = self.clock.totals()
        counters.seconds = {phase: self.base[phase] + totals[phase] for phase in PHASES}
        if bad:
            raise TrainingError(self._explain(bad, values))
        spent = {phase: counters.seconds[phase] - self.seconds[phase] for phase in PHASES}
        count = max(1, counters.step - self.first_step)
        batch_time = sum(spent.values()) / count
        per_second = (counters.seen - self.seen) / max(sum(spent.values()), 1e-9)
        metrics = {
            "data_time": spent["load"] / count,
            "batch_time": batch_time,
            "samples_per_second": per_second,
            "samples_per_second_per_gpu": per_second / self.state.world.size,
            "scale": values.pop("logit_scale"),
            "lr": self.state.optimizer.param_groups[0]["lr"],
            **values,
            **{f"{phase}_time": spent[phase] / count for phase in PHASES if phase != "load"},
            **{f"{phase}_seconds": counters.seconds[phase] for phase in PHASES},
            "seen": counters.seen,
            "trained": counters.trained,
            "epoch": counters.epoch + done / self.steps,
        }
        self._log(done, metrics, list(values))
        self._open()
        return metrics

    def _log(self, done: int, metrics: dict[str, float], losses: list[str]) -> None:
        counters = self.state.counters
        named = " ".join(f"{name.capitalize()}: {metrics[name]:#.5g}" for name in losses)
        log.info(
            f"Train Epoch: {counters.epoch} [{done}/{self.steps} ({100 * done / self.steps:.0f}%)] "
            f"Load {metrics['data_time']:.3f} Score {metrics['score_time']:.3f} Train {metrics['train_time']:.3f} "
            f"Batch (t): {metrics['batch_time']:.3f}, {metrics['samples_per_second']:#g}/s, "
            f"{metrics['samples_per_second_per_gpu']:#g}/s/gpu Seen: {counters.seen} Trained: {counters.trained} "
            f"LR: {metrics['lr']:5g} Logit Scale: {metrics['scale']:.3f} {named}"
        )

    def _explain(self, bad: int, values: dict[str, float]) -> str:
        config = self.state.config
        return (
            f"the loss was not finite in {bad} of the steps {self.first_step} to {self.state.counters.step - 1} "
            f"(counted over all ranks; last loss {values['loss']:g}, logit scale {values['logit_scale']:g}, learning "
            f"rate {self.state.optimizer.param_groups[0]['lr']:g}). Look at --lr {config.lr} and --warmup "
            f"{config.warmup} (too steep a start), --precision {config.precision} (try amp_bf16 or fp32), "
            "--grad-clip-norm (try 1.0), and at the data of these steps. --resume latest continues from the last "
            "checkpoint, which was written before."
        )
