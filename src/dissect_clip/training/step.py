"""The training step: score a batch, choose the rows that are worth it, train on them.

With ``--accum-freq`` above 1 the chosen rows of several batches make one contrastive batch: their features are
computed without gradients first, then each part once more with gradients against the features of the others (Gao et
al., "Scaling Deep Contrastive Learning Batch Size under Memory Limited Setup", 2021).

Shapes: N pairs of this rank as loaded, K of them chosen, D features, W ranks.
"""

from __future__ import annotations

import contextlib
import functools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from dissect_clip.config.settings import Config
from dissect_clip.data.batch import Batch
from dissect_clip.data.skip_log import SkipLog
from dissect_clip.distributed.world import World
from dissect_clip.models.loss import loss_against_all, weighted_loss
from dissect_clip.models.openclip_compat import uncompiled
from dissect_clip.models.parallel import RunningBuffers
from dissect_clip.models.precision import Autocast
from dissect_clip.run.console import Progress
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

Scoring = Callable[[Batch], Encoded]
"""A scoring pass: the features of a batch, without gradients."""


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


class NonFiniteCounts:
    """Steps and samples with values that are not finite, counted on the device since they were last read."""

    def __init__(self, device: torch.device) -> None:
        self._steps = torch.zeros((), dtype=torch.int64, device=device)
        self._samples = torch.zeros((), dtype=torch.int64, device=device)
        self._in_a_row = torch.zeros((), dtype=torch.int64, device=device)

    def add_samples(self, *features: Tensor) -> None:
        """Count the rows [K, ...] whose features are not finite."""
        for part in features:
            self._samples += (~part.detach().flatten(1).isfinite().all(dim=1)).sum()

    def add_step(self, finite: Tensor) -> None:
        """Count an optimizer step; ``finite`` is a scalar bool: whether its loss and gradient were."""
        self._steps += ~finite
        self._in_a_row = torch.where(finite, 0, self._in_a_row + 1)

    def read(self) -> Tensor:
        """[3] int64 on the device: steps, steps in a row up to now, samples; resets all but the row."""
        counts = torch.stack([self._steps, self._in_a_row, self._samples])
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
    nonfinite: NonFiniteCounts
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
    # Dropout and the like depend on the step alone, so that a resumed run draws the same numbers.
    seed_everything(derive_seed(config.training.seed, Stream.MODEL, counters.step, state.world.rank))
    if not config.training.skip_scheduler:
        set_learning_rate(state.optimizer, state.schedule(counters.step))

    watchdog.begin_phase("score", counters.step)
    parts = [select_part(state, batch) for batch in batches]
    clock.lap("score")

    watchdog.begin_phase("train", counters.step)
    state.optimizer.zero_grad(set_to_none=True)
    cached: list[dict[str, Tensor]] = []
    if len(parts) > 1:
        # Each part's loss needs the features of all, whose activations would not fit into memory together.
        with torch.no_grad(), state.autocast():
            cached = [forward(state.module, part) for part in parts]
        learn_from_training(state, parts, cached)
    for place, part in enumerate(parts):
        with reduce_gradients(state.model, is_last=place == len(parts) - 1):
            with state.autocast():
                out = forward(state.model, part)
                if state.teacher is not None:
                    out |= distillation_targets(state.teacher, part.batch)
                features = joined(cached, place, out) if cached else out
                losses = contrastive_losses(state, parts, features)
            if not cached:
                learn_from_training(state, parts, [out])
            total = functools.reduce(torch.add, losses.values())
            scaled: Tensor = total if state.scaler is None else state.scaler.scale(total)
            scaled.backward()  # type: ignore[no-untyped-call]
    # Every part computes the loss of the whole contrastive batch, so the last one's is that of the step.
    outputs = {
        name: value.detach() for name, value in {**losses, "loss": total, "logit_scale": out["logit_scale"]}.items()
    }
    clock.lap("train")

    watchdog.begin_phase("optimizer", counters.step)
    # A step whose loss or gradient is not finite changes no weights, which is decided on the device.
    finite = optimizer_step(state.optimizer, state.scaler, state.module.parameters(), config.training.grad_clip_norm)
    with torch.no_grad():
        state.module.logit_scale.clamp_(0, MAX_LOG_LOGIT_SCALE)  # type: ignore[operator]
    finite = finite & outputs["loss"].isfinite()
    state.buffers.synchronise(finite)
    state.nonfinite.add_step(finite)
    clock.lap("optimizer")
    counters.step += 1
    counters.epoch_step += 1
    return outputs


# ---- what is trained on


@dataclass(frozen=True, slots=True)
class SelectedPart:
    """The rows of a batch that are trained on; all of it without ``--select``."""

    batch: Batch
    choice: Choice | None = None
    locked: dict[str, Tensor] = field(default_factory=dict)
    """Features [K, D] of locked towers by open_clip's names, which training need not compute again."""
    unselected: Tensor | None = None  # [N - K, 2 D], features of the other rows, with --select-negatives all


