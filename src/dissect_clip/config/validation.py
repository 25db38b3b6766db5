"""Settings that do not go together, each with a sentence that says what to do about it."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Iterator, Sequence

from dissect_clip.config.run_plan import full_epochs
from dissect_clip.config.settings import Config, SelectionSettings, declared
from dissect_clip.config.strategies import StrategyRegistry

_SHORTCUTS = ("score_batch_size", "score_image_size", "score_patch_dropout", "score_context_length")

_LENGTHS = {"image_mean": (1, 3), "image_std": (1, 3), "force_image_size": (1, 2)}
"""How many numbers a setting may hold: one for all, or one for each channel or side."""

_NEED_A_FOLDER = (
    "save_most_recent", "save_every_n_steps", "save_every_minutes", "remote_sync", "record", "copy_codebase",
)  # fmt: skip

_DEFAULTS = {name: field.default for name, (field, _) in declared().items()}


def contradictions(config: Config, strategies: StrategyRegistry) -> Iterator[str]:
    """Combinations of settings that have no meaning, a sentence each, which names the flags and a way out.

    ``config`` holds only those options of strategies that were given.
    """
    if config.selection.select:
        yield from _selection_contradictions(config, strategies)
    else:
        for name in _given(config, (name for name in declared() if name in _OF_SELECTION)):
            yield f"{_flag(name)} needs --select (with --select-rate 1.0 every sample is trained on)"
        for name in _given_options(config, strategies):
            yield f"{_flag(name)} needs --select (with --select-rate 1.0 every sample is trained on)"
    if config.selection.score_keep_locked and not (config.model.lock_image or config.model.lock_text):
        yield "--score-keep-locked needs a locked tower: give --lock-image or --lock-text"
    yield from _data_contradictions(config)
    yield from _loss_contradictions(config)
    yield from _optimizer_contradictions(config)
    yield from _folder_contradictions(config)


_OF_SELECTION = {field.name for field in dataclasses.fields(SelectionSettings)} - {"select", "options"}


def _flag(name: str) -> str:
    return "--" + name.replace("_", "-")


def _given(config: Config, names: Iterable[str]) -> list[str]:
    """Those of the settings that differ from their defaults."""
    return [name for name in names if config.get(name) != _DEFAULTS[name]]


def _given_options(config: Config, strategies: StrategyRegistry) -> dict[str, tuple[str, ...]]:
    """The options of strategies that differ from their defaults, each with the strategies that have it.

    The default is that of the first selected strategy with the option, or else of the first known one.
    """
    text = config.selection.select_strategy
    flags = strategies.flags([*strategies.members(text), *strategies.known(text)])
    return {
        name: tuple(flags[name])
        for name, value in config.selection.options.items()
        if value != next(iter(flags[name].values()))[0].default
    }


def _selection_contradictions(config: Config, strategies: StrategyRegistry) -> Iterator[str]:
    """Those of online sample selection: of the strategies, then of the settings that all share."""
    if not config.data.trains:
        yield "--select needs training data: give --train-data"
        return
    members = tuple(strategies.members(config.selection.select_strategy))
    chosen = f"--select-strategy {config.selection.select_strategy}"
    if len(members) > 1:
        for name in sorted(members):
            if not strategies[name].combines:
                yield f"{chosen}: {name} cannot be combined with others, leave it out"
    flags = strategies.flags(strategies.known(config.selection.select_strategy))
    for option, owners in _given_options(config, strategies).items():
        ignored = any(field.metadata["ignored_by_others"] for field, _ in flags[option].values())
        if not set(owners) & set(members) and not ignored:
            yield f"{_flag(option)} has no meaning with {chosen}: it is for {' or '.join(owners)}"
    for place, name in enumerate(members):
        run = dataclasses.replace(config.plan(), sets_rate=place == 0)
        yield from strategies.options(name, config.selection.options).contradictions(run)
    yield from _rate_contradictions(config, strategies)
    yield from _scoring_contradictions(config, strategies, members)
    if config.selection.select_negatives == "all":
        yield from _negatives_contradictions(config, strategies, members)


def default_preset(config: Config, strategies: StrategyRegistry) -> str:
    """The default of ``--select-preset``: fast with a strategy that ranks by scores of earlier steps anyway."""
    reuses = any(strategies[name].reuses for name in strategies.members(config.selection.select_strategy))
    return "fast" if reuses else "exact"


def _reuses_scores(config: Config, strategies: StrategyRegistry) -> bool:
    """Whether samples may be ranked by scores of earlier steps."""
    fast = default_preset(config, strategies) == "fast" or config.selection.select_preset == "fast"
    return fast or config.selection.score_refresh not in (None, 1)


def _scoring_contradictions(config: Config, strategies: StrategyRegistry, members: Sequence[str]) -> Iterator[str]:
    """Those of the scoring pass, and of selection without one."""
    if config.selection.score_keep_locked and _reuses_scores(config, strategies):
        yield f"--score-keep-locked needs a scoring pass over the whole batch: {_without_reuse(strategies, members)}"
    ahead = config.selection.select_before_load or config.selection.select_preset == "fast"
    if ahead and config.data.dataset_resampled:
        yield (
            "--dataset-resampled may draw a sample twice in an epoch, so --select-before-load, also as a part of "
            "--select-preset fast, cannot choose ahead of time: leave one of them out (--score-refresh alone works)"
        )
    reuses = any(strategies[name].reuses for name in members)
    scores = any(strategies[name].scores for name in members)
    if not scores or (reuses and not config.selection.score_refresh):
        way_out = ": give --score-refresh, too, or leave it out" if scores else ""
        for name in _given(config, _SHORTCUTS):
            yield (
                f"{_flag(name)} has no meaning with --select-strategy {config.selection.select_strategy}, which scores "
                f"nothing{way_out}"
            )


def _data_contradictions(config: Config) -> Iterator[str]:
    if config.data.train_keep is not None and not config.data.trains:
        yield "--train-keep needs training data: give --train-data"
    if not config.data.trains and config.evaluation.val_data is None and not _zeroshot(config):
        yield (
            "nothing to do: give --train-data (or --dataset-type synthetic) to train, or --val-data, --imagenet-val, "
            "--imagenet-v2 or --zeroshot-data to evaluate"
        )
    if config.data.fast_decode and config.model.aug_cfg.get("use_timm"):
        yield "--fast-decode works with open_clip's own augmentation: leave it out, or use_timm of --aug-cfg"
    if config.data.dataset_type == "synthetic" and config.data.train_num_samples is None:
        yield "--dataset-type synthetic needs --train-num-samples"
    if config.data.train_data_upsampling_factors is not None and not config.data.dataset_resampled:
        yield "--train-data-upsampling-factors needs --dataset-resampled"
    yield from wrong_lengths(config)


def wrong_lengths(config: Config) -> Iterator[str]:
    """Settings that hold more numbers than they may, or fewer, a line each."""
    for name, lengths in _LENGTHS.items():
        numbers = config.get(name)
        if numbers is not None and len(numbers) not in lengths:
            allowed = " or ".join(map(str, lengths))
            yield f"{_flag(name)} takes {allowed} numbers: {len(numbers)} given"


def _loss_contradictions(config: Config) -> Iterator[str]:
    if (config.model.distill_model is None) != (config.model.distill_pretrained is None):
        yield "--distill-model and --distill-pretrained go together: give both or none"
    if config.model.distill and config.training.accum_freq > 1:
        yield "--distill-model cannot be combined with --accum-freq above 1: give --accum-freq 1"
    if config.model.distill and ("coca" in config.model.model.lower() or config.model.siglip):
        yield "--distill-model works with the CLIP loss only: use another --model, or leave --siglip out"
    if config.model.siglip and "coca" in config.model.model.lower():
        yield "--siglip cannot be combined with a CoCa model, whose loss is its own: leave it out"
    if config.model.loss_dist_impl is not None and not config.model.siglip:
        yield "--loss-dist-impl needs --siglip"


def _optimizer_contradictions(config: Config) -> Iterator[str]:
    if config.training.lr_scheduler == "const-cooldown" and config.training.epochs_cooldown is None:
        yield "--lr-scheduler const-cooldown needs --epochs-cooldown"
    if config.training.opt != "adamw" and not config.training.opt.startswith("timm/"):
        yield f"--opt {config.training.opt} is unknown: give adamw, or timm/NAME"
    if config.training.opt.startswith("timm/") and (config.training.beta1 is None) != (config.training.beta2 is None):
        yield "with a timm optimizer give both --beta1 and --beta2, or none"


def _folder_contradictions(config: Config) -> Iterator[str]:
    """Those of what is written and reported."""
    for name in config.run.report_to.replace(",", " ").split():
        if name not in ("tensorboard", "wandb", "all"):
            yield f"--report-to {name} is unknown: give tensorboard, wandb or both with a comma"
    for name in _NEED_A_FOLDER:
        if config.get(name) and not config.run.writes_logs:
            yield f"{_flag(name)} needs a run folder: leave --logs none out"


def _without_reuse(strategies: StrategyRegistry, members: Sequence[str]) -> str:
    """The way to a scoring pass over the whole batch."""
    reusing = [name for name in members if strategies[name].reuses]
    return f"use another strategy than {reusing[0]}" if reusing else "leave --score-refresh and presets out"


def _negatives_contradictions(config: Config, strategies: StrategyRegistry, members: Sequence[str]) -> Iterator[str]:
    """Those of ``--select-negatives all``."""
    if not any(strategies[name].scores for name in members):
        yield (
            f"--select-negatives all needs a scoring pass: --select-strategy {config.selection.select_strategy} "
            "has none"
        )
    if _reuses_scores(config, strategies):
        yield (
            f"--select-negatives all needs a scoring pass over the whole batch: {_without_reuse(strategies, members)}"
        )
    if config.training.accum_freq > 1:
        yield "--select-negatives all cannot be combined with --accum-freq above 1: give --accum-freq 1"
    if config.model.siglip or config.model.distill or "coca" in config.model.model.lower():
        yield "--select-negatives all works with the CLIP loss only: leave it out, or use another --model or loss"


def _rate_contradictions(config: Config, strategies: StrategyRegistry) -> Iterator[str]:
    """Those of the share of every batch that is kept over the epochs."""
    selection, epochs = config.selection, config.training.epochs
    if _given(config, ("select_rate_start",)) and selection.select_rate_schedule == "constant":
        yield "--select-rate-start needs --select-rate-schedule linear or cosine"
    if epochs == 0:
        return
    full = full_epochs(selection.select_full_last or 0.0, epochs)
    if selection.select_full_last and full == 0:
        yield (
            f"--select-full-last {selection.select_full_last:g} is less than half an epoch of --epochs {epochs}: make "
            "it larger, or leave it out"
        )
    warm = strategies.warmup_epochs(selection.select_strategy, selection.options)
    if full > 0 and full + warm >= epochs:
        yield (
            f"--select-full-last {selection.select_full_last:g} leaves no epoch of --epochs {epochs} for selection: "
            "make it smaller, or train longer"
        )


def _zeroshot(config: Config) -> bool:
    return any((config.evaluation.imagenet_val, config.evaluation.imagenet_v2, config.evaluation.zeroshot_data))
