"""A training run, put together from its parts. Nothing here computes."""

from __future__ import annotations

import dataclasses
import logging
import math
from pathlib import Path

import open_clip
import torch

from dissect_clip.checkpoint import Checkpoint, Saver, find_resume, load_checkpoint, restore
from dissect_clip.config.settings import Config
from dissect_clip.data import (
    ClassificationData,
    RetrievalData,
    TrainData,
    build_classification,
    build_retrieval,
    build_train,
    count_skips,
    describe_skips,
)
from dissect_clip.data.skip_log import SkipLog
from dissect_clip.data.state import DataState
from dissect_clip.distributed.signals import Signals
from dissect_clip.distributed.world import World, missing_device
from dissect_clip.errors import SetupError, Stopped, TrainingError
from dissect_clip.evaluation import Tokenizer, evaluate
from dissect_clip.models.build import Model, build_model
from dissect_clip.models.loss import build_loss
from dissect_clip.models.parallel import RunningBuffers, wrap_model
from dissect_clip.models.precision import autocast_for
from dissect_clip.models.weights import ModelWeights
from dissect_clip.run.console import (
    NOT_ON_TERMINAL,
    ONLY_ON_TERMINAL,
    Progress,
    aligned,
    setup_logging,
    short,
    terminal_width,
)
from dissect_clip.run.folder import RunFolder, make_sync, open_run
from dissect_clip.run.remote_sync import NoSync, RemoteSync
from dissect_clip.run.reporters import Reporter, earlier_evaluations, make_reporter
from dissect_clip.run.stateful import Stateful
from dissect_clip.selection import build_preselector, build_selection
from dissect_clip.selection.mixins import ReportsSamples, UsesDecoys, rate_summary, sample_columns
from dissect_clip.selection.state import SelectionState
from dissect_clip.selection.strategies.combination import reference_user
from dissect_clip.training.epoch import train_epoch
from dissect_clip.training.optimizer import build_optimizer, build_scaler
from dissect_clip.training.record import NullRecorder, Recorder
from dissect_clip.training.reference import Reference, build_reference
from dissect_clip.training.sample_report import write_verdict
from dissect_clip.training.schedule import learning_rate
from dissect_clip.training.scoring import build_scorer
from dissect_clip.training.state import OptimizerState, ProgressState, RunSettings, ScalerState
from dissect_clip.training.step import Counters, NonFiniteCounts, TrainState

_USABLE_DECOYS = 64
"""With fewer decoys than these their density is a guess."""

log = logging.getLogger(__name__)


def run(config: Config, world: World) -> None:
    """One run in a world that is set up. Collective.

    Raises:
        SetupError: if anything is wrong with flags, data or files.
        TrainingError: if training cannot go on.
    """
    folder = open_run(config, world)
    if folder is not None:
        config = config.replace(name=folder.name)
    setup_logging(folder.log_file if folder else None, logging.DEBUG if config.run.debug else logging.INFO, world)
    _introduce(config, world, folder)
    _allow_tf32(world)
    sync = make_sync(config, folder, world)
    with world.watchdog.suspend_timeout():
        world.on_main(sync.start)
    try:
        _run_in(folder, config, world, sync)
    except SetupError:
        if folder is not None and world.is_main:
            folder.set_aside()
        raise
    finally:
        with world.watchdog.suspend_timeout():
            copied = sync.finish()
    if not copied:
        raise TrainingError(
            f"the run folder could not be copied to --remote-sync {config.run.remote_sync}: copy it by hand"
        )


def _run_in(folder: RunFolder | None, config: Config, world: World, sync: RemoteSync | NoSync) -> None:
    """Build the parts, then train or evaluate."""
    model = build_model(config, world)
    train_data = (
        build_train(config, world, model.preprocess_train, model.tokenizer, folder.path if folder else None)
        if config.data.trains
        else None
    )
    retrieval = build_retrieval(config, world, model.preprocess_eval, model.tokenizer)
    classification = build_classification(config, world, model.preprocess_eval)
    with world.watchdog.suspend_timeout():  # of a remote copy
        resume = find_resume(config, folder, world)
        checkpoint = None if resume is None else load_checkpoint(resume)
    reporter = make_reporter(config, folder, world)
    evaluator = Evaluator(config, world, model.tokenizer, retrieval, classification, reporter)
    try:
        if train_data is None:
            _evaluate_only(config, model, evaluator, checkpoint)
        else:
            _train(config, world, model, train_data, evaluator, checkpoint, folder, sync)
    finally:
        reporter.close()


