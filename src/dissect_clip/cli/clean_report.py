"""``dissect-clip clean-report``: what a run's clean.parquet holds."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from dissect_clip.cli.exit_status import run_alone
from dissect_clip.config.parser import Parser
from dissect_clip.config.settings import DataSettings

EXAMPLES = """\
examples:
  dissect-clip clean-report logs/RUN/clean.parquet
  dissect-clip clean-report logs/RUN/clean.parquet --train-data 'data/{00000..00331}.tar' --output keyed.parquet
  dissect-clip clean-report logs/RUN/clean.parquet --train-data 'data/*.tar' --wrong wrong.csv --json report.json
"""


def parse_args(argv: Sequence[str]) -> argparse.Namespace:
    """The command line."""
    parser = Parser(
        prog="dissect-clip clean-report",
        description="Summarise the clean.parquet of a run with clean_posterior. Alone it needs nothing else. With "
        "--train-data the headers of the shards are read for the keys of the samples: --output writes them with all "
        "columns, and --wrong compares P(clean) with a list of pairs that are known to be mismatched.",
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("file", type=Path, metavar="CLEAN", help="the clean.parquet of a run")
    parser.add_argument("--train-data", metavar="PATTERN", help="the shards of the run, as it was given them")
    parser.add_argument("--wrong", type=Path, metavar="FILE", help="csv with a header: keys of pairs that are wrong")
    parser.add_argument("--output", type=Path, metavar="FILE", help="write the table with a column key, as Parquet")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write what is printed as JSON")
    parser.add_argument(
        "--data-timeout", type=float, default=DataSettings.data_timeout, metavar="SECONDS", help="as in training"
    )
    args = parser.parse_args(argv)
    if args.train_data is None and (args.wrong is not None or args.output is not None):
        parser.error("--wrong and --output need the keys of the samples: give --train-data")
    return args


def main(argv: Sequence[str]) -> int:
    """The exit status."""
    args = parse_args(argv)

    def work() -> int:
        from dissect_clip.training.clean_report import report_file

        report_file(args.file, args.train_data, args.wrong, args.output, args.json, args.data_timeout)
        return 0

    return run_alone(work)
