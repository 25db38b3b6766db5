#!/usr/bin/env python
"""Choose pairs of a data set that get a caption which is not theirs, as a list for the noise of a grid.

    python scripts/noise_list.py --train-data 'data/train-*.tar' --share 0.6 --output noise_0.6.csv
    python scripts/noise_list.py --train-data 'data/train-*.tar' --share 0.4 --within subgroup --output alike_0.4.csv
    python scripts/noise_list.py --train-data 'data/train-*.tar' --share 0.4 --caption picture --output word_0.4.csv

Captions are swapped, among all pairs or among those that have the same --within in their json file, or replaced by
--caption. The same shards and --seed give the same list. docs/guides/reproduce.md says what a grid does with it.
"""

from __future__ import annotations

import argparse
import sys
import tarfile
from collections.abc import Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "src"))
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from dissect_clip.data.formats.urls import expand
from dissect_clip.errors import SetupError
from experiments.noise import replace_captions, swap_captions, write_list


def _share(text: str) -> float:
    value = float(text)
    if not 0 < value <= 1:
        raise argparse.ArgumentTypeError(f"{text} must be above 0 and at most 1")
    return value


def _parser() -> argparse.ArgumentParser:
    about, _, rest = (__doc__ or "").partition("\n")
    parser = argparse.ArgumentParser(
        description=about, epilog=rest, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--train-data", required=True, help="WebDataset shards, as --train-data of src/main.py")
    parser.add_argument("--share", type=_share, required=True, help="of the pairs that get another caption")
    parser.add_argument("--seed", type=int, default=0)
    kind = parser.add_mutually_exclusive_group()
    kind.add_argument("--within", metavar="FIELD", help="swap among pairs that have the same value there in their json")
    kind.add_argument("--caption", help="the caption that they all get, in place of swapping")
    parser.add_argument("--output", type=Path, required=True, help="the list, a csv: key, and donor or caption")
    return parser


def _write(options: argparse.Namespace) -> int:
    shards = [url for source in expand(options.train_data, "--train-data") for url in source]
    if options.caption is not None:
        listed = replace_captions(shards, options.share, options.seed, options.caption)
    else:
        listed = swap_captions(shards, options.share, options.seed, options.within)
    write_list(options.output, "donor" if options.caption is None else "caption", listed)
    return len(listed)


def main(words: Sequence[str] | None = None) -> int:
    """Run it; returns the exit status."""
    options = _parser().parse_args(words)
    try:
        count = _write(options)
    except (SetupError, OSError, tarfile.TarError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    print(f"{options.output}: {count} pairs")
    return 0


if __name__ == "__main__":
    sys.exit(main())