def _introduce(config: Config, world: World, folder: RunFolder | None) -> None:
    missing = missing_device(config.distributed.device, world)
    if missing is not None and world.is_main:
        log.warning("No %s device: %s on the CPU", missing, "training" if config.data.trains else "running")
    log.info("Run %s in %s", config.run.name or "without a folder", folder.path if folder else "no folder")
    log.info(
        "%d process%s, device %s, precision %s",
        world.size,
        "es" * (world.size > 1),
        world.device,
        config.training.precision,
    )
    if config.training.precision == "fp16":
        log.warning("--precision fp16 trains without a gradient scaler: amp is the safer choice")
    if config.model.siglip and (config.training.local_loss or config.training.gather_with_grad):
        log.warning("--siglip exchanges features in its own way: --local-loss and --gather-with-grad have no effect")
    for name, value in sorted(config.flat().items()):
        log.debug("  %s: %s", name, value)


def _allow_tf32(world: World) -> None:
    if world.device.type == "cuda":  # as in OpenCLIP
        torch.backends.cuda.matmul.allow_tf32 = True
        torch.backends.cudnn.benchmark = True


# ---- training


def _train(
    config: Config,
    world: World,
    model: Model,
    train_data: TrainData,
    evaluator: Evaluator,
    checkpoint: Checkpoint | None,
    folder: RunFolder | None,
    sync: RemoteSync | NoSync,
) -> None:
    steps_per_epoch = train_data.num_batches // config.training.accum_freq
    state = build_state(config, world, model, train_data, folder, steps_per_epoch)
    parts = parts_of(state, train_data, steps_per_epoch)
    if checkpoint is not None:
        restore(checkpoint, parts)
        inside = f" and {state.counters.epoch_step} steps" if state.counters.epoch_step else ""
        log.info("Resumed from %s after %d epochs%s", checkpoint.path, state.counters.epoch, inside)
    train_data.stream.preselector = state.preselector
    _announce(state, train_data, steps_per_epoch)
    due = {epoch for epoch in range(1, config.training.epochs + 1) if evaluator.is_due(epoch)}
    if checkpoint is not None and _was_killed_before_evaluation(checkpoint, state, evaluator, folder):
        evaluator.after_epoch(state.module, state.counters)
    if state.counters.epoch >= config.training.epochs:
        log.info("All %d epochs are done already; give a larger --epochs to train on", config.training.epochs)
    trained = False
    progress = Progress(config.training.epochs, steps_per_epoch, due, _best_rsum(folder, world), shown=world.is_main)
    saver = Saver(parts, state.counters, config, world, folder, sync)
    with Signals(world.watchdog, world.is_main), saver, progress:
        state.progress = progress
        while state.counters.epoch < config.training.epochs:
            signal = train_epoch(state, train_data, evaluator.reporter, saver)
            saver.after_epoch(stopping=signal is not None)
            if signal is not None:
                raise Stopped(signal)
            if state.counters.epoch in due:
                with progress.evaluation():
                    metrics = evaluator.after_epoch(state.module, state.counters)
                progress.show_recall(metrics.get("rsum", -math.inf))
            trained = True
    _write_verdict(state, train_data, folder, trained)


def _write_verdict(state: TrainState, data: TrainData, folder: RunFolder | None, trained: bool) -> None:
    """At the end of a run write what the strategy has found out, if it is one that does. Collective.

    A run that is complete already writes it only where it is missing, as after a full disk.
    """
    selection = state.selection
    if selection is None or folder is None:
        return
    strategy = selection.strategy
    if not isinstance(strategy, ReportsSamples) or not strategy.report_file:
        return
    path = folder.path / strategy.report_file

    def write() -> None:
        if trained or not path.exists():
            write_verdict(
                path,
                strategy,
                selection.store.scores,
                state.counters.epoch,
                data.shard_names,
                data.locate,
            )

    with state.world.watchdog.suspend_timeout():
        state.world.on_main(write)


def _was_killed_before_evaluation(
    checkpoint: Checkpoint, state: TrainState, evaluator: Evaluator, folder: RunFolder | None
) -> bool:
    """Whether the run was cut off between an epoch's checkpoint and the end of its evaluation. Collective."""
    epoch = state.counters.epoch
    if folder is None or state.counters.epoch_step > 0 or not evaluator.is_due(epoch):
        return False
    own = Path(checkpoint.path).resolve().is_relative_to(folder.path.resolve())
    return own and state.world.on_main(lambda: epoch not in earlier_evaluations(folder.results))


