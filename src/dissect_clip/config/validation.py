"""Settings that do not go together, each with a sentence that says what to do about it."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence

from dissect_clip.config.settings import (
    CLEAN_POSTERIOR,
    WITH_REFERENCE,
    Config,
    declared,
    full_epochs,
    parse_strategy,
    warming_up,
)

_SHORTCUTS = ("score_batch_size", "score_image_size", "score_patch_dropout", "score_context_length")

_CLEAN = (
    "clean_statistic", "clean_ensemble", "clean_ema", "clean_drift", "clean_model", "clean_decoys", "clean_quantile",
    "clean_exponent", "clean_floor", "clean_forget", "clean_gate", "clean_ratio",
)  # fmt: skip

_ONLY_WITH_SELECT = (
    "select_strategy", "select_rate", "warmup_point", "warmup_select_rate", "select_momentum", "select_score_mode",
    "select_preset", "score_refresh", "select_before_load", "score_keep_locked", "select_negatives",
    "select_rate_schedule", "select_rate_start", "select_full_last", "select_rescale",
    "infobatch_prune_ratio", "scan_warmup", "scan_period", "scan_redundant",
    *_SHORTCUTS, "record",
    "select_reference", "select_reference_model", "jest_chunks", "jest_gain", "jest_deterministic", "divbs_on",
    "divbs_greedy", "negcliploss_batches", "negcliploss_batch_size", "negcliploss_temperature", *_CLEAN,
)  # fmt: skip

_ONLY_WITH_STRATEGY = {
    "select_reference": WITH_REFERENCE,
    "select_reference_model": WITH_REFERENCE,
    "jest_chunks": ("jest",),
    "jest_gain": ("jest",),
    "jest_deterministic": ("jest",),
    "divbs_on": ("divbs",),
    "divbs_greedy": ("divbs",),
    "negcliploss_batches": ("negcliploss",),
    "negcliploss_batch_size": ("negcliploss",),
    "negcliploss_temperature": ("negcliploss",),
    **dict.fromkeys(_CLEAN, (CLEAN_POSTERIOR,)),
}
"""Settings that mean something with these strategies alone."""

_SCORE_NOTHING = ("random", "infobatch", "scan")
"""Strategies without a scoring pass."""

_ALONE = ("random", "infobatch", "scan", CLEAN_POSTERIOR)
"""Strategies that cannot be combined with others, whose rank says nothing or goes with a plan of its own."""

_LENGTHS = {"image_mean": (1, 3), "image_std": (1, 3), "force_image_size": (1, 2)}
"""How many numbers a setting may hold: one for all, or one for each channel or side."""

_NEED_A_FOLDER = (
    "save_most_recent", "save_every_n_steps", "save_every_minutes", "remote_sync", "record", "copy_codebase",
)  # fmt: skip

_DEFAULTS = {name: field.default for name, (field, _) in declared().items()}


def contradictions(config: Config) -> Iterator[str]:
    """What cannot mean anything in a combination of settings, a line each; each names the flags and a way out."""
    strategies = tuple(parse_strategy(config.selection.select_strategy))
    yield from _warmup_contradictions(config, strategies)
    if config.selection.select:
        yield from _reference_contradictions(config, strategies)
    yield from _scoring_contradictions(config, strategies)
    if config.selection.select:
        yield from _rate_contradictions(config, strategies)
        if strategies == (CLEAN_POSTERIOR,):
            yield from _clean_contradictions(config)
        if config.selection.select_negatives == "all":
            yield from _negatives_contradictions(config, strategies)
    yield from _data_contradictions(config)
    yield from _loss_contradictions(config)
    yield from _optimizer_contradictions(config)
    yield from _folder_contradictions(config)


def _flag(name: str) -> str:
    return "--" + name.replace("_", "-")


def _given(config: Config, names: Iterable[str]) -> list[str]:
    """Those of the settings that are not what they are by default."""
    return [name for name in names if config.get(name) != _DEFAULTS[name]]


def _warmup_contradictions(config: Config, strategies: Sequence[str]) -> Iterator[str]:
    """Those of selection without ``--select``, and of a warm-up that leaves nothing to it, or too little."""
    warming = warming_up(config.selection, strategies)
    if not config.selection.select:
        for name in _given(config, _ONLY_WITH_SELECT):
            yield f"{_flag(name)} needs --select (with --select-rate 1.0 every sample is trained on)"
    elif not config.data.trains:
        yield "--select needs training data: give --train-data"
    elif warming and 0 < config.training.epochs <= config.selection.warmup_epochs:
        yield (
            f"--warmup-point {config.selection.warmup_epochs} leaves no epoch of --epochs "
            f"{config.training.epochs} for selection: "
            "make it smaller, or train longer"
        )
    elif "warmup_base_sampling" in strategies and config.selection.warmup_point == 0:
        yield "--warmup-point 0 leaves warmup_base_sampling without a reference: give at least 1"
    elif warming == (CLEAN_POSTERIOR,) and config.selection.warmup_point == 0 and config.selection.clean_decoys > 0:
        yield "--warmup-point 0 leaves no epoch for the decoys: give at least 1, or --clean-decoys 0"
    elif warming and config.selection.warmup_point == 0 and warming != (CLEAN_POSTERIOR,):
        yield f"--warmup-point 0 leaves {warming[0]} without a reference: give at least 1, or --select-reference"
    if config.selection.warmup_select_rate is not None and strategies[0] not in warming:
        given = "" if config.selection.select_reference is None else " and --select-reference"
        chosen = f"--select-strategy {config.selection.select_strategy}{given}"
        yield f"--warmup-select-rate has no meaning with {chosen}: leave it out"


def _scoring_contradictions(config: Config, strategies: Sequence[str]) -> Iterator[str]:
    """Those of the scoring pass, and of choosing without one."""
    if config.selection.score_keep_locked and not (config.model.lock_image or config.model.lock_text):
        yield "--score-keep-locked needs a locked tower: give --lock-image or --lock-text"
    if config.selection.score_keep_locked and config.selection.reuses_scores:
        yield f"--score-keep-locked needs a scoring pass over the whole batch: {_without_reuse(config)}"
    if (
        config.selection.select_before_load or config.selection.select_preset == "fast"
    ) and config.data.dataset_resampled:
        yield (
            "--dataset-resampled may draw a sample twice in an epoch, so --select-before-load, also as a part of "
            "--select-preset fast, cannot choose ahead of time: leave one of them out (--score-refresh alone works)"
        )
    clean_scores_nothing = strategies == (CLEAN_POSTERIOR,) and not config.selection.score_refresh
    if config.selection.select and (set(strategies) <= set(_SCORE_NOTHING) or clean_scores_nothing):
        way_out = ": give --score-refresh, too, or leave it out" if clean_scores_nothing else ""
        strategy = f"--select-strategy {config.selection.select_strategy}"
        for name in _given(config, _SHORTCUTS):
            yield f"{_flag(name)} has no meaning with {strategy}, which scores nothing{way_out}"


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


def _without_reuse(config: Config) -> str:
    """The way to a scoring pass over the whole batch."""
    if config.selection.select_strategy == CLEAN_POSTERIOR:
        return f"use another strategy than {CLEAN_POSTERIOR}"
    return "leave --score-refresh and presets out"


def _reference_contradictions(config: Config, strategies: Sequence[str]) -> Iterator[str]:
    """Those of the settings of strategies that look at features or at a reference model."""
    for name in _given(config, _ONLY_WITH_STRATEGY):
        if not set(_ONLY_WITH_STRATEGY[name]) & set(strategies):
            owner = " or ".join(_ONLY_WITH_STRATEGY[name])
            yield (
                f"{_flag(name)} has no meaning with --select-strategy {config.selection.select_strategy}: it is for "
                f"{owner}"
            )
    if config.selection.select_reference_model is not None and config.selection.select_reference is None:
        yield "--select-reference-model needs --select-reference: give the weights"
    if config.selection.jest_deterministic and _given(config, ("jest_gain",)):
        yield "--jest-gain has no meaning with --jest-deterministic, which draws nothing: leave it out"


def _negatives_contradictions(config: Config, strategies: Sequence[str]) -> Iterator[str]:
    """Those of ``--select-negatives all``."""
    if set(strategies) <= set(_SCORE_NOTHING):
        yield (
            f"--select-negatives all needs a scoring pass: --select-strategy {config.selection.select_strategy} "
            "has none"
        )
    if config.selection.reuses_scores:
        yield f"--select-negatives all needs a scoring pass over the whole batch: {_without_reuse(config)}"
    if config.training.accum_freq > 1:
        yield "--select-negatives all cannot be combined with --accum-freq above 1: give --accum-freq 1"
    if config.model.siglip or config.model.distill or "coca" in config.model.model.lower():
        yield "--select-negatives all works with the CLIP loss only: leave it out, or use another --model or loss"


def _clean_contradictions(config: Config) -> Iterator[str]:
    needs = {
        "clean_gate": (config.selection.clean_decoys > 0, "decoys", "leave --clean-decoys 0 out"),
        "clean_ratio": (config.selection.clean_decoys == 0, "no decoys", "add --clean-decoys 0"),
        "clean_quantile": (config.selection.clean_model == "quantile", "that model", "add --clean-model quantile"),
        "clean_ema": (config.selection.clean_ensemble == "ema", "that ensemble", "add --clean-ensemble ema"),
    }
    for name in _given(config, needs):
        has_meaning, what, way_out = needs[name]
        if not has_meaning:
            yield f"{_flag(name)} needs {what} to have a meaning: {way_out}, or leave it out"


def _rate_contradictions(config: Config, strategies: Sequence[str]) -> Iterator[str]:
    """Those of the settings that say how much is trained on when; ``strategies`` are those that are combined."""
    if len(strategies) > 1:
        for name in sorted(set(strategies) & set(_ALONE)):
            yield (
                f"--select-strategy {config.selection.select_strategy}: {name} cannot be combined with others, leave "
                "it out"
            )
    for name in _given(config, ("infobatch_prune_ratio", "scan_warmup", "scan_period", "scan_redundant")):
        owner = name.partition("_")[0]
        if owner not in strategies:
            yield (
                f"{_flag(name)} has no meaning with --select-strategy {config.selection.select_strategy}: it is for "
                f"{owner}"
            )
    if _given(config, ("select_rescale",)) and "infobatch" not in strategies:
        yield (
            f"--select-rescale has no meaning with --select-strategy {config.selection.select_strategy}, which "
            "weights nothing"
        )
    if _given(config, ("select_rate_start",)) and config.selection.select_rate_schedule == "constant":
        yield "--select-rate-start needs --select-rate-schedule linear or cosine"
    if config.selection.infobatch_prune_ratio is not None:
        for name in _given(config, ("select_rate", "select_rate_schedule")):
            yield (
                f"{_flag(name)} has no meaning with --infobatch-prune-ratio, which sets the rate: leave one of them out"
            )
    if config.training.epochs > 0:
        full = full_epochs(config.selection.select_full_last or 0.0, config.training.epochs)
        if config.selection.select_full_last and full == 0:
            yield (
                f"--select-full-last {config.selection.select_full_last:g} is less than half an epoch of --epochs "
                f"{config.training.epochs}: make it larger, or leave it out"
            )
        warm = config.selection.warmup_epochs if warming_up(config.selection, strategies) else 0
        if full > 0 and full + warm >= config.training.epochs:
            yield (
                f"--select-full-last {config.selection.select_full_last:g} leaves no epoch of --epochs "
                f"{config.training.epochs} for "
                "selection: make it smaller, or train longer"
            )
        elif "scan" in strategies and full + config.selection.scan_warmup + 1 >= config.training.epochs:
            yield (
                f"--scan-warmup {config.selection.scan_warmup} and the epoch that finds candidates leave no epoch of "
                "--epochs "
                f"{config.training.epochs} for selection: make it smaller, or train longer"
            )


def _zeroshot(config: Config) -> bool:
    return any((config.evaluation.imagenet_val, config.evaluation.imagenet_v2, config.evaluation.zeroshot_data))
