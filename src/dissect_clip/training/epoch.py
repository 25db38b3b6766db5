"""The training step and the epoch around it.

A step: select the part of each batch that is worth it, compute the loss on that part, update. With
``--accum-freq`` above 1 the selected parts of several batches make one contrastive batch: their features are computed
without gradient first, then each part once more with gradient against the features of the others (Gao et al., 2021).

Shapes: N pairs of this rank as loaded, K of them kept, W ranks.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import logging
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from dissect_clip.config.settings import Config
from dissect_clip.data import TrainData
from dissect_clip.data.batch import Batch
from dissect_clip.data.skip_log import SkipLog
from dissect_clip.data.transfer import Transfer
from dissect_clip.distributed.watchdog import StepDecision
from dissect_clip.distributed.world import World
from dissect_clip.errors import Stopped, TrainingError
from dissect_clip.models.loss import loss_against_all, weighted_loss
from dissect_clip.models.openclip_compat import uncompiled
from dissect_clip.models.parallel import RunningBuffers
from dissect_clip.models.precision import Autocast
from dissect_clip.run.console import NOT_ON_TERMINAL, Progress
from dissect_clip.run.reporters import Reporter
from dissect_clip.seeding import Stream, derive_seed, seed_everything
from dissect_clip.selection import Choice, Preselector, Selection
from dissect_clip.training.optimizer import optimizer_step, set_learning_rate
from dissect_clip.training.record import NullRecorder, Recorder
from dissect_clip.training.reference import Reference
from dissect_clip.training.schedule import Schedule
from dissect_clip.training.scoring import Encoded, Scorer
from dissect_clip.training.timer import PHASES, PhaseClock

MAX_LOG_LOGIT_SCALE = math.log(100)
"""The logit scale is kept from growing past 100 (Radford et al., 2021, section 2.5)."""

_NOT_FEATURES = ("logit_scale", "logit_bias")

_RANKS_KEPT = 4
"""Of how many ranks a batch is saved where training ends in steps that are not finite."""

Scoring = Callable[[Batch], Encoded]
"""A scoring pass: the features of a batch, without gradients."""

log = logging.getLogger(__name__)


@dataclass
class Counters:
    """How far training is. Samples are counted over all ranks."""

    epoch: int = 0  # completed epochs
    epoch_step: int = 0  # optimizer steps done in the epoch after them
    step: int = 0  # optimizer steps
    batch: int = 0  # batches of this rank, accum_freq for each step
    seen: int = 0  # samples read, decoded but where --select-before-load leaves them out
    trained: int = 0  # samples that the loss was computed on
    scored: int = 0  # samples that had a scoring pass
    seconds: dict[str, float] = field(default_factory=lambda: dict.fromkeys(PHASES, 0.0))  # of this rank, by phase


class Tally:
    """What was not finite since the last reading, counted on the device."""

    def __init__(self, device: torch.device) -> None:
        self._steps = torch.zeros((), dtype=torch.int64, device=device)
        self._samples = torch.zeros((), dtype=torch.int64, device=device)
        self._run = torch.zeros((), dtype=torch.int64, device=device)

    def add_samples(self, *features: Tensor) -> None:
        """Count the rows [K, ...] whose features are not finite."""
        for part in features:
            self._samples += (~part.detach().flatten(1).isfinite().all(dim=1)).sum()

    def add_step(self, finite: Tensor) -> None:
        """Count an optimizer step; ``finite`` is a scalar bool: whether its loss and gradient were."""
        self._steps += ~finite
        self._run = torch.where(finite, 0, self._run + 1)

    def read(self) -> Tensor:
        """[3] int64 on the device: steps, steps in a row up to now, samples; begins to count anew, but for the row."""
        counts = torch.stack([self._steps, self._run, self._samples])
        self._steps, self._samples = torch.zeros_like(self._steps), torch.zeros_like(self._samples)
        return counts


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
    selection: Selection | None
    scorer: Scorer
    buffers: RunningBuffers
    recorder: Recorder | NullRecorder
    skip_log: SkipLog
    tally: Tally
    preselector: Preselector | None
    reference: Reference | None  # only with strategies that need one
    folder: Path | None  # of the run
    counters: Counters = field(default_factory=Counters)
    progress: Progress = field(default_factory=lambda: Progress(shown=False))


def train_step(state: TrainState, batches: Sequence[Batch], clock: PhaseClock) -> dict[str, Tensor]:
    """One optimizer step on ``accum_freq`` batches of this rank, which are on the device. No device sync.

    Returns the losses by name, with their sum as ``loss``, and ``logit_scale``: scalars on the device, detached.
    """
    config, counters, watchdog = state.config, state.counters, state.world.watchdog
    seed_everything(derive_seed(config.training.seed, Stream.MODEL, counters.step, state.world.rank))
    if not config.training.skip_scheduler:
        set_learning_rate(state.optimizer, state.schedule(counters.step))
    watchdog.begin_phase("score", counters.step)
    chosen = [_select(state, batch) for batch in batches]
    clock.lap("score")
    watchdog.begin_phase("train", counters.step)
    state.optimizer.zero_grad(set_to_none=True)
    outputs = _forward_backward(state, chosen[0]) if len(chosen) == 1 else _accumulate(state, chosen)
    clock.lap("train")
    watchdog.begin_phase("optimizer", counters.step)
    finite = optimizer_step(state.optimizer, state.scaler, state.module.parameters(), config.training.grad_clip_norm)
    with torch.no_grad():
        state.module.logit_scale.clamp_(0, MAX_LOG_LOGIT_SCALE)  # type: ignore[operator]
    finite = finite & outputs["loss"].isfinite()
    state.buffers.synchronise(finite)
    state.tally.add_step(finite)
    clock.lap("optimizer")
    counters.step += 1
    counters.epoch_step += 1
    return outputs


class Chosen(NamedTuple):
    """The part of a batch that is trained on; the whole batch without ``--select``."""

    batch: Batch
    choice: Choice | None
    locked: dict[str, Tensor]  # features [K, D] of locked towers, which training need not compute again
    others: Tensor | None  # [N - K, 2 D], features of the pairs that are not trained on, with --select-negatives all


def score_and_choose(
    selection: Selection, batch: Batch, scorer: Scoring, reference: Scoring | None, step: int
) -> tuple[Choice, Encoded | None]:
    """The rows of a batch to train on, and the features of the scoring pass, if there was one.

    Collective as :meth:`Selection.choose` is. No device sync. ``step`` counts the batches of the whole run.
    """
    rows = selection.rows_to_score(batch.sample_id, step=step, num_candidates=batch.num_candidates)
    parts: dict[str, Tensor | None] = {}
    encoded = None
    if len(rows) > 0:
        # Taking all rows would be a copy of the images.
        scored = batch if len(rows) == len(batch) else batch.take(rows)
        with torch.no_grad():
            encoded = scorer(scored)
            parts = encoded.parts()
            if selection.needs_reference:
                assert reference is not None, "strategies with a reference get one when the run is built"
                parts |= {f"reference_{name}": part for name, part in reference(scored).parts().items()}
    return selection.choose(batch.sample_id, **parts, step=step, num_candidates=batch.num_candidates), encoded


def unselected_features(encoded: Encoded, choice: Choice) -> Tensor:
    """Features [N - K, 2 D] of the pairs that are not at ``choice.index``; 0 for those without finite scores."""
    usable = choice.usable
    assert usable is not None, "the choice was made by scores"
    chosen = torch.zeros_like(usable, dtype=torch.uint8).index_fill_(0, choice.index, 1)
    places = chosen.argsort(stable=True)[: len(usable) - len(choice.index)]
    features = torch.cat([encoded.image_features, encoded.text_features], dim=1)
    return features.where(usable[:, None], 0)[places]


def _select(state: TrainState, batch: Batch) -> Chosen:
    counters, settings = state.counters, state.config.selection
    chosen = Chosen(batch, None, {}, None)
    if state.selection is not None:
        choice, encoded = score_and_choose(state.selection, batch, state.scorer, state.reference, counters.batch)
        state.recorder.append(batch, choice)
        locked, others = {}, None
        if encoded is not None and settings.score_keep_locked:
            locked = encoded.locked(choice.index)
        if encoded is not None and settings.select_negatives == "all" and len(choice.index) < len(batch):
            others = unselected_features(encoded, choice)
        chosen = Chosen(batch.take(choice.index), choice, locked, others)
        counters.scored += choice.scored * state.world.size
    counters.batch += 1
    counters.seen += batch.num_candidates * state.world.size
    counters.trained += len(chosen.batch) * state.world.size
    return chosen


def _learn(state: TrainState, chosen: Sequence[Chosen], outputs: Sequence[dict[str, Tensor]]) -> None:
    """Count features that are not finite, and let the selection learn from the training pass."""
    for out in outputs:
        state.tally.add_samples(out["image_features"].detach(), out["text_features"].detach())
    selection = state.selection
    if selection is None:
        return
    losses: Sequence[Tensor | None] = [None] * len(chosen)
    if selection.learns_losses:
        # Those of the pairs in the contrastive batch that all parts make together.
        image, text = (torch.cat([out[f"{side}_features"] for out in outputs]) for side in ("image", "text"))
        loss = selection.pair_losses(image, text, outputs[0]["logit_scale"], outputs[0].get("logit_bias"))
        losses = loss.split([len(one.batch) for one in chosen])  # type: ignore[no-untyped-call]
    for one, out, loss_of_one in zip(chosen, outputs, losses, strict=True):
        image, text = out["image_features"], out["text_features"]
        selection.learn(one.batch.sample_id, loss_of_one, image_features=image, text_features=text)


def _losses(state: TrainState, chosen: Sequence[Chosen], features: dict[str, Tensor]) -> dict[str, Tensor]:
    """The losses by name of the contrastive batch that all parts make together.

    Weighted, or against the pairs that were not chosen, too, where the selection says so.
    """
    if chosen[0].others is not None:
        return loss_against_all(state.world, chosen[0].others, **features)
    weights = [one.choice.weight for one in chosen if one.choice is not None and one.choice.weight is not None]
    if not weights:
        losses: dict[str, Tensor] = state.loss(**features, output_dict=True)
        return losses
    return weighted_loss(state.loss, state.world, torch.cat(weights), **features)


def _backward(state: TrainState, losses: dict[str, Tensor], logit_scale: Tensor) -> dict[str, Tensor]:
    total = functools.reduce(torch.add, losses.values())
    scaled: Tensor = total if state.scaler is None else state.scaler.scale(total)
    scaled.backward()  # type: ignore[no-untyped-call]
    outputs = {**losses, "loss": total, "logit_scale": logit_scale}
    return {name: value.detach() for name, value in outputs.items()}


def _forward(model: nn.Module, chosen: Chosen) -> dict[str, Tensor]:
    """A model's outputs by name, but for the features of locked towers that are known already."""
    known = chosen.locked
    image = None if "image_features" in known else chosen.batch.image
    text = None if "text_features" in known else chosen.batch.text
    out: dict[str, Tensor] = model(image, text)
    computed = next((out[name] for name in ("image_features", "text_features") if name not in known), None)
    return {**out, **{name: part if computed is None else part.to(computed.dtype) for name, part in known.items()}}


