"""Files that record how many samples shards hold.

They are looked for beside the shards, in each folder:

- ``_info.json``, of the Hugging Face pixparse and timm sets: per split ``filenames`` and ``shard_lengths``;
- ``sizes.json``, of OpenCLIP and img2dataset: ``{base name: samples}``;
- ``__len__``: the number of samples in the folder, enough where it holds a single shard.
"""

from __future__ import annotations

import json
import logging
import os
import stat
from collections.abc import Sequence
from pathlib import Path

from dissect_clip.config.settings import DataSettings
from dissect_clip.data.formats.download import open_stream
from dissect_clip.data.formats.urls import is_local, is_shard, local_path, shard_name, sibling
from dissect_clip.errors import SetupError

SIZES_FILE = "sizes.json"
_MAX_REMOTE = 1 << 28
"""Bytes of a remote file of sizes that are read: those of millions of shards."""

_log = logging.getLogger(__name__)


def _read_local(path: str) -> str | None:
    try:
        return Path(path).read_text(encoding="utf-8")
    except FileNotFoundError:
        return None
    except (OSError, UnicodeDecodeError) as error:
        raise SetupError(f"cannot read {path}, which should hold the shards' sizes: {error}") from error


def _read_remote(url: str, timeout: float) -> str | None:
    """The text at a URL, or None if the file does not exist; some servers then answer with a page."""
    try:
        with open_stream(url, timeout) as stream:
            text = stream.read(_MAX_REMOTE).decode("utf-8")
    except TimeoutError as error:  # taking it for missing would read the whole dataset
        raise SetupError(
            f"{url}, where the shards' sizes may be, sent nothing for {timeout:g} s: try again, or with a longer "
            "--data-timeout"
        ) from error
    except (OSError, ValueError):
        return None
    return text if text.lstrip().startswith("{") else None


def _parse_json(text: str, where: str) -> dict[str, object]:
    try:
        record = json.loads(text)
    except ValueError as error:
        raise SetupError(f"{where} is not valid JSON ({error}); mend or delete it") from error
    if not isinstance(record, dict):
        raise SetupError(f"{where} should hold a JSON object, not a {type(record).__name__}; mend or delete it")
    return record


def _as_size(value: object, where: str, name: str) -> int:
    try:
        size = int(value) if isinstance(value, int | str) else -1
    except ValueError:
        size = -1
    if size < 0:
        raise SetupError(f"{where}: the size of {name} is {value!r}, not a number of samples; mend or delete the file")
    return size


def parse_sizes(text: str, where: str) -> dict[str, int]:
    """Sizes by base name from the text of a ``sizes.json``; ``where`` names the file in messages.

    Raises:
        SetupError: it is not JSON, or not of this form.
    """
    return {name: _as_size(value, where, name) for name, value in _parse_json(text, where).items()}


def parse_info(text: str, where: str) -> dict[str, int]:
    """Sizes by base name from the text of an ``_info.json``, of all its splits; empty where it lists no shards.

    Raises:
        SetupError: it is not JSON, or not of this form.
    """
    splits = _parse_json(text, where).get("splits", {})
    if not isinstance(splits, dict) or not all(isinstance(split, dict) for split in splits.values()):
        raise SetupError(f"{where}: 'splits' should be an object of objects; mend or delete the file")
    pairs: dict[str, set[int]] = {}
    for title, split in splits.items():
        names, lengths = split.get("filenames", []), split.get("shard_lengths", [])
        if not isinstance(names, list) or not isinstance(lengths, list) or len(names) != len(lengths):
            raise SetupError(
                f"{where}: split {title!r} should list as many 'filenames' as 'shard_lengths'; mend or delete the file"
            )
        for name, length in zip(names, lengths, strict=True):
            pairs.setdefault(os.path.basename(str(name)), set()).add(_as_size(length, where, str(name)))
    # Splits in separate folders may use a name twice: such a name is ambiguous.
    return {name: sizes.pop() for name, sizes in pairs.items() if len(sizes) == 1}


def _parse_total(text: str, where: str) -> int:
    if not text.strip().isdigit():
        raise SetupError(f"{where} should hold one number, not {text.strip()[:40]!r}; mend or delete it")
    return int(text)


def _folder_sizes(folder: str, urls: Sequence[str]) -> dict[str, int]:
    """Sizes by base name from the files in a local folder."""
    sizes: dict[str, int] = {}
    for name, parse in (("_info.json", parse_info), (SIZES_FILE, parse_sizes)):
        path = os.path.join(folder, name)
        if (text := _read_local(path)) is not None:
            sizes = {**parse(text, path), **sizes}
    path = os.path.join(folder, "__len__")
    if (text := _read_local(path)) is not None:
        total = _parse_total(text, path)
        if len(urls) == 1 and sum(map(is_shard, os.listdir(folder or "."))) == 1:
            sizes.setdefault(shard_name(urls[0]), total)
    return sizes


