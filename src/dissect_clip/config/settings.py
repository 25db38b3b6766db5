"""Every setting of a run, declared once: type, default, help and range. The command line is derived from here.

The options of strategies are declared beside the strategies, see :mod:`dissect_clip.config.options`.

Names and defaults are those of OpenCLIP 3.3.0, so that its command lines work unchanged; the selection flags and the
few others that OpenCLIP lacks are listed in :mod:`dissect_clip.config.flags`.
"""

from __future__ import annotations

import dataclasses
import json
import typing
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar

from dissect_clip.config.fields import COUNT, FINITE, FRACTION, NOT_NEGATIVE, POSITIVE, Range, setting
from dissect_clip.config.run_plan import RunPlan

FAST: dict[str, Any] = {"score_refresh": 0.0, "select_before_load": True}
"""The settings of ``--select-preset fast``; the command line overrides them."""


@dataclass(frozen=True, kw_only=True)
class DataSettings:
    """The settings of the section "data" of ``--help``."""

    title: ClassVar[str] = "data"

    train_data: str | None = setting(
        None,
        "training data: shards as path, brace or glob pattern, or URL, sources joined by `::`; or a csv/tsv file",
        common=True,
    )
    train_data_upsampling_factors: str | None = setting(
        None, "with several sources and --dataset-resampled: how often to draw from each, as 1::2::0.5"
    )
    train_keep: str | None = setting(
        None,
        "train on the samples of this list only; their ids stay. A .parquet, .csv, .tsv or .txt with sample_id, or "
        "shard and key",
        metavar="FILE",
    )
    train_num_samples: int | None = setting(
        None,
        "samples in the training data; needed only if no file records it, or as epoch length if resampled",
        within=COUNT,
        common=True,
    )
    dataset_type: str = setting(
        "auto",
        "type of the data; auto decides by the file name",
        choices=("webdataset", "csv", "synthetic", "auto"),
        common=True,
    )
    dataset_resampled: bool = setting(False, "draw shards with replacement instead of reading each once an epoch")
    json_caption_key: str | None = setting(
        None, "webdataset: the field of KEY.json that holds the caption, if it is not in KEY.txt"
    )
    csv_separator: str = setting("\t", "csv data: what separates the columns")
    csv_img_key: str = setting("filepath", "csv data: the column with the image paths")
    csv_caption_key: str = setting("title", "csv data: the column with the captions")
    max_skip_fraction: float = setting(
        0.05,
        "stop when more than this share of the training samples cannot be used, naming the worst shards; 1 never stops",
        within=Range(at_least=0, at_most=1),
    )
    data_timeout: float = setting(
        300.0, "give up a remote shard that sends nothing for this many seconds, and count its samples", within=POSITIVE
    )
    fast_decode: bool = setting(
        False,
        "decode training JPEGs at the lowest resolution that fills the crop, and resize faster; pixels differ slightly",
    )
    workers: int = setting(
        4, "loader processes per GPU; 0 loads in the training process", within=NOT_NEGATIVE, common=True
    )

    @property
    def trains(self) -> bool:
        """Whether there is anything to train on; otherwise the run only evaluates."""
        return self.train_data is not None or self.dataset_type == "synthetic"