def _forward_backward(state: TrainState, chosen: Chosen) -> dict[str, Tensor]:
    batch = chosen.batch
    with state.autocast():
        out = _forward(state.model, chosen)
        if state.teacher is not None:
            with torch.no_grad():
                taught = state.teacher(batch.image, batch.text)
            # Not the logits of a CoCa teacher, nor the bias of SigLIP, which is the same for all of a row.
            out |= {f"dist_{name}": taught[name] for name in ("image_features", "text_features", "logit_scale")}
        losses = _losses(state, [chosen], out)
    _learn(state, [chosen], [out])
    return _backward(state, losses, out["logit_scale"])


def _accumulate(state: TrainState, chosen: Sequence[Chosen]) -> dict[str, Tensor]:
    with torch.no_grad(), state.autocast():
        cached = [_forward(state.module, one) for one in chosen]
    _learn(state, chosen, cached)
    outputs: dict[str, Tensor] = {}
    for place, one in enumerate(chosen):
        with _sync_gradients(state.model, place == len(chosen) - 1):
            with state.autocast():
                out = _forward(state.model, one)
                parts = [*cached[:place], out, *cached[place + 1 :]]
                features = {
                    name: torch.cat([part[name] for part in parts]) for name in out if name not in _NOT_FEATURES
                }
                scalars = {name: out[name] for name in _NOT_FEATURES if name in out}
                losses = _losses(state, chosen, {**features, **scalars})
            outputs = _backward(state, losses, out["logit_scale"])
    return outputs


