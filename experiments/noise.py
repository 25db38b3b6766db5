"""Shards with captions that belong to other images, after a list that says which."""

from __future__ import annotations

import csv
import fcntl
import io
import json
import random
import shutil
import tarfile
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from dissect_clip.data.formats.urls import expand
from dissect_clip.errors import SetupError

_TRIES = 1000


@dataclass(frozen=True)
class CaptionNoise:
    """Which pairs get a caption that is not theirs."""

    donors: dict[str, str]  # key -> the key whose caption it gets
    captions: dict[str, str]  # key -> the caption it gets


def read_list(file: Path) -> CaptionNoise:
    """A csv with a header and two columns: ``key``, and ``donor`` or ``caption``.

    Raises:
        SetupError: it is not of this form, or names a key twice.
    """
    try:
        rows = [row for row in csv.reader(io.StringIO(file.read_text(encoding="utf-8"))) if row]
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise SetupError(f"the list of wrong captions {file} cannot be read: {error}") from error
    if not rows or rows[0] not in (["key", "donor"], ["key", "caption"]):
        raise SetupError(f"{file}: a list of wrong captions begins with the line key,donor or key,caption")
    if bad := next((row for row in rows if len(row) != 2), None):
        raise SetupError(f"{file}: {','.join(bad)!r} has {len(bad)} columns, not 2")
    if double := [key for key, count in Counter(row[0] for row in rows[1:]).items() if count > 1]:
        raise SetupError(f"{file}: {double[0]!r} appears twice")
    listed = dict(row for row in rows[1:])
    return CaptionNoise(listed, {}) if rows[0][1] == "donor" else CaptionNoise({}, listed)


def _members(shards: Sequence[str], end: str) -> dict[str, bytes]:
    """Of each key the content of its file whose name ends so."""
    found = {}
    for shard in shards:
        with tarfile.open(shard) as tar:
            for member in tar:
                file = tar.extractfile(member)
                if file is not None and member.name.endswith(end):
                    found[member.name.removesuffix(end)] = file.read()
    return found


def _groups(shards: Sequence[str], field: str, keys: Sequence[str]) -> dict[str, str]:
    found = {key: json.loads(content) for key, content in _members(shards, ".json").items()}
    if missing := [key for key in keys if field not in found.get(key, {})]:
        raise SetupError(f"{len(missing)} keys have no {field!r} in a json file, {missing[0]} for one")
    return {key: str(found[key][field]) for key in keys}


def swap_captions(shards: Sequence[str], share: float, seed: int, within: str | None = None) -> dict[str, str]:
    """For ``share`` of the keys, drawn at random, another of them whose caption each gets, and which reads otherwise.

    Args:
        within: a field of the samples' json files: captions stay among keys that have the same value there.

    Raises:
        SetupError: a key has no such field, or captions are too few or too much alike to be swapped.
    """
    captions = _members(shards, ".txt")
    keys = sorted(captions)
    rng = random.Random(seed)
    groups = dict.fromkeys(keys, "") if within is None else _groups(shards, within, keys)
    texts: dict[str, set[bytes]] = {}
    for key in keys:
        texts.setdefault(groups[key], set()).add(captions[key])
    able = [key for key in keys if len(texts[groups[key]]) > 1]  # of the others there is no other caption
    count = round(share * len(keys))
    if count > len(able):
        raise SetupError(
            f"{count} captions are to be swapped, but only {len(able)} of {len(keys)} keys have another caption beside "
            f"them{'' if within is None else f' with the same {within}'}"
        )
    chosen = sorted(rng.sample(able, count))
    parts: dict[str, list[str]] = {}
    for key in chosen:
        parts.setdefault(groups[key], []).append(key)
    swaps: dict[str, str] = {}
    for group, part in parts.items():
        donors = _other_captions(part, captions, rng)
        if donors is None:  # too few of the group are chosen to swap among themselves
            all_of_it = [key for key in able if groups[key] == group]
            donors = [rng.choice([k for k in all_of_it if captions[k] != captions[key]]) for key in part]
        swaps |= dict(zip(part, donors, strict=True))
    return {key: swaps[key] for key in chosen}