@dataclass(frozen=True, kw_only=True)
class ModelSettings:
    """The settings of the section "model" of ``--help``."""

    title: ClassVar[str] = "model"

    model: str = setting("RN50", "name of an OpenCLIP model, or of one in --model-config", common=True)
    model_config: str | None = setting(None, "a JSON file, or a folder of them, with model configurations of your own")
    pretrained: str = setting("", "start from these weights: a tag that OpenCLIP knows, or a file", common=True)
    pretrained_image: bool = setting(False, "start from ImageNet weights in the image tower where there are any")
    cache_dir: str | None = setting(None, "where downloaded models and tokenizers are kept")
    lock_image: bool = setting(False, "lock the image tower (LiT)")
    lock_image_unlocked_groups: int = setting(
        0, "with --lock-image: leave the last n layer groups unlocked", within=NOT_NEGATIVE
    )
    lock_image_freeze_bn_stats: bool = setting(
        False, "with --lock-image: freeze BatchNorm's running statistics in the locked layers"
    )
    lock_text: bool = setting(False, "lock the text tower")
    lock_text_unlocked_layers: int = setting(
        0, "with --lock-text: leave the last n layers unlocked", within=NOT_NEGATIVE
    )
    lock_text_freeze_layer_norm: bool = setting(False, "with --lock-text: freeze LayerNorm in the locked layers")
    image_mean: tuple[float, ...] | None = setting(
        None, "override the mean the images are normalised with", within=FINITE
    )
    image_std: tuple[float, ...] | None = setting(
        None, "override the standard deviation the images are normalised with", within=POSITIVE
    )
    image_interpolation: str | None = setting(
        None, "override the resize interpolation", choices=("bicubic", "bilinear", "random")
    )
    image_resize_mode: str | None = setting(
        None,
        "override how images are resized and cropped at evaluation",
        choices=("shortest", "longest", "squash"),
    )
    aug_cfg: dict[str, Any] = setting({}, "augmentation of training images, as key=value ...", metavar="KEY=VALUE")
    force_context_length: int | None = setting(None, "override the text's length in tokens", within=COUNT)
    force_image_size: tuple[int, ...] | None = setting(
        None, "override the image size: one number, or height and width", within=COUNT
    )
    force_quick_gelu: bool = setting(False, "use QuickGELU even if the model's configuration does not")
    force_patch_dropout: float | None = setting(
        None, "override the share of patches dropped in training", within=Range(at_least=0, at_most=0.999)
    )
    force_custom_text: bool = setting(False, "build the model with a separate text tower (CustomTextCLIP)")
    grad_checkpointing: bool = setting(False, "recompute activations in the backward pass to save memory")
    siglip: bool = setting(False, "train with SigLIP's sigmoid loss")
    loss_dist_impl: str | None = setting(
        None, "SigLIP: how the ranks exchange features", choices=("bidir", "shift", "reduce", "gather")
    )
    coca_caption_loss_weight: float = setting(2.0, "CoCa: weight of the captioning loss", within=NOT_NEGATIVE)
    coca_contrastive_loss_weight: float = setting(1.0, "CoCa: weight of the contrastive loss", within=NOT_NEGATIVE)
    distill_model: str | None = setting(None, "distil from this model, with --distill-pretrained")
    distill_pretrained: str | None = setting(None, "the weights to distil from")

    @property
    def distill(self) -> bool:
        """Whether a teacher is distilled from."""
        return self.distill_model is not None and self.distill_pretrained is not None

    @property
    def image_size(self) -> int | tuple[int, ...] | None:
        """``--force-image-size`` as open_clip takes it."""
        size = self.force_image_size
        return size[0] if size is not None and len(size) == 1 else size


@dataclass(frozen=True, kw_only=True)
class TrainingSettings:
    """The settings of the section "training" of ``--help``."""

    title: ClassVar[str] = "training"

    batch_size: int = setting(
        64, "samples per GPU and step; with --select the oversampled batch that is scored", within=COUNT, common=True
    )
    epochs: int = setting(32, "epochs to train for", within=NOT_NEGATIVE, common=True)
    epochs_cooldown: int | None = setting(None, "const-cooldown: the last n epochs cool down", within=NOT_NEGATIVE)
    lr: float | None = setting(
        None, "learning rate (default 5e-4, or the optimizer's own with timm/...)", within=NOT_NEGATIVE, common=True
    )
    beta1: float | None = setting(None, "Adam's beta 1 (default 0.9)", within=Range(at_least=0, below=1))
    beta2: float | None = setting(
        None, "Adam's beta 2 (default 0.98 for ViT, 0.999 otherwise)", within=Range(at_least=0, below=1)
    )
    eps: float | None = setting(None, "Adam's epsilon (default 1e-6 for ViT, 1e-8 otherwise)", within=NOT_NEGATIVE)
    wd: float = setting(0.2, "weight decay", within=NOT_NEGATIVE)
    momentum: float | None = setting(None, "momentum of timm optimizers", within=Range(at_least=0, at_most=1))
    opt: str = setting("adamw", "optimizer: adamw, or timm/NAME")
    warmup: int = setting(10000, "steps in which the learning rate warms up", within=NOT_NEGATIVE, common=True)
    lr_scheduler: str = setting(
        "cosine", "schedule of the learning rate", choices=("cosine", "const", "const-cooldown")
    )
    lr_cooldown_end: float = setting(0.0, "const-cooldown: the learning rate at the end", within=NOT_NEGATIVE)
    lr_cooldown_power: float = setting(1.0, "const-cooldown: power of the polynomial, 1 is linear", within=POSITIVE)
    skip_scheduler: bool = setting(False, "keep the learning rate constant, without warm-up")
    grad_clip_norm: float | None = setting(None, "clip the gradient at this norm", within=POSITIVE)
    accum_freq: int = setting(1, "batches accumulated for one optimizer step", within=COUNT, common=True)
    precision: str = setting(
        "amp",
        "floating point precision; amp is fp16 with a gradient scaler on a GPU, bf16 on a CPU",
        choices=("amp", "amp_bf16", "amp_bfloat16", "bf16", "fp16", "pure_bf16", "pure_fp16", "fp32"),
        common=True,
    )
    max_nonfinite_steps: int = setting(
        10,
        "stop after this many consecutive steps with a loss or gradient that is not finite; they are left out, or "
        "with --opt timm/... taken with a gradient of 0",
        within=COUNT,
    )
    local_loss: bool = setting(False, "compute each rank's rows of the loss only")
    gather_with_grad: bool = setting(False, "let the gradient flow through the gathered features")
    use_bn_sync: bool = setting(False, "synchronise BatchNorm over the ranks")
    channels_last: bool = setting(
        False,
        "keep convolution weights, and so what they compute, in channels-last order: faster for convolutional image "
        "towers; other kernels, which round otherwise",
    )
    torchcompile: bool = setting(False, "compile the model with torch.compile")
    seed: int = setting(0, "seed of every random choice", within=Range(at_least=0, below=2**64))