def _sync_gradients(model: nn.Module, now: bool) -> contextlib.AbstractContextManager[Any]:
    """Let DDP reduce the gradients over the ranks in this backward pass, or hold them back for a later one."""
    inner = uncompiled(model)
    # A static graph is made in the first backward pass, which has to reduce; reducing in each gives the same sum.
    if now or not isinstance(inner, DistributedDataParallel) or inner.static_graph:
        return contextlib.nullcontext()
    return inner.no_sync()


def _next(batches: Iterator[Batch]) -> Batch | None:
    """The loader's next batch; None after the last.

    Raises:
        TrainingError: of a loader worker.
    """
    try:
        return next(batches, None)
    except TrainingError as error:  # torch puts the worker's traceback into the message
        raise TrainingError(str(error).rpartition("TrainingError: ")[2]) from None
    except (ConnectionError, EOFError) as error:  # it was killed while it handed over a batch
        raise RuntimeError(f"DataLoader worker: {error!r}") from error


def _batches(state: TrainState, data: TrainData, clock: PhaseClock) -> Iterator[list[Batch]]:
    """What is left of the epoch's batches, on the device, ``accum_freq`` at a time."""
    loader = iter(data.loader)
    transfer = Transfer(state.world.device, state.input_dtype)
    group: list[Batch] = []
    state.world.watchdog.begin_phase("load", state.counters.step)
    while (batch := _next(loader)) is not None:
        data.consume(batch)
        batch = transfer(batch)
        if state.selection is not None:
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
    state.model.train()
    counters = state.counters
    data.set_epoch(counters.epoch)
    first = counters.epoch_step
    if state.selection is not None:
        state.selection.start_epoch(counters.epoch)
    steps = first + data.remaining_batches // state.config.training.accum_freq
    state.recorder.begin(counters.epoch, first)
    state.skip_log.begin(counters.epoch, 0 if data.recounts_skips else first)
    clock = PhaseClock(state.world.device)
    if state.preselector is not None and state.selection is not None:
        state.preselector.publish(state.selection.store.scores, state.selection.survey)
    if state.reference is not None:
        state.reference.begin(counters.epoch, state.module)
    window = Window(state, data, steps, clock)
    signal = None
    with state.progress.epoch(counters.epoch, first) as progress:
        for batches in _batches(state, data, clock):
            outputs = train_step(state, batches, clock)
            progress.advance()
            done = counters.epoch_step
            if (done - 1) % state.config.run.log_every_n_steps == 0 or done == steps:
                metrics = window.close(outputs, batches)
                progress.show(loss=metrics["loss"])
                reporter.train(counters.step, metrics)
            last = done == steps
            decision = state.world.watchdog.poll(False) if checkpoints is None else checkpoints.after_step(last)
            signal = decision.stop
            if checkpoints is not None and decision.save:
                window.count_seconds()
                save_inside(state, data, checkpoints)
                clock.start()
            if signal is not None and not last:
                raise Stopped(signal)
    state.recorder.end()
    state.skip_log.add(data.drain_skips())
    state.skip_log.end()
    counters.epoch += 1
    counters.epoch_step = 0
    _report_skipped(state, data)
    return signal