def select_part(state: TrainState, batch: Batch) -> SelectedPart:
    """Score a batch, and choose from it; counted and recorded. Collective as :meth:`Selection.choose` is."""
    counters, settings = state.counters, state.config.selection
    part = SelectedPart(batch)
    if state.selection is not None:
        choice, encoded = score_and_choose(state.selection, batch, state.scorer, state.reference, counters.batch)
        state.recorder.append(batch, choice)
        locked, unselected = {}, None
        if encoded is not None and settings.score_keep_locked:
            locked = encoded.locked(choice.index)
        if encoded is not None and settings.select_negatives == "all" and len(choice.index) < len(batch):
            unselected = unselected_features(encoded, choice)
        part = SelectedPart(batch.take(choice.index), choice, locked, unselected)
        counters.scored += choice.scored * state.world.size
    counters.batch += 1
    counters.seen += batch.num_candidates * state.world.size
    counters.trained += len(part.batch) * state.world.size
    return part


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


# ---- the training pass


def forward(model: nn.Module, part: SelectedPart) -> dict[str, Tensor]:
    """A model's outputs by name for the selected rows; without running locked towers whose features are there."""
    image = None if "image_features" in part.locked else part.batch.image
    text = None if "text_features" in part.locked else part.batch.text
    out: dict[str, Tensor] = model(image, text)
    computed = next((out[name] for name in ("image_features", "text_features") if name not in part.locked), None)
    # The scoring pass keeps float32; the loss expects both towers in the precision of the run.
    locked = {name: value if computed is None else value.to(computed.dtype) for name, value in part.locked.items()}
    return {**out, **locked}


def distillation_targets(teacher: nn.Module, batch: Batch) -> dict[str, Tensor]:
    """What open_clip's distillation loss takes of the teacher's outputs, by its names."""
    with torch.no_grad():
        out = teacher(batch.image, batch.text)
    # Not the logits of a CoCa teacher, nor the bias of SigLIP, which is the same for all of a row.
    return {f"dist_{name}": out[name] for name in ("image_features", "text_features", "logit_scale")}


def joined(cached: Sequence[dict[str, Tensor]], place: int, out: dict[str, Tensor]) -> dict[str, Tensor]:
    """The outputs of all parts as those of one batch: ``out``, with gradients, in its ``place`` among the others."""
    parts = [*cached[:place], out, *cached[place + 1 :]]
    # The logit scale and bias are not per row, and must be those with gradients.
    return {
        name: value if name in _NOT_FEATURES else torch.cat([part[name] for part in parts])
        for name, value in out.items()
    }


def contrastive_losses(
    state: TrainState, parts: Sequence[SelectedPart], features: dict[str, Tensor]
) -> dict[str, Tensor]:
    """The losses by name of the contrastive batch that all parts make together.

    Weighted, or against the unselected rows, too, if the selection asks for it.
    """
    if parts[0].unselected is not None:
        return loss_against_all(state.world, parts[0].unselected, **features)
    weights = [part.choice.weight for part in parts if part.choice is not None and part.choice.weight is not None]
    if not weights:
        losses: dict[str, Tensor] = state.loss(**features, output_dict=True)
        return losses
    return weighted_loss(state.loss, state.world, torch.cat(weights), **features)


def learn_from_training(state: TrainState, parts: Sequence[SelectedPart], outputs: Sequence[dict[str, Tensor]]) -> None:
    """Count features that are not finite, and let the selection learn from the training pass."""
    for out in outputs:
        state.nonfinite.add_samples(out["image_features"], out["text_features"])
    selection = state.selection
    if selection is None:
        return
    losses: Sequence[Tensor | None] = [None] * len(parts)
    if selection.learns_losses:
        # The loss of a pair depends on all others, so it is that of the contrastive batch of all parts.
        image, text = (torch.cat([out[f"{side}_features"] for out in outputs]) for side in ("image", "text"))
        loss = selection.pair_losses(image, text, outputs[0]["logit_scale"], outputs[0].get("logit_bias"))
        losses = loss.split([len(part.batch) for part in parts])  # type: ignore[no-untyped-call]
    for part, out, loss_of_part in zip(parts, outputs, losses, strict=True):
        image, text = out["image_features"], out["text_features"]
        selection.learn(part.batch.sample_id, loss_of_part, image_features=image, text_features=text)


def reduce_gradients(model: nn.Module, is_last: bool) -> contextlib.AbstractContextManager[Any]:
    """Let DDP reduce the gradients over the ranks in this backward pass, or hold them back for a later one."""
    inner = uncompiled(model)
    # A static graph is made in the first backward pass, which has to reduce; reducing in each gives the same sum.
    if is_last or not isinstance(inner, DistributedDataParallel) or inner.static_graph:
        return contextlib.nullcontext()
    return inner.no_sync()
