"""The sizes of shards, counted ahead of training: for ``sizes.json``, or to compare with what is recorded."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path

from dissect_clip.data.formats.urls import check_present, expand, name_some
from dissect_clip.data.sampling.shard_ids import ShardCounter
from dissect_clip.data.sampling.shard_sizes import add_sizes, merge_by_name, recorded_sizes, save_sizes, write_sizes
from dissect_clip.errors import SetupError

_FOREVER = 1e9


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


def index(pattern: str, workers: int, output: Path | None, check_only: bool, timeout: float) -> int:
    """Count the samples of the shards of a pattern, and write the counts or compare them; the exit status.

    Raises:
        SetupError: shards are missing or cannot be read.
        OSError: the counts cannot be written.
    """
    urls = list(dict.fromkeys(url for source in expand(pattern, "PATTERN") for url in source))
    check_present(urls, "PATTERN")
    recorded = recorded_sizes(urls, None, ask_remote=True, timeout=timeout) if check_only else {}

    def keep(sizes: dict[str, int]) -> None:
        if not check_only:
            keep_some(sizes, output)

    counted = count(urls, workers, timeout, keep)
    return check(urls, counted, recorded) if check_only else write(urls, counted, output)