def _other_captions(keys: Sequence[str], captions: Mapping[str, bytes], rng: random.Random) -> list[str] | None:
    """A permutation of ``keys`` after which none has a caption that reads as its own; None where none was found."""
    donors = list(keys)
    rng.shuffle(donors)
    for _ in range(_TRIES):
        same = [place for place, key in enumerate(keys) if captions[key] == captions[donors[place]]]
        if not same:
            return donors
        for place in same:
            other = rng.randrange(len(donors))
            donors[place], donors[other] = donors[other], donors[place]
    return None


def replace_captions(shards: Sequence[str], share: float, seed: int, caption: str) -> dict[str, str]:
    """For ``share`` of the keys, drawn at random, the same ``caption``."""
    keys = sorted(_members(shards, ".txt"))
    rng = random.Random(seed)
    return dict.fromkeys(sorted(rng.sample(keys, round(share * len(keys)))), caption)


def write_list(file: Path, second: str, listed: Mapping[str, str]) -> None:
    """Write a list that :func:`read_list` reads; ``second`` is ``donor`` or ``caption``."""
    with file.open("w", encoding="utf-8", newline="") as handle:
        csv.writer(handle, lineterminator="\n").writerows([("key", second), *listed.items()])


def _pattern(folder: Path, count: int) -> str:
    return f"{folder}/{{00000..{count - 1:05d}}}.tar"


def write_noisy(shards: Sequence[str], wrong: CaptionNoise, out: Path) -> str:
    """Shards in which each key of ``wrong`` has the caption it is to get; returns their pattern.

    Raises:
        SetupError: a key of the list is in none of the shards.
    """
    captions = _members(shards, ".txt")
    named = [*(key for pair in wrong.donors.items() for key in pair), *wrong.captions]
    if missing := [key for key in named if key not in captions]:
        raise SetupError(f"the noise list names {len(missing)} keys without a caption, {missing[0]} for one")
    given = {key: captions[donor] for key, donor in wrong.donors.items()}
    given |= {key: caption.encode() for key, caption in wrong.captions.items()}
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
                if key != member.name and key in given:
                    content = given[key]
                info = tarfile.TarInfo(member.name)
                info.size = len(content)
                copy.addfile(info, io.BytesIO(content))
    shutil.rmtree(out, ignore_errors=True)
    partial.rename(out)
    return _pattern(out, len(shards))


def noisy_shards(train_data: str, noise_list: Path, folder: Path, flag: str = "--train-data") -> str:
    """The pattern of the shards in ``folder``, written where they are not there.

    ``folder.json`` beside it says what they were made of. They are never rewritten from something else: runs that
    were trained on them, or are in the middle of it, would not be what their names say.

    Raises:
        SetupError: a pattern matches nothing, a shard cannot be read, a key of the list is in none of the shards, or
            the folder holds shards of other shards or of another list.
    """
    shards = [url for source in expand(train_data, flag) for url in source]
    with folder.with_name(f"{folder.name}.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # several processes may begin a study together
        try:
            wanted = json.dumps([shards, noise_list.read_text(encoding="utf-8")])
            return _written(shards, wanted, noise_list, folder)
        except (OSError, tarfile.TarError) as error:
            raise SetupError(f"{flag}: cannot write {folder} with the captions of {noise_list}: {error}") from error


def _written(shards: Sequence[str], wanted: str, noise_list: Path, folder: Path) -> str:
    note = folder.with_name(f"{folder.name}.json")
    if folder.exists() and note.exists():
        if note.read_text(encoding="utf-8") == wanted:
            return _pattern(folder, len(shards))
        raise SetupError(
            f"{folder} was made of other shards, or of another list of wrong captions, than {noise_list} now is: work "
            "in another folder, or delete it and the runs that were trained on it"
        )
    pattern = write_noisy(shards, read_list(noise_list), folder)
    note.write_text(wanted, encoding="utf-8")
    return pattern
