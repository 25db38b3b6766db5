"""``dissect-clip score``: score every sample of a dataset with a model, without training."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from dissect_clip.cli.exit_status import only_first_rank_prints, run_alone
from dissect_clip.config.parser import Parser
from dissect_clip.config.parser import parse_args as parse_settings
from dissect_clip.config.settings import Config
from dissect_clip.errors import SetupError
from dissect_clip.selection.registry import STRATEGIES

EXAMPLES = """\
example, also under torchrun:
  dissect-clip score scores -- --train-data 'data/cc3m/{00000..00331}.tar' --model ViT-B-32 --pretrained openai \\
      --batch-size 1024
"""


def parse_args(argv: Sequence[str]) -> argparse.Namespace:
    """The flags of the command itself, before ``--``."""
    parser = Parser(
        prog="dissect-clip score",
        description="Score every sample of a dataset with the model of --resume or --pretrained, without training, and "
        "write CLIPScores and losses to RECORD as a run's record is (docs/reference/record.md): for dissect-clip "
        "coreset, or for other tools. Behind -- stand flags of training that name the data and the model.",
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("record", type=Path, metavar="RECORD", help="folder for the record; new or empty")
    parser.add_argument("--passes", type=int, default=1, metavar="N", help="score the dataset N times (default: 1)")
    parser.add_argument(
        "--remembered",
        action="store_true",
        help="write the CLIPScores that the run of --resume remembered beside the new ones",
    )
    args = parser.parse_args(argv)
    if args.passes < 1:
        parser.error("argument --passes: give at least 1")
    return args


def parse_training_flags(flags: Sequence[str]) -> Config:
    """The settings of the flags behind ``--``, which name the data and the model.

    Raises:
        SystemExit: with status 2, as :func:`dissect_clip.config.parser.parse_args`.
        SetupError: if they name no data or no weights.
    """
    config = parse_settings(flags, STRATEGIES)
    if not config.data.trains or config.data.dataset_resampled:
        raise SetupError("name the dataset with --train-data, and leave out --dataset-resampled")
    if (config.checkpoint.resume is None) == (not config.model.pretrained) or config.checkpoint.resume == "latest":
        raise SetupError("name the weights that score: either --resume CHECKPOINT or --pretrained WEIGHTS")
    # With ids and keys, as a run that selects and records.
    return config.replace(select=True, record=True, accum_freq=1)


def main(argv: Sequence[str]) -> int:
    """The exit status."""
    argv = list(argv)
    cut = argv.index("--") if "--" in argv else len(argv)
    args, flags = parse_args(argv[:cut]), argv[cut + 1 :]

    def work() -> int:
        with only_first_rank_prints():
            config = parse_training_flags(flags)

        from dissect_clip.cli.score_dataset import score_dataset  # torch takes seconds to load

        score_dataset(args.record, flags, config, args.passes, args.remembered)
        return 0

    return run_alone(work)