@dataclass(frozen=True, kw_only=True)
class SelectionSettings:
    """The settings of the section "online sample selection" of ``--help``."""

    title: ClassVar[str] = "online sample selection"

    select: bool = setting(False, "train on the best part of every batch only", common=True)
    select_strategy: str = setting(
        "warmup_base_sampling",
        "how samples are ranked: a name from the list below, or several with weights, as A:0.7+B:0.3, for the weighted "
        "sum of their ranks",
        metavar="STRATEGY",
        common=True,
    )
    select_rate: float = setting(0.3, "share of every batch that is trained on", within=FRACTION, common=True)
    select_rate_schedule: str = setting(
        "constant",
        "how that share gets from --select-rate-start to --select-rate, from the first epoch after a warm-up to the "
        "last that selects",
        choices=("constant", "linear", "cosine"),
    )
    select_rate_start: float = setting(
        1.0, "share of every batch that linear and cosine schedules begin with", within=FRACTION
    )
    select_full_last: float | None = setting(
        None,
        "train on everything in this share of the epochs, the last ones (default: 0, or the strategy's own)",
        within=Range(at_least=0, at_most=1),
    )
    select_score_mode: str = setting(
        "eval",
        "mode of the model while it scores; train keeps dropout and batch statistics on",
        choices=("eval", "train"),
    )
    select_negatives: str = setting(
        "selected",
        "negatives of the selected pairs: selected is each other; all also uses the pairs that were not "
        "selected, by the features of the scoring pass",
        choices=("selected", "all"),
    )
    score_keep_locked: bool = setting(
        False,
        "with a tower that is locked as a whole: train on the features that the scoring pass computed with it, which "
        "up to rounding are those that training would compute",
    )
    select_preset: str | None = setting(
        None,
        "where scores come from: exact scores every sample in every step; fast is --score-refresh 0 "
        "--select-before-load (default: exact; fast for a strategy that needs no scoring pass)",
        choices=("exact", "fast"),
    )
    score_refresh: float | None = setting(
        None,
        "share of every batch that gets a scoring pass; the others are ranked by their last known score, and training "
        "renews the scores of those it takes. 1 scores all, 0 none after the first epoch (default: by --select-preset)",
        within=Range(at_least=0, at_most=1),
    )
    select_before_load: bool = setting(
        False,
        "choose in the loader, by scores known at the start of the epoch: samples that are not chosen are not decoded",
    )
    score_batch_size: int | None = setting(
        None, "score this many pairs at a time, to need less memory (default: the whole batch)", within=COUNT
    )
    score_image_size: int | None = setting(
        None, "score images of n x n pixels, to need less time (default: as in training)", within=COUNT
    )
    score_patch_dropout: float = setting(
        0.0, "vision transformers: share of the patches left out in scoring", within=Range(at_least=0, at_most=0.999)
    )
    score_context_length: int | None = setting(
        None, "score captions cut to n tokens (default: as in training)", within=Range(at_least=2)
    )
    record: bool = setting(
        False, "write scores and choices of every sample to RUN/record, one Parquet file an epoch", common=True
    )

    options: Mapping[str, Any] = field(default_factory=dict)
    """Options of strategies by name; a strategy uses its own, see :mod:`dissect_clip.config.options`."""