def _remote_sizes(url: str, timeout: float) -> dict[str, int]:
    """Sizes by base name from the files beside a remote shard."""
    sizes: dict[str, int] = {}
    for name, parse in (("_info.json", parse_info), (SIZES_FILE, parse_sizes)):
        where = sibling(url, name)
        if (text := _read_remote(where, timeout)) is not None:
            sizes = {**parse(text, where), **sizes}
    return sizes


def _by_folder(urls: Sequence[str]) -> dict[str, list[str]]:
    folders: dict[str, list[str]] = {}
    for url in dict.fromkeys(urls):
        folder = os.path.dirname(local_path(url)) if is_local(url) else sibling(url, "")
        folders.setdefault(folder, []).append(url)
    return folders


def recorded_sizes(
    urls: Sequence[str], run_folder: Path | None, ask_remote: bool, timeout: float = DataSettings.data_timeout
) -> dict[str, int]:
    """Sizes by URL of the shards that are recorded in a file beside them or in the run's folder.

    ``ask_remote``: also try to open such files beside remote shards, which takes a request each, given up
    after ``timeout`` seconds without an answer.

    Raises:
        SetupError: a file is not of its form, or a server does not answer.
    """
    known: dict[str, int] = {}
    for folder, members in _by_folder(urls).items():
        if is_local(members[0]):
            sizes = _folder_sizes(folder, members)
        else:
            sizes = _remote_sizes(members[0], timeout) if ask_remote else {}
        known |= {url: sizes[shard_name(url)] for url in members if shard_name(url) in sizes}
    if run_folder is not None:
        path = run_folder / SIZES_FILE
        if (text := _read_local(str(path))) is not None:
            cached = parse_sizes(text, str(path))
            known = {**{url: cached[url] for url in urls if url in cached}, **known}
    return known


def write_sizes(path: Path, sizes: dict[str, int]) -> None:
    """Write a ``sizes.json``, whole or not at all.

    Raises:
        OSError: the folder cannot be written to.
    """
    beside = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        beside.write_text(json.dumps(sizes, indent=0, sort_keys=True) + "\n", encoding="utf-8")
        os.replace(beside, path)
    finally:
        beside.unlink(missing_ok=True)


def _marked_read_only(folder: Path) -> bool:
    """Whether nobody may write to the folder, which would not stop the superuser."""
    return not stat.S_IMODE(folder.stat().st_mode) & (stat.S_IWUSR | stat.S_IWGRP | stat.S_IWOTH)


def add_sizes(path: Path, sizes: dict[str, int]) -> bool:
    """Add sizes to a file that may exist; whether that worked."""
    try:
        if _marked_read_only(path.parent):
            return False
        text = _read_local(str(path))
        old = {} if text is None else parse_sizes(text, str(path))
        write_sizes(path, {**old, **sizes})
    except OSError:
        return False
    return True


def save_sizes(sizes: dict[str, int], run_folder: Path | None) -> list[str]:
    """Keep counted sizes (by URL) for the next run: beside the shards, else in the run's folder.

    Returns the shards whose sizes could not be kept at all.
    """
    homeless: dict[str, int] = {}
    for folder, members in _by_folder(list(sizes)).items():
        path = Path(folder) / SIZES_FILE
        named = {shard_name(url): sizes[url] for url in members}
        if is_local(members[0]) and add_sizes(path, named):
            _log.info("wrote the sizes of %d shards to %s", len(named), path)
        else:
            homeless |= {url: sizes[url] for url in members}
    if homeless and run_folder is not None and add_sizes(run_folder / SIZES_FILE, homeless):
        _log.info("wrote the sizes of %d shards to %s", len(homeless), run_folder / SIZES_FILE)
        return []
    return list(homeless)


def merge_by_name(sizes: dict[str, int]) -> dict[str, int]:
    """Sizes by URL -> sizes by base name.

    Raises:
        SetupError: shards of one name have different sizes, so that one file cannot distinguish them.
    """
    merged: dict[str, int] = {}
    for url, size in sizes.items():
        name = shard_name(url)
        if merged.setdefault(name, size) != size:
            raise SetupError(
                f"several shards are called {name} and differ in size: write a {SIZES_FILE} for each folder by itself"
            )
    return merged
