"""Shards with captions that belong to other images, after a list that says which."""

from __future__ import annotations

import csv
import fcntl
import io
import json
import shutil
import tarfile
from collections.abc import Mapping, Sequence
from pathlib import Path

from dissect_clip.data.urls import expand
from dissect_clip.errors import SetupError


def read_swaps(noise_list: Path) -> dict[str, str]:
    """Of each key that is listed, the key whose caption it gets: a csv with a header and these two columns."""
    rows = list(csv.reader(io.StringIO(noise_list.read_text(encoding="utf-8"))))[1:]
    return {row[0]: row[1] for row in rows if row}


def _captions(shards: Sequence[str]) -> dict[str, bytes]:
    captions = {}
    for shard in shards:
        with tarfile.open(shard) as tar:
            for member in tar:
                file = tar.extractfile(member)
                if file is not None and member.name.endswith(".txt"):
                    captions[member.name.removesuffix(".txt")] = file.read()
    return captions


def _pattern(folder: Path, count: int) -> str:
    return f"{folder}/{{00000..{count - 1:05d}}}.tar"


def write_noisy(shards: Sequence[str], swaps: Mapping[str, str], out: Path) -> str:
    """Shards in which each key of ``swaps`` has the caption of another; returns their pattern.

    Raises:
        SetupError: a key of the list is in none of the shards.
    """
    captions = _captions(shards)
    if missing := [key for pair in swaps.items() for key in pair if key not in captions]:
        raise SetupError(f"the noise list names {len(missing)} keys without a caption, {missing[0]} for one")
    partial = out.with_name(out.name + ".tmp")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    for number, shard in enumerate(shards):
        with tarfile.open(shard) as tar, tarfile.open(partial / f"{number:05d}.tar", "w") as copy:
            for member in tar:
                file = tar.extractfile(member)
                if file is None:
                    continue
                content = file.read()
                key = member.name.removesuffix(".txt")
                if key != member.name and key in swaps:
                    content = captions[swaps[key]]
                info = tarfile.TarInfo(member.name)
                info.size = len(content)
                copy.addfile(info, io.BytesIO(content))
    shutil.rmtree(out, ignore_errors=True)
    partial.rename(out)
    return _pattern(out, len(shards))


def noisy_shards(train_data: str, noise_list: Path, folder: Path, flag: str = "--train-data") -> str:
    """The pattern of the shards in ``folder``, written anew where the list or the shards are others.

    ``folder.json`` beside it says what they were made of.

    Raises:
        SetupError: a pattern matches nothing, or a key of the list is in none of the shards.
    """
    shards = [url for source in expand(train_data, flag) for url in source]
    wanted = json.dumps([shards, noise_list.read_text(encoding="utf-8")])
    with folder.with_name(f"{folder.name}.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # several processes may begin a study together
        return _up_to_date(shards, wanted, noise_list, folder)


def _up_to_date(shards: Sequence[str], wanted: str, noise_list: Path, folder: Path) -> str:
    note = folder.with_name(f"{folder.name}.json")
    if folder.exists() and note.exists() and note.read_text(encoding="utf-8") == wanted:
        return _pattern(folder, len(shards))
    pattern = write_noisy(shards, read_swaps(noise_list), folder)
    note.write_text(wanted, encoding="utf-8")
    return pattern
