"""``dissect-clip coreset``: choose part of a dataset, as a list for ``--train-keep``."""

from __future__ import annotations

import argparse
import math
from collections.abc import Sequence
from pathlib import Path

from dissect_clip.cli.exit_status import only_first_rank_prints, run_alone
from dissect_clip.cli.score import parse_training_flags
from dissect_clip.config.parser import Parser
from dissect_clip.errors import SetupError

METHODS = ("random", "forgetting", "clipscore", "cliploss", "differential")

EXAMPLES = """\
examples:
  dissect-clip coreset logs/RUN/record --method forgetting --rate 0.3 --output coreset.parquet
  dissect-clip coreset logs/RUN/record --method clipscore --threshold 25 --output coreset.parquet
  dissect-clip coreset scores --method cliploss --rate 0.3 --output coreset.parquet -- \\
      --train-data 'data/cc3m/{00000..00331}.tar' --model ViT-B-32 --pretrained openai --batch-size 1024
"""


def parse_args(argv: Sequence[str]) -> argparse.Namespace:
    parser = Parser(
        prog="dissect-clip coreset",
        description="Choose part of a dataset by what a run recorded, or by a model's scores, as a list for "
        "--train-keep. With training flags behind -- the dataset is scored first, once (--passes), by the model of "
        "--resume or --pretrained, without training; the scores are written to RECORD as a run's record is. "
        "docs/guides/clean-a-dataset.md says what each method measures and keeps.",
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("record", type=Path, metavar="RECORD", help="folder of a record, as logs/RUN/record")
    parser.add_argument("--method", required=True, choices=METHODS)
    parser.add_argument("--rate", type=float, metavar="R", help="keep this share of the samples that have a value")
    parser.add_argument("--threshold", type=float, metavar="T", help="keep values of at least T; of cliploss at most T")
    parser.add_argument("--output", type=Path, required=True, metavar="FILE", help="the list, a Parquet file")
    parser.add_argument(
        "--epochs",
        metavar="A[:B]",
        help="epochs of the record, from 0, the last included; values are their mean (default: the newest; random and "
        "forgetting: all)",
    )
    parser.add_argument(
        "--reference-epoch", type=int, metavar="E", help="differential: what the score fell from (default: the "
        "remembered score)",
    )  # fmt: skip
    parser.add_argument(
        "--learned-by", default="loss", choices=("loss", "score"), help="forgetting: by what (default: loss)"
    )
    parser.add_argument(
        "--learned-at",
        type=float,
        metavar="X",
        help="forgetting: learned is a loss of at most X nats (default: ln 2), or a score of at least the X-quantile "
        "of those of its step (default: 0.5)",
    )
    parser.add_argument(
        "--never-learned",
        default="most",
        choices=("most", "least"),
        help="forgetting: samples that never were learned count as forgotten most often, as in the paper, or least",
    )
    parser.add_argument("--passes", type=int, default=1, metavar="N", help="score the data set N times (default: 1)")
    parser.add_argument("--seed", type=int, default=0, help="of random choices and of ties (default: 0)")
    args = parser.parse_args(argv)
    if (args.rate is None) == (args.threshold is None):
        parser.error("give --rate or --threshold")
    if args.rate is not None and not 0 < args.rate <= 1:
        parser.error(f"argument --rate: {args.rate:g} is not above 0 and at most 1")
    if args.threshold is not None and math.isnan(args.threshold):
        parser.error("argument --threshold: give a number")
    if args.method == "random" and args.threshold is not None:
        parser.error("argument --threshold: --method random has no values to compare, give --rate")
    if args.reference_epoch is not None and args.method != "differential":
        parser.error("argument --reference-epoch: it is for --method differential")
    if args.learned_by == "score" and args.learned_at is not None and not 0 <= args.learned_at <= 1:
        parser.error(f"argument --learned-at: {args.learned_at:g} is no quantile between 0 and 1")
    if args.passes < 1 or args.seed < 0:
        parser.error("--passes is at least 1 and --seed at least 0")
    if args.output.suffix != ".parquet":
        parser.error(f"argument --output: {args.output} should end in .parquet")
    return args


def main(argv: Sequence[str]) -> int:
    """The exit status."""
    argv = list(argv)
    cut = argv.index("--") if "--" in argv else len(argv)
    args, flags = parse_args(argv[:cut]), argv[cut + 1 :]

    def work() -> int:
        if args.output.exists():
            raise SetupError(f"--output {args.output} is there already, and is not overwritten")
        if args.method == "forgetting" and flags:
            raise SetupError("--method forgetting compares the epochs of a training run: it needs its record")
        if flags:
            with only_first_rank_prints():
                config = parse_training_flags(flags)

            from dissect_clip.cli.score_dataset import score_dataset  # torch takes seconds to load

            if not score_dataset(args.record, flags, config, args.passes, remembered=args.method == "differential"):
                return 0  # the first rank makes the list
        import pyarrow as pa

        from dissect_clip.selection.coreset import CoresetOptions, make

        try:
            make(CoresetOptions(**vars(args)))
        except pa.ArrowException as error:
            raise SetupError(f"{args.record} cannot be read as a record: {error}") from error
        return 0

    return run_alone(work)
