"""How the flags differ from those of OpenCLIP 3.3.0 and of earlier versions: what is added, refused or removed."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Unsupported:
    """A flag that is refused, and what to do instead."""

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
    "select_score_mode": "online sample selection",
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
"""Our own settings, which OpenCLIP does not have, and what each is for; the options of strategies are ours, too."""

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

_STUDY = "in the ablation of experiments/small/clean_posterior (R@Sum over three seeds"

REMOVED: dict[str, Unsupported] = {
    "--clean-statistic": Unsupported(
        f"{_STUDY}), clipscore was 2.0 below the z-score and loss not clearly above it (1.9, deviation 2.2)",
        "leave it out: the statistic is the z-score of the cosine",
    ),
    "--clean-ensemble": Unsupported(
        f"{_STUDY}), the last visit was 6.6 and the mean of all visits 2.0 below the moving average",
        "leave it out: it is a moving average",
    ),
    "--clean-ema": Unsupported(
        "all results were obtained with its default",
        "leave it out: the weight of a new visit is 0.5",
    ),
    "--clean-drift": Unsupported(
        f"{_STUDY}), keeping the drift of the scores was 3.3 below removing it",
        "leave it out: the drift is removed",
    ),
    "--clean-model": Unsupported(
        f"{_STUDY}), beta distributions were 7.3 and Gaussians with two variances 8.2 below two Gaussians with one "
        "variance; a quantile needs the true share of mismatched pairs, which is unknown",
        "leave it out: the model is two Gaussians with one variance",
    ),
    "--clean-quantile": Unsupported(
        "it belonged to --clean-model quantile, which needs the true share of mismatched pairs",
        "leave it out: the decoys estimate that share",
    ),
    "--clean-forget": Unsupported(
        f"{_STUDY}), forgetting samples that are not visited was 2.7 below remembering them",
        "leave it out: nothing is forgotten",
    ),
    "--clean-ratio": Unsupported(
        "it counted only without decoys, where all results were obtained with its default",
        "leave it out: without decoys the ratio is 0.5, with decoys --clean-gate decides",
    ),
    "--divbs-on": Unsupported(
        "the published method spans gradients, and no study was made with features",
        "leave it out: the gradients are spanned",
    ),
    "--divbs-greedy": Unsupported(
        "the published algorithm is the simplified one, and no study was made with the exact one",
        "leave it out: the simplified algorithm is used",
    ),
    "--jest-deterministic": Unsupported(
        "taking the best pairs of each chunk is the limit of a large gain",
        "give a large --jest-gain, such as 1000",
        takes_value=False,
    ),
}
"""Flags of earlier versions that were removed since studies showed no use for them, or none was made with them."""
