"""``dissect-clip index``: count the samples of shards ahead of training."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from dissect_clip.cli.exit_status import run_alone
from dissect_clip.config.parser import Parser
from dissect_clip.config.settings import DataSettings

EXAMPLES = """\
examples:
  dissect-clip index 'data/cc12m/{00000..01242}.tar'            # sizes.json beside the shards
  dissect-clip index 'pipe:aws s3 cp s3://bucket/{000..099}.tar -' --output sizes.json
  dissect-clip index 'data/cc12m/{00000..01242}.tar' --check    # compare with what is recorded
"""


def parse_args(argv: Sequence[str]) -> argparse.Namespace:
    parser = Parser(
        prog="dissect-clip index",
        description="Count the samples of WebDataset shards once, and write the counts to the sizes.json that training "
        "reads. Local shards cost a read of their headers only; remote ones are read whole, so count those near where "
        "they are, and put the file beside them. Training counts local shards by itself if it has to.",
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "pattern",
        metavar="PATTERN",
        help="shards as --train-data takes them: braces, globs, URLs, sources joined by ::",
    )
    parser.add_argument("--workers", type=int, default=16, metavar="N", help="shards read at a time (default: 16)")
    parser.add_argument(
        "--output", type=Path, metavar="FILE", help="write one file here, instead of a sizes.json in each shard folder"
    )
    parser.add_argument(
        "--check", action="store_true", help="write nothing; name the shards whose recorded size is missing or wrong"
    )
    parser.add_argument(
        "--data-timeout",
        type=float,
        default=DataSettings.data_timeout,
        metavar="SECONDS",
        help="give a remote shard up that sends nothing for so long (default: %(default)g, as in training)",
    )
    args = parser.parse_args(argv)
    if args.workers < 1:
        parser.error("argument --workers: give at least 1")
    if not 0 < args.data_timeout < float("inf"):
        parser.error("argument --data-timeout: give a number above 0")
    return args


def main(argv: Sequence[str]) -> int:
    """The exit status: 1 if ``--check`` finds a difference or the counts cannot be written."""
    args = parse_args(argv)

    def work() -> int:
        from dissect_clip.data.sampling.shard_index import index

        return index(args.pattern, args.workers, args.output, args.check, args.data_timeout)

    return run_alone(work)