@dataclass(frozen=True, kw_only=True)
class EvaluationSettings:
    """The settings of the section "evaluation" of ``--help``."""

    title: ClassVar[str] = "evaluation"

    val_data: str | None = setting(
        None, "validation data for retrieval, in the same forms as --train-data", common=True
    )
    val_num_samples: int | None = setting(
        None, "samples in the validation data; informative only, the whole set is always read", within=COUNT
    )
    val_captions: str = setting(
        "lines",
        "validation captions: each line of KEY.txt is one caption of the image, or the whole file is",
        choices=("lines", "whole"),
    )
    imagenet_val: str | None = setting(
        None,
        "zero-shot classification: ImageNet's validation set, an ImageFolder or a CLIP_benchmark webdataset",
        common=True,
    )
    imagenet_v2: str | None = setting(None, "zero-shot classification: ImageNet-V2, in the same forms")
    zeroshot_data: str | None = setting(
        None,
        "zero-shot classification on any set: an ImageFolder or a CLIP_benchmark webdataset; several joined by `::`",
    )
    val_frequency: int = setting(
        1,
        "evaluate on --val-data every n epochs; 0 is never",
        within=NOT_NEGATIVE,
    )
    zeroshot_frequency: int = setting(2, "classify zero-shot every n epochs; 0 is never", within=NOT_NEGATIVE)


@dataclass(frozen=True, kw_only=True)
class RunSettings:
    """The settings of the section "run folder and logs" of ``--help``."""

    title: ClassVar[str] = "run folder and logs"

    logs: str = setting(
        "./logs/",
        "folder of the run folders; none writes nothing. Under torchrun use --output-dir, or put -- before the script",
        aliases=("--output-dir",),
        common=True,
    )
    log_local: bool = setting(False, "write a log file on every node, not on the first only")
    name: str | None = setting(None, "name of the run and its folder (default: time and main settings)", common=True)
    log_every_n_steps: int = setting(100, "log every n steps", within=COUNT)
    report_to: str = setting(
        "", "where to report besides the console: tensorboard, wandb, or both with a comma", common=True
    )
    wandb_notes: str = setting("", "notes for wandb")
    wandb_project_name: str = setting("open-clip", "project name for wandb")
    debug: bool = setting(False, "log more")
    copy_codebase: bool = setting(False, "copy the package's source into the run folder")
    remote_sync: str | None = setting(None, "copy the run folder to this remote path during training")
    remote_sync_frequency: int = setting(300, "seconds between two copies", within=COUNT)
    remote_sync_protocol: str = setting("s3", "how to copy", choices=("s3", "fsspec"))

    @property
    def writes_logs(self) -> bool:
        """Whether the run has a folder."""
        return self.logs.lower() != "none"


@dataclass(frozen=True, kw_only=True)
class CheckpointSettings:
    """The settings of the section "checkpoints" of ``--help``."""

    title: ClassVar[str] = "checkpoints"

    resume: str | None = setting(None, "continue from this checkpoint; latest finds the newest of the run", common=True)
    save_frequency: int = setting(1, "keep a checkpoint every n epochs; 0 keeps the last only", within=NOT_NEGATIVE)
    save_most_recent: bool = setting(False, "also keep the newest checkpoint as epoch_latest.pt")
    save_every_n_steps: int = setting(0, "also save inside an epoch, every n steps; 0 is never", within=NOT_NEGATIVE)
    save_every_minutes: float = setting(
        0.0, "also save inside an epoch, whenever this many minutes have passed; 0 is never", within=NOT_NEGATIVE
    )
    on_save_error: str = setting(
        "continue",
        "when a checkpoint, a log or a record cannot be written: say so, train on and try again later, or stop",
        choices=("continue", "stop"),
    )
    delete_previous_checkpoint: bool = setting(False, "delete the checkpoint before after storing a new one")