def _best_rsum(folder: RunFolder | None, world: World) -> float:
    """The best sum of recalls of the evaluations so far on rank 0, which shows it; minus infinity without any."""
    if folder is None or not world.is_main:
        return -math.inf
    found = [metrics.get("rsum") for metrics in earlier_evaluations(folder.results).values()]
    return max((value for value in found if isinstance(value, (int, float))), default=-math.inf)


def parts_of(state: TrainState, data: TrainData, steps_per_epoch: int) -> dict[str, Stateful]:
    """All of a run that survives a restart, by the names in its checkpoints, in the order in which it is restored."""
    config, counters = state.config, state.counters
    parts: dict[str, Stateful | None] = {
        "state_dict": ModelWeights(state.module, config.model.model, state.buffers),
        "optimizer": OptimizerState(state.optimizer),
        "scaler": None if state.scaler is None else ScalerState(state.scaler),
        "data": DataState(data),
        "progress": ProgressState(counters, data, config.training.accum_freq, steps_per_epoch),
        "selection": SelectionState(state.selection, config.training.seed, counters),
        "reference": state.reference,
        "run": RunSettings(config, state.world),
    }
    return {name: part for name, part in parts.items() if part is not None}


def build_state(
    config: Config,
    world: World,
    model: Model,
    train_data: TrainData,
    folder: RunFolder | None,
    steps_per_epoch: int,
) -> TrainState:
    """All that a training step touches, at the start of a run. Collective where there are several ranks.

    Raises:
        SetupError: if the model cannot be trained as asked.
    """
    module, wrapped = wrap_model(model.module, config, world)
    optimizer = build_optimizer(config, module)
    autocast = autocast_for(config.training.precision, world.device)
    selection = build_selection(config, train_data.num_samples, world)
    if selection is not None:
        selection.draw_decoys(train_data.subset_size, train_data.subset_ids)
    preselector = build_preselector(config, selection)
    scorer = build_scorer(config, module, autocast, model.tokenizer)
    if config.selection.score_keep_locked and not scorer.reusable:
        raise SetupError(
            f"--score-keep-locked: no tower of --model {config.model.model} is locked as a whole and the same in "
            "training "
            "as in scoring. Unlocked layers, BatchNorm that is not frozen, dropout and other --score flags prevent it"
        )
    reference: Reference | None = None
    user = None if selection is None else reference_user(selection.strategy)
    if user is not None:
        reference = build_reference(config, user.options, world, module, autocast, model.tokenizer)
    recorder: Recorder | NullRecorder = NullRecorder()
    if config.selection.record and selection is not None and folder is not None:
        recorder = Recorder(
            folder.record,
            world,
            train_data.shard_names,
            train_data.locate,
            selection.strategy.remembers,
            config.training.accum_freq,
            reports=sample_columns(selection.strategy),
            keep_going=config.checkpoint.on_save_error == "continue",
        )
    return TrainState(
        config=config,
        world=world,
        module=module,
        model=wrapped,
        teacher=model.teacher,
        loss=build_loss(config, world),
        optimizer=optimizer,
        scaler=build_scaler(config, world.device),
        schedule=learning_rate(config, optimizer.param_groups[0]["lr"], steps_per_epoch),
        autocast=autocast,
        input_dtype=open_clip.get_input_dtype(config.training.precision),
        selection=selection,
        scorer=scorer,
        buffers=RunningBuffers(module, world),
        recorder=recorder,
        skip_log=SkipLog(folder.skipped if folder else None, world, config.checkpoint.on_save_error == "continue"),
        nonfinite=NonFiniteCounts(world.device),
        preselector=preselector,
        reference=reference,
        folder=folder.path if folder else None,
    )


def _announce(state: TrainState, data: TrainData, steps_per_epoch: int) -> None:
    config = state.config
    trainable = sum(p.numel() for p in state.module.parameters() if p.requires_grad)
    step_size = config.training.batch_size * config.training.accum_freq * state.world.size
    log.info("Model %s, %.1f M parameters to train", config.model.model, trainable / 1e6)
    log.info(
        "Training data: %s%d samples in %d shards; %d steps an epoch of %d samples",
        "" if config.data.train_keep is None else f"{data.subset_size} of ", data.num_samples,
        len(data.shard_names), steps_per_epoch, step_size,
    )  # fmt: skip
    if data.subset_size < step_size and state.world.is_main:
        log.warning("A step takes %d samples of %d: some come more than once in it, as negatives of themselves; give a "
                    "smaller --batch-size", step_size, data.subset_size)  # fmt: skip
    if state.selection is not None:
        log.info(
            "Selection: %s, keeping %s of every batch; %s%s",
            config.selection.select_strategy, rate_summary(state.selection.strategy), state.selection.scoring,
            "" if state.preselector is None else ", chosen before loading",
        )  # fmt: skip
        _announce_decoys(state, data)


