"""``dissect-clip export``: part of a dataset as new shards."""

from __future__ import annotations

import argparse
import os
from collections.abc import Sequence
from pathlib import Path

from dissect_clip.cli.exit_status import run_alone
from dissect_clip.config.parser import Parser
from dissect_clip.config.settings import DataSettings

EXAMPLES = """\
example:
  dissect-clip export 'data/cc3m/{00000..00331}.tar' --keep coreset.parquet --output data/cc3m-30
"""


def parse_args(argv: Sequence[str]) -> argparse.Namespace:
    parser = Parser(
        prog="dissect-clip export",
        description="Write the samples of a list as new WebDataset shards, their files' names and bytes untouched, in "
        "the order of their ids. DIR appears when all is in it, with a sizes.json; until then the shards are in "
        "DIR.partial, where the same command continues after it was stopped. Nothing is overwritten.",
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("pattern", metavar="PATTERN", help="shards as --train-data takes them")
    parser.add_argument("--keep", required=True, metavar="FILE", help="the list, as --train-keep takes it")
    parser.add_argument("--output", required=True, type=Path, metavar="DIR", help="folder for the new shards")
    parser.add_argument(
        "--per-shard", type=int, default=10_000, metavar="N", help="samples in a shard (default: %(default)s)"
    )
    parser.add_argument(
        "--skip-damaged", action="store_true", help="leave out, and count, samples that cannot be read; else stop"
    )
    parser.add_argument(
        "--data-timeout",
        type=float,
        default=DataSettings.data_timeout,
        metavar="SECONDS",
        help="give a remote shard up that sends nothing for so long (default: %(default)g, as in training)",
    )
    args = parser.parse_args(argv)
    if args.per_shard < 1:
        parser.error("argument --per-shard: give at least 1")
    if not 0 < args.data_timeout < float("inf"):
        parser.error("argument --data-timeout: give a number above 0")
    args.output = Path(os.path.normpath(args.output))
    return args


def main(argv: Sequence[str]) -> int:
    """The exit status."""
    args = parse_args(argv)

    def work() -> int:
        from dissect_clip.data.export import Export, export

        export(Export(**vars(args)))
        return 0

    return run_alone(work)