@dataclass(frozen=True, kw_only=True)
class DistributedSettings:
    """The settings of the section "distributed training" of ``--help``."""

    title: ClassVar[str] = "distributed training"

    device: str = setting("cuda", "accelerator to use; without one the run continues on the CPU")
    dist_url: str | None = setting(None, "URL to set up the process group with")
    dist_backend: str | None = setting(None, "backend of the process group (default: nccl on a GPU, gloo on a CPU)")
    no_set_device_rank: bool = setting(
        False, "leave the device index alone, if CUDA_VISIBLE_DEVICES gives each process one GPU"
    )
    rank_timeout: float = setting(
        600.0,
        "end the run if a rank does not answer, or makes no progress, for this many seconds; names it and its phase; "
        "longer than any step or evaluation batch, and not below 5, before which no rank counts as lost",
        within=POSITIVE,
    )
    ddp_static_graph: bool = setting(False, "DistributedDataParallel with a static graph")


@dataclass(frozen=True, kw_only=True)
class Config:
    """A run's settings in groups; flat on the command line and in ``config.json``.

    Built by :func:`dissect_clip.config.parser.parse_args`; frozen, and saved as JSON in the run folder.
    """

    data: DataSettings = field(default_factory=DataSettings)
    model: ModelSettings = field(default_factory=ModelSettings)
    training: TrainingSettings = field(default_factory=TrainingSettings)
    selection: SelectionSettings = field(default_factory=SelectionSettings)
    evaluation: EvaluationSettings = field(default_factory=EvaluationSettings)
    run: RunSettings = field(default_factory=RunSettings)
    checkpoint: CheckpointSettings = field(default_factory=CheckpointSettings)
    distributed: DistributedSettings = field(default_factory=DistributedSettings)

    @classmethod
    def of(cls, **settings: Any) -> Config:
        """The settings with these values, by their names on the command line, and defaults for the others.

        A name that is no setting counts as an option of a strategy. Building the strategy raises if none has it.
        """
        return cls().replace(**settings)

    def replace(self, **settings: Any) -> Config:
        """A copy with other values, by their names on the command line; see :meth:`of`."""
        groups: dict[str, dict[str, Any]] = {}
        for name, value in settings.items():
            groups.setdefault(GROUP_OF.get(name, "options"), {})[name] = value
        options = groups.pop("options", {})
        if options:
            groups.setdefault("selection", {})["options"] = {**self.selection.options, **options}
        return dataclasses.replace(
            self, **{group: dataclasses.replace(getattr(self, group), **own) for group, own in groups.items()}
        )

    def get(self, name: str) -> Any:
        """The value of a setting or of a strategy's option, by its name on the command line.

        Raises:
            KeyError: if there is none of this name.
        """
        if name not in GROUP_OF:
            return self.selection.options[name]
        return getattr(getattr(self, GROUP_OF[name]), name)

    def plan(self) -> RunPlan:
        """What strategies may know of the run."""
        return RunPlan(**{name: self.get(name) for name in RunPlan.__dataclass_fields__ if name in GROUP_OF})

    def flat(self) -> dict[str, Any]:
        """All values by name: settings in the order of ``--help``, then the options of strategies."""
        return {name: self.get(name) for name in GROUP_OF} | dict(self.selection.options)

    def to_json(self) -> str:
        """All settings as indented JSON, sorted by name."""
        return json.dumps(self.flat(), indent=2, sort_keys=True)


GROUPS: dict[str, Any] = {
    "data": DataSettings,
    "model": ModelSettings,
    "training": TrainingSettings,
    "selection": SelectionSettings,
    "evaluation": EvaluationSettings,
    "run": RunSettings,
    "checkpoint": CheckpointSettings,
    "distributed": DistributedSettings,
}
"""The groups of settings by their names in :class:`Config`."""

GROUP_OF: dict[str, str] = {
    setting.name: group
    for group, settings in GROUPS.items()
    for setting in dataclasses.fields(settings)
    if "help" in setting.metadata
}
"""The group of every setting."""


def declared() -> dict[str, tuple[dataclasses.Field[Any], Any]]:
    """Every setting by its name, without the options of strategies: its declaration and its type."""
    found: dict[str, tuple[dataclasses.Field[Any], Any]] = {}
    for settings in GROUPS.values():
        hints = typing.get_type_hints(settings)
        found |= {
            setting.name: (setting, hints[setting.name])
            for setting in dataclasses.fields(settings)
            if "help" in setting.metadata
        }
    return found