def _announce_decoys(state: TrainState, data: TrainData) -> None:
    assert state.selection is not None
    if not isinstance(state.selection.strategy, UsesDecoys) or state.selection.strategy.decoy_share == 0:
        return
    count = 0 if state.selection.decoys is None else len(state.selection.decoys.ids)
    log.info("%d samples are decoys: in the warm-up they have a wrong caption on purpose (--clean-decoys)", count)
    if count < _USABLE_DECOYS and state.world.is_main:
        log.warning(
            "%d decoys are too few to tell wrong pairs by: raise --clean-decoys to %.2g, or give 0 to do without",
            count, min(0.5, 2 * _USABLE_DECOYS / data.subset_size),
        )  # fmt: skip


# ---- evaluation


@dataclasses.dataclass(frozen=True, slots=True)
class Evaluator:
    """Evaluates on this rank's share of the sets, and reports the metrics."""

    config: Config
    world: World
    tokenizer: Tokenizer
    retrieval: RetrievalData | None
    classification: list[ClassificationData]
    reporter: Reporter

    def _due(self, frequency: int, epoch: int) -> bool:
        return frequency > 0 and (epoch % frequency == 0 or epoch == self.config.training.epochs)

    def is_due(self, epoch: int) -> bool:
        """Whether there is anything to evaluate on after so many complete epochs."""
        retrieval = self.retrieval is not None and self._due(self.config.evaluation.val_frequency, epoch)
        return retrieval or (bool(self.classification) and self._due(self.config.evaluation.zeroshot_frequency, epoch))

    def after_epoch(self, module: torch.nn.Module, counters: Counters) -> dict[str, float]:
        """Evaluate on what is due after so many complete epochs; after the last, on all. Returns the metrics."""
        retrieval = self.retrieval if self._due(self.config.evaluation.val_frequency, counters.epoch) else None
        classification = (
            self.classification if self._due(self.config.evaluation.zeroshot_frequency, counters.epoch) else []
        )
        spent = {f"{phase}_seconds": seconds for phase, seconds in counters.seconds.items()}
        samples = {"seen": counters.seen, "trained": counters.trained, "scored": counters.scored}
        progress = {**samples, **spent}
        return self._run(module, retrieval, classification, counters.epoch, counters.step, progress)

    def alone(self, module: torch.nn.Module, epoch: int, step: int) -> None:
        """Evaluate a checkpoint on everything."""
        self._run(module, self.retrieval, self.classification, epoch, step, {})

    def _run(
        self,
        module: torch.nn.Module,
        retrieval: RetrievalData | None,
        classification: list[ClassificationData],
        epoch: int,
        step: int,
        progress: dict[str, float],
    ) -> dict[str, float]:
        self.world.watchdog.begin_phase("evaluate", step)
        metrics = evaluate(
            module,
            retrieval,
            classification,
            world=self.world,
            autocast=autocast_for(self.config.training.precision, self.world.device),
            input_dtype=open_clip.get_input_dtype(self.config.training.precision),
            tokenizer=self.tokenizer,
            batch_size=self.config.training.batch_size,
        )
        sets: list[RetrievalData | ClassificationData] = [*classification]
        if retrieval is not None:
            sets.append(retrieval)
        for data in sets:
            counts = count_skips(data, self.world)
            if counts and self.world.is_main:
                log.warning("evaluation on %s left samples out: %s", data.name, describe_skips(counts))
        if metrics:
            line = "\t".join(f"{name}: {short(value)}" for name, value in metrics.items())
            log.info("Eval Epoch: %d %s", epoch, line, extra=NOT_ON_TERMINAL)
            table = aligned(metrics, terminal_width())
            log.info("Evaluation after epoch %d\n%s", epoch, table, extra=ONLY_ON_TERMINAL)
            self.reporter.evaluation(epoch, step, {**metrics, **progress})
        return metrics


def _evaluate_only(config: Config, model: Model, evaluator: Evaluator, checkpoint: Checkpoint | None) -> None:
    if checkpoint is not None:
        restore(checkpoint, {"state_dict": ModelWeights(model.module, config.model.model)}, evaluating=True)
    elif not config.model.pretrained:
        log.warning("Evaluating random weights: give --resume or --pretrained to load some")
    epoch = 0 if checkpoint is None else checkpoint.epoch
    step = 0 if checkpoint is None else checkpoint.parts["progress"]["step"] or 0
    evaluator.alone(model.module, epoch, step)
