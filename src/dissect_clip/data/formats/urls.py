"""From what the user writes to a list of shards: sources, braces, globs, and the names of shards."""

from __future__ import annotations

import glob
import os
import re
from collections.abc import Iterable, Sequence
from urllib.parse import urlparse
from urllib.request import url2pathname

from webdataset.shardlists import expand_urls

from dissect_clip.errors import SetupError

_TAR = re.compile(r"\.(tar|tar\.gz|tgz)$")
_TAR_IN_COMMAND = re.compile(r"[^\s/'\"=]+\.(?:tar\.gz|tar|tgz)(?![\w.])")
_NAMED = 5
"""How many shards an error message names before it gives a number only."""


def is_local(url: str) -> bool:
    """Whether the shard is a file of this machine, by the rule of webdataset's ``gopen``."""
    return urlparse(url).scheme in ("", "file")


def local_path(url: str) -> str:
    """The path of a local shard."""
    return url2pathname(urlparse(url).path) if url.startswith("file:") else url


def _name_span(url: str) -> tuple[int, int]:
    """Where in the URL its base name stands; in a ``pipe:`` command that of the last tar it mentions."""
    if url.startswith("pipe:"):
        found = list(_TAR_IN_COMMAND.finditer(url))
        if found:
            return found[-1].span()
    end = len(url) if is_local(url) else len(re.split(r"[?#]", url, maxsplit=1)[0])
    return url.rfind("/", 0, end) + 1, end


def shard_name(url: str) -> str:
    """Base name of a shard, as ``00000.tar``; without folder, host, command or query."""
    start, end = _name_span(url)
    return url[start:end]


def sibling(url: str, name: str) -> str:
    """The URL of another file beside a shard, opened in the same way."""
    start, end = _name_span(url)
    return url[:start] + name + url[end:]


def is_shard(url: str) -> bool:
    """Whether the URL is that of a tar, by its name."""
    return _TAR.search(shard_name(url)) is not None


def name_some(urls: Sequence[str]) -> str:
    """The first few of a list of shards, and how many more there are."""
    more = f" and {len(urls) - _NAMED} more" if len(urls) > _NAMED else ""
    return ", ".join(urls[:_NAMED]) + more


def _glob(url: str) -> list[str]:
    if not is_local(url) or not re.search(r"[*?]", url) or os.path.exists(local_path(url)):
        return [url]
    found = sorted(glob.glob(local_path(url).replace("[", "[[]")))
    # A file that is called pipe:... is a file.
    return [f"./{path}" if urlparse(path).scheme else path for path in found]


def _expand_source(source: str, flag: str) -> list[str]:
    if not source:
        raise SetupError(f"{flag}: a source is empty; sources are joined by ::, with something on both sides")
    try:
        expanded = expand_urls(source)
    except ValueError as error:
        raise SetupError(f"{flag} {source}: the braces do not match; a range is {{00000..00099}}") from error
    except AssertionError as error:
        raise SetupError(f"{flag} {source}: {error}; ${{NAME}} stands for the variable WDS_NAME") from error
    urls = [url for pattern in expanded for url in _glob(pattern)]
    if not urls:
        raise SetupError(
            f"{flag} {source}: no file matches this pattern; check the folder and the numbers (searched from "
            f"{os.getcwd()})"
        )
    for url in urls:
        if not is_shard(url) and is_local(url) and os.path.isdir(local_path(url)):
            layout = ", or add the test/nshards.txt of a CLIP_benchmark folder" if flag == "--val-data" else ""
            raise SetupError(f"{flag}: {url} is a folder; give the shards in it, as '{url}/*.tar'{layout}")
    return urls


def expand(pattern: str, flag: str = "--train-data") -> list[list[str]]:
    """The shards of each source of a pattern.

    Sources are joined by ``::``; ``{000..009}``, ``{a,b}`` and ``${NAME}`` (the variable WDS_NAME) are expanded as
    webdataset does; ``*`` and ``?`` match local files, sorted by name.

    Raises:
        SetupError: braces do not match, a variable is missing, a pattern matches no file, or one is a folder.
    """
    return [_expand_source(source, flag) for source in pattern.split("::")]


def _first_block(path: str) -> bytes:
    with open(path, "rb", buffering=0) as file:
        return file.read(512)


def check_present(urls: Iterable[str], flag: str) -> None:
    """Stop where local shards are missing.

    Raises:
        SetupError: names the first of them and says how many there are.
    """
    urls = list(dict.fromkeys(urls))
    missing = [url for url in urls if is_local(url) and not os.path.isfile(local_path(url))]
    if missing:
        raise SetupError(
            f"{flag}: {len(missing)} of {len(urls)} shards are missing: {name_some(missing)}. Finish the download, or "
            "give a pattern of the shards that are there"
        )


def check_not_empty(urls: Iterable[str], flag: str) -> None:
    """Stop where local shards hold nothing, by a look at their first block.

    Raises:
        SetupError: names the first of them and says how many there are.
    """
    urls = list(dict.fromkeys(urls))
    empty = [url for url in urls if is_local(url) and not any(_first_block(local_path(url)))]
    if empty:
        raise SetupError(
            f"{flag}: {len(empty)} of {len(urls)} shards are empty: {name_some(empty)}. Make them again, or leave them "
            "out of the pattern"
        )