def save_inside(state: TrainState, data: TrainData, checkpoints: SavePoints) -> None:
    """Save in the middle of an epoch: first the rows of its files that the checkpoint relies on. Collective."""
    state.world.watchdog.begin_phase("save", state.counters.step)
    state.recorder.cut(state.counters.epoch_step)
    state.skip_log.add(data.drain_skips())
    state.skip_log.cut(state.counters.epoch_step)
    checkpoints.save()


def _report_skipped(state: TrainState, data: TrainData) -> None:
    skipped = data.skip_counts()
    counts = (
        state.world.sum(torch.tensor(list(skipped.values()), device=state.world.device)).tolist() if skipped else []
    )
    named = {kind: count for kind, count in zip(skipped, counts, strict=True) if count}
    if named and state.world.is_main:
        log.warning("Skipped in this epoch, over all ranks: %s", ", ".join(f"{n} {kind}" for kind, n in named.items()))


class Window:
    """The steps between two logs: checks them and turns them into metrics. Reads the device at its end only."""

    def __init__(self, state: TrainState, data: TrainData, steps: int, clock: PhaseClock) -> None:
        self.state = state
        self.data = data
        self.steps = steps
        self.clock = clock
        self.base = dict(state.counters.seconds)
        self._open()

    def _open(self) -> None:
        self.first_step = self.state.counters.step
        self.seconds = dict(self.state.counters.seconds)
        self.seen = self.state.counters.seen

    def _counts(self) -> Tensor:
        """[W, 5] of all ranks: steps, steps in a row and samples not finite, scores not finite, samples skipped."""
        state = self.state
        device = state.world.device
        scores = torch.zeros((), dtype=torch.int64, device=device)
        if state.selection is not None:
            scores, state.selection.not_finite = state.selection.not_finite, scores
        skipped = torch.tensor([sum(self.data.skip_counts().values())], device=device)
        return state.world.all_gather(torch.cat([state.tally.read(), scores[None], skipped])[None]).cpu()

    def count_seconds(self) -> None:
        """Bring the seconds of the run up to date, for a checkpoint. Waits for the device."""
        totals = self.clock.totals()
        self.state.counters.seconds = {phase: self.base[phase] + totals[phase] for phase in PHASES}

    def close(self, outputs: dict[str, Tensor], batches: Sequence[Batch]) -> dict[str, float]:
        """Metrics of the steps since the last close, with the losses of the last step, and a line in the log.

        Collective: one all_gather. ``outputs`` and ``batches`` are those of the last step.

        Raises:
            TrainingError: after too many steps in a row that were not finite, or too many samples skipped.
        """
        counters = self.state.counters
        values = {name: value.item() for name, value in outputs.items()}
        counts = self._counts()
        self.count_seconds()
        self._check_finite(counts, values, batches)
        skipped = int(counts[:, 4].sum())
        self._check_skipped(skipped)
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
            "scored": counters.scored,
            "skipped": skipped,
            "nonfinite_steps": int(counts[:, 0].max()),
            "nonfinite_samples": int(counts[:, 2:4].sum()),
            "epoch": counters.epoch + counters.epoch_step / self.steps,
        }
        self._log(metrics, list(values))
        self._open()
        return metrics

    def _log(self, metrics: dict[str, float], losses: list[str]) -> None:
        counters = self.state.counters
        done = counters.epoch_step
        named = " ".join(f"{name.capitalize()}: {metrics[name]:#.5g}" for name in losses)
        log.info(
            f"Train Epoch: {counters.epoch} [{done}/{self.steps} ({100 * done / self.steps:.0f}%)] "
            f"Load {metrics['data_time']:.3f} Score {metrics['score_time']:.3f} Train {metrics['train_time']:.3f} "
            f"Batch (t): {metrics['batch_time']:.3f}, {metrics['samples_per_second']:#g}/s, "
            f"{metrics['samples_per_second_per_gpu']:#g}/s/gpu Seen: {counters.seen} Trained: {counters.trained} "
            f"LR: {metrics['lr']:5g} Logit Scale: {metrics['scale']:.3f} {named}",
            extra=NOT_ON_TERMINAL,
        )

    def _check_skipped(self, skipped: int) -> None:
        """An epoch has room for so many: a share of what was read so far would damn a run for one early bad shard."""
        config, world = self.state.config, self.state.world
        samples = self.steps * config.training.accum_freq * config.training.batch_size * world.size
        self.state.skip_log.add(self.data.drain_skips())
        self.state.skip_log.check(skipped, samples, config.data.max_skip_fraction)

    def _check_finite(self, counts: Tensor, values: dict[str, float], batches: Sequence[Batch]) -> None:
        state, last = self.state, self.state.counters.step - 1
        failed, in_a_row = int(counts[:, 0].max()), int(counts[:, 1].max())
        if in_a_row >= state.config.training.max_nonfinite_steps:
            broken = counts[:, 2] + counts[:, 3] > 0
            ranks = (broken if broken.any() else counts[:, 1] > 0).nonzero().flatten().tolist()
            saved = self._keep_for_study(last, batches, ranks)
            raise TrainingError(self._explain(in_a_row, last, ranks, values, saved))
        if failed and state.world.is_main:
            log.warning(
                "%d of the steps %d to %d had a loss or gradient that was not finite, and changed no weights; "
                "--max-nonfinite-steps %d in a row end the run",
                failed, self.first_step, last, state.config.training.max_nonfinite_steps,
            )  # fmt: skip
        excluded = int(counts[:, 3].sum())
        if excluded and state.world.is_main:
            log.warning(
                "%d samples of the steps %d to %d had scores that were not finite, and were left out",
                excluded, self.first_step, last,
            )  # fmt: skip

    def _keep_for_study(self, step: int, batches: Sequence[Batch], ranks: list[int]) -> str:
        """Save the last batches of the first few of these ranks; returns a sentence that says where."""
        state = self.state
        ranks = ranks[:_RANKS_KEPT]
        if state.folder is None:
            return "Nothing was saved, since the run has no folder."
        folder = state.folder / "nonfinite"
        if state.world.rank in ranks:
            tensors = [
                {"image": batch.image.cpu(), "text": batch.text.cpu(), "sample_id": batch.sample_id.cpu()}
                for batch in batches
            ]
            try:
                folder.mkdir(parents=True, exist_ok=True)
                torch.save({"step": step, "batches": tensors}, folder / f"step_{step}_rank_{state.world.rank}.pt")
            except (OSError, RuntimeError) as error:  # of a full disk; torch's is a RuntimeError
                return f"The last batch could not be saved in {folder} ({error})."
        names = ", ".join(f"step_{step}_rank_{rank}.pt" for rank in ranks)
        return f"The last batch is in {folder}: {names} (torch.load with weights_only=True)."

    def _explain(self, in_a_row: int, last: int, ranks: list[int], values: dict[str, float], saved: str) -> str:
        config = self.state.config
        return (
            f"the loss or gradient was not finite in {in_a_row} steps in a row, {last - in_a_row + 1} to {last}, "
            f"on rank{'s' * (len(ranks) > 1)} {', '.join(map(str, ranks))} (last loss {values['loss']:g}, logit scale "
            f"{values['logit_scale']:g}, learning rate {self.state.optimizer.param_groups[0]['lr']:g}). {saved} Look "
            f"at --lr {config.training.lr} and --warmup {config.training.warmup} (too steep a start), --precision "
            f"{config.training.precision} "
            "(try amp_bf16 or fp32), --grad-clip-norm (try 1.0), and at the data of these steps. These steps changed "
            "no weights; --resume latest continues from the last checkpoint"
        )
