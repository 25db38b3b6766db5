#!/usr/bin/env python
"""Count the samples of WebDataset shards once, and write the counts to the sizes.json that training reads.

    python scripts/index_shards.py 'data/cc12m/{00000..01242}.tar'            # sizes.json beside the shards
    python scripts/index_shards.py 'pipe:aws s3 cp s3://bucket/{000..099}.tar -' --output sizes.json
    python scripts/index_shards.py 'data/cc12m/{00000..01242}.tar' --check    # compare with what is recorded

Local shards cost a read of their headers only; remote ones are read whole, so count those near where they are, and put
the file beside them. Training counts local shards by itself where it has to, with the same result.
"""

from __future__ import annotations

import argparse
import logging
import sys
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "src"))

from dissect_clip.config.settings import DataSettings
from dissect_clip.data.formats.urls import check_present, expand, name_some
from dissect_clip.data.sampling.shard_ids import ShardCounter
from dissect_clip.data.sampling.shard_sizes import add_sizes, merge_by_name, recorded_sizes, save_sizes, write_sizes
from dissect_clip.errors import SetupError

_FOREVER = 1e9


def parse_args(argv: Sequence[str]) -> argparse.Namespace:
    summary, _, rest = (__doc__ or "").partition("\n")
    parser = argparse.ArgumentParser(
        description=summary, epilog=rest, formatter_class=argparse.RawDescriptionHelpFormatter
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


def count(urls: list[str], workers: int, timeout: float, keep: Callable[[dict[str, int]], None]) -> dict[str, int]:
    """Samples by URL; those counted until a shard cannot be read are for ``keep``.

    Raises:
        SetupError: a shard cannot be read.
    """
    scan = ShardCounter(urls, workers, timeout)
    try:
        scan.wait(_FOREVER)
    except SetupError:
        keep(scan.sizes)
        raise
    return scan.sizes


def keep_some(counted: dict[str, int], output: Path | None) -> None:
    """Add the counts of some shards to what is recorded."""
    if not counted:
        return
    if output is None:
        kept = len(counted) - len(save_sizes(counted, None))
    else:
        kept = len(counted) if add_sizes(output, merge_by_name(counted)) else 0
    if kept:
        print(f"the counts of {kept} shards are kept; training counts the others by itself", file=sys.stderr)


def check(urls: list[str], counted: dict[str, int], recorded: dict[str, int]) -> int:
    """Print the shards whose recorded size is not what was counted; the exit status."""
    wrong = [url for url in urls if recorded.get(url) != counted[url]]
    for url in wrong:
        print(f"{url}: {counted[url]} samples, recorded {recorded.get(url, 'nowhere')}")
    print(f"{len(urls) - len(wrong)} of {len(urls)} shards have their recorded size")
    return 1 if wrong else 0


def write(urls: list[str], counted: dict[str, int], output: Path | None) -> int:
    """Write the counts; the exit status."""
    if output is not None:
        write_sizes(output, merge_by_name(counted))
        print(f"wrote {output}")
    elif unwritten := save_sizes(counted, None):
        print(
            f"cannot write beside {name_some(unwritten)}: give --output FILE, then put the file beside the shards",
            file=sys.stderr,
        )
        return 1
    print(f"{len(urls)} shards, {sum(counted[url] for url in urls)} samples")
    empty = [url for url in urls if counted[url] == 0]
    if empty:
        print(f"{len(empty)} shards are empty, and will be passed over: {name_some(empty)}", file=sys.stderr)
    return 0


def main(argv: Sequence[str]) -> int:
    """The exit status."""
    args = parse_args(argv)
    logging.basicConfig(level=logging.WARNING, format="%(message)s")
    try:
        urls = list(dict.fromkeys(url for source in expand(args.pattern, "PATTERN") for url in source))
        check_present(urls, "PATTERN")
        recorded = recorded_sizes(urls, None, ask_remote=True, timeout=args.data_timeout) if args.check else {}
        keep = (lambda sizes: None) if args.check else partial(keep_some, output=args.output)
        counted = count(urls, args.workers, args.data_timeout, keep)
        return check(urls, counted, recorded) if args.check else write(urls, counted, args.output)
    except (SetupError, OSError) as error:
        print(error, file=sys.stderr)
        return 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
