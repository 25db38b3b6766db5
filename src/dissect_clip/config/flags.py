"""How the flags differ from those of OpenCLIP 3.3.0: what is added, and what is refused and why."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Unsupported:
    """A flag of OpenCLIP that is refused, and what to do instead."""

    reason: str
    instead: str
    takes_value: bool = False


ADDED: dict[str, str] = {
    "json_caption_key": "captions inside KEY.json",
    "val_captions": "retrieval sets with several captions an image",
    "zeroshot_data": "zero-shot classification on sets other than ImageNet",
    "model_config": "model configurations without changing open_clip",
    "train_keep": "training on a list of samples",
    "max_skip_fraction": "damaged data",
    "data_timeout": "damaged data",
    "fast_decode": "faster loading",
    "channels_last": "faster convolutions",
    "max_nonfinite_steps": "training that goes wrong",
    "save_every_n_steps": "checkpoints in the middle of an epoch",
    "save_every_minutes": "checkpoints in the middle of an epoch",
    "on_save_error": "disks that are full or gone",
    "rank_timeout": "ranks that die or stall",
    "select": "online sample selection",
    "select_strategy": "online sample selection",
    "select_rate": "online sample selection",
    "select_rate_schedule": "select rates that change",
    "select_rate_start": "select rates that change",
    "select_full_last": "select rates that change",
    "select_rescale": "strategies that weight samples",
    "infobatch_prune_ratio": "online sample selection",
    "scan_warmup": "online sample selection",
    "scan_period": "online sample selection",
    "scan_redundant": "online sample selection",
    "warmup_point": "online sample selection",
    "warmup_select_rate": "online sample selection",
    "select_momentum": "online sample selection",
    "select_score_mode": "online sample selection",
    "select_reference": "selection with a reference model",
    "select_reference_model": "selection with a reference model",
    "jest_chunks": "joint selection",
    "jest_gain": "joint selection",
    "jest_deterministic": "joint selection",
    "clean_statistic": "selection by P(clean)",
    "clean_ensemble": "selection by P(clean)",
    "clean_ema": "selection by P(clean)",
    "clean_drift": "selection by P(clean)",
    "clean_model": "selection by P(clean)",
    "clean_decoys": "selection by P(clean)",
    "clean_quantile": "selection by P(clean)",
    "clean_exponent": "selection by P(clean)",
    "clean_floor": "selection by P(clean)",
    "clean_forget": "selection by P(clean)",
    "clean_gate": "selection by P(clean)",
    "clean_ratio": "selection by P(clean)",
    "divbs_on": "joint selection",
    "divbs_greedy": "joint selection",
    "negcliploss_batches": "selection by a normalised score",
    "negcliploss_batch_size": "selection by a normalised score",
    "negcliploss_temperature": "selection by a normalised score",
    "select_preset": "cheaper selection",
    "score_refresh": "cheaper selection",
    "select_before_load": "cheaper selection",
    "score_batch_size": "a cheaper scoring pass",
    "score_image_size": "a cheaper scoring pass",
    "score_patch_dropout": "a cheaper scoring pass",
    "score_context_length": "a cheaper scoring pass",
    "score_keep_locked": "a cheaper scoring pass",
    "select_negatives": "online sample selection",
    "record": "online sample selection",
}
"""Our own settings, which OpenCLIP does not have, and what each is for."""

UNSUPPORTED: dict[str, Unsupported] = {
    "--torchscript": Unsupported(
        "a scripted model cannot be scored without gradients and trained in one run, and torch deprecates TorchScript",
        "leave it out, or use --torchcompile",
    ),
    "--trace": Unsupported(
        "a traced model has a fixed batch size, and selection changes it",
        "leave it out; evaluation needs no tracing",
    ),
    "--horovod": Unsupported(
        "horovod is no longer maintained, and its collectives are not those of torch",
        "start with torchrun, which uses DistributedDataParallel",
    ),
    "--use-bnb-linear": Unsupported(
        "it needs modules of an old bitsandbytes that do not work with the torch this project needs",
        "use --precision amp_bf16 or bf16",
        takes_value=True,
    ),
}
"""OpenCLIP's training flags that are refused."""
