"""``dissect-clip evaluate``: a checkpoint, ours or any of open_clip, on datasets in CLIP_benchmark's layout.

Flags and results are named as CLIP_benchmark names them; settings of the training command keep their names and
defaults. Imports no torch.
"""

from __future__ import annotations

import argparse
import dataclasses
import typing
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from dissect_clip.cli.exit_status import only_first_rank_prints
from dissect_clip.cli.results import COLUMNS
from dissect_clip.config.fields import Range, section, setting
from dissect_clip.config.parser import Parser, add_argument, parse_values
from dissect_clip.config.settings import Config, declared
from dissect_clip.config.validation import wrong_lengths

EXAMPLES = """\
examples:
  dissect-clip evaluate --dataset data/flickr30k --model ViT-B-32 --checkpoint logs/RUN/checkpoints/epoch_32.pt
  dissect-clip evaluate --dataset cifar10 --dataset-root 'data/{dataset}' --model ViT-B-32 --pretrained openai
"""

SHARED = (
    "model", "model_config", "pretrained", "cache_dir", "image_mean", "image_std", "image_interpolation",
    "image_resize_mode", "siglip", "force_context_length", "force_image_size", "force_quick_gelu", "force_custom_text",
    "batch_size", "precision", "seed", "workers", "data_timeout",
    "device", "dist_url", "dist_backend", "no_set_device_rank", "rank_timeout", "debug",
)  # fmt: skip
"""Settings of the training command that mean the same here."""


@dataclass(frozen=True, kw_only=True)
class Settings:
    """What the command has besides the settings of the training command."""

    dataset: tuple[str, ...] | None = section(
        "datasets",
        None,
        "folders or URLs in CLIP_benchmark's webdataset layout; names, with --dataset-root; text files with one on "
        "each line",
        metavar="DATASET",
    )
    dataset_root: str | None = setting(
        None,
        "folder or URL of a dataset by its name, which is put in for {dataset}, or with - for / for "
        "{dataset_cleaned}, without wds/ before it",
    )
    task: str = setting(
        "auto",
        "what to evaluate; auto is zero-shot retrieval or classification, by the dataset's dataset_type.txt",
        choices=("auto", *COLUMNS),
    )
    max_skip_fraction: float = setting(
        0.0,
        "a dataset fails when more than this share of its samples cannot be read",
        within=Range(at_least=0, at_most=1),
    )
    val_split: str | None = setting(None, "linear probe: the split to choose the regularisation on")
    val_proportion: float = setting(
        0.2,
        "linear probe, without --val-split: the share of the training split to choose the regularisation on",
        within=Range(above=0, at_most=0.9),
    )
    output: str = section(
        "results",
        "results/{dataset}_{pretrained}_{model}_{language}_{task}.json",
        "file of a dataset's results, as a template; {pretrained_full_path} tells files of one name apart",
    )
    summary: str = setting("results/{pretrained}_{model}.md", "file of the table, as a template")
    overwrite: bool = setting(False, "evaluate anew what has a result that is newer than the checkpoint")


# ---- the command line


def build_parser() -> Parser:
    """The flags of the command."""
    parser = Parser(
        prog="dissect-clip evaluate",
        description="Evaluate a checkpoint on datasets in CLIP_benchmark's layout: zero-shot retrieval and "
        "classification, linear probe. Results are JSON files in CLIP_benchmark's fields, and a table.",
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    hints = typing.get_type_hints(Settings)
    group = parser.add_argument_group()
    for field in dataclasses.fields(Settings):
        if "section" in field.metadata:
            group = parser.add_argument_group(field.metadata["section"])
        add_argument(group, field, hints[field.name])
    settings = declared()
    group = parser.add_argument_group("as in training")
    for name in SHARED:
        add_argument(group, *settings[name])
    group.add_argument("--checkpoint", dest="pretrained", help="the same as --pretrained; also any fsspec URL")
    return parser


def contradictions(settings: Settings) -> Iterator[str]:
    """What cannot mean anything, a line each."""
    if settings.dataset is None:
        yield "nothing to do: give --dataset"
    if settings.dataset_root is not None and "{dataset" not in settings.dataset_root:
        yield f"--dataset-root {settings.dataset_root} has no place for a name: put {{dataset}} where it belongs"
    if settings.task != "linear_probe":
        for name in ("val_split", "val_proportion"):
            if getattr(settings, name) != getattr(Settings, name):
                yield f"--{name.replace('_', '-')} needs --task linear_probe"


def parse_args(argv: Sequence[str]) -> tuple[Settings, Config]:
    """Settings from a command line.

    Raises:
        SystemExit: with status 2 and a message on stderr, where a flag is unknown or a value not allowed.
    """
    parser = build_parser()
    values = parse_values(parser, argv)
    own = {field.name for field in dataclasses.fields(Settings)}
    settings = Settings(**{name: value for name, value in values.items() if name in own})
    config = Config.of(**{name: value for name, value in values.items() if name not in own})
    for line in (*contradictions(settings), *wrong_lengths(config)):
        parser.error(line)
    return settings, config


def main(argv: Sequence[str]) -> int:
    """Evaluate as the command line says; the exit status is 1 if a dataset failed, 2 if flags are wrong."""
    with only_first_rank_prints():
        settings, config = parse_args(argv)

    from dissect_clip.cli.evaluation_run import run  # torch takes seconds to load
    from dissect_clip.cli.launch import launch

    return launch(config, lambda world: run(settings, config, world), "the same command evaluates what is missing")
