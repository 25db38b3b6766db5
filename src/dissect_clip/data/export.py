"""Part of a dataset as new WebDataset shards: the samples of a list, their files' names and bytes untouched.

The samples stand in the order of their ids. The folder appears when all is in it, with a sizes.json; until then the
shards are in FOLDER.partial, where an export that was stopped continues. Nothing is overwritten.
"""

from __future__ import annotations

import hashlib
import io
import json
import os
import tarfile
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import NamedTuple

import numpy as np
from tqdm import tqdm

from dissect_clip.data.formats.tar import DamagedTarError, ShardReader, split_name
from dissect_clip.data.formats.urls import check_present, expand
from dissect_clip.data.formats.webdataset import OrdinalSet
from dissect_clip.data.sampling.bitmap import Bitmap, inverted
from dissect_clip.data.sampling.plan import ShardSubset
from dissect_clip.data.sampling.shard_ids import ShardIndex, count_samples, index_shards
from dissect_clip.data.sampling.shard_sizes import SIZES_FILE, recorded_sizes, write_sizes
from dissect_clip.data.sampling.subset import list_digest, read_list
from dissect_clip.data.train_shards import sample_names
from dissect_clip.distributed.world import World
from dissect_clip.errors import SetupError
from dissect_clip.run.atomic import put_in_place, sync_folder

STATE_FILE = "export.json"


class Sample(NamedTuple):
    """All files of a sample."""

    sample_id: int
    key: str
    files: list[tuple[str, bytes]]  # by their names in the tar

    @property
    def suffixes(self) -> list[str]:
        """Of the files, as samples are told apart by them."""
        return [parts[1].lower() for name, _ in self.files if (parts := split_name(name)) is not None]


@dataclass(frozen=True)
class Export:
    """What to export, and how."""

    pattern: str
    keep: str
    output: Path
    per_shard: int
    skip_damaged: bool
    data_timeout: float


@dataclass
class State:
    """What an export has done so far; written beside the shards after each of them."""

    of: str  # digest of all that the shards depend on
    sizes: dict[str, int] = field(default_factory=dict)  # samples of the shards that are complete
    last_id: int = -1  # of the last sample in them
    lost: list[int] = field(default_factory=list)  # ids up to there that could not be read

    @classmethod
    def read(cls, path: Path) -> State:
        """Raises SetupError where it is none."""
        try:
            return cls(**json.loads(path.read_text(encoding="utf-8")))
        except (ValueError, TypeError) as error:
            raise SetupError(f"{path} is not what an export wrote ({error}): delete its folder") from error

    def write(self, path: Path) -> None:
        """Whole or not at all."""
        beside = path.with_suffix(".tmp")
        beside.write_text(json.dumps(asdict(self)), encoding="utf-8")
        put_in_place(beside, path)


# ---- reading


def read_samples(
    index: ShardIndex, kept: ShardSubset, last_id: int, timeout: float, lost: list[int], tolerant: bool
) -> Iterator[Sample]:
    """The kept samples after ``last_id``, whole; ids of what cannot be read go into ``lost``.

    Raises:
        SetupError: a sample cannot be read, unless ``tolerant``.
    """
    counts, offsets = kept.counts.tolist(), index.offsets.tolist()
    shards = [shard for shard, count in enumerate(counts) if count]
    for shard in tqdm(shards, desc="exporting", unit="shard", disable=None):
        ids = [offsets[shard] + ordinal for ordinal in kept.ordinals([shard], [range(counts[shard])])[0]]
        wanted = [number for number in ids if number > last_id]
        if not wanted:
            continue
        given, why = 0, f"it has fewer than its recorded {index.sizes[shard]} samples"
        try:
            for sample in _read_shard(index.urls[shard], offsets[shard], wanted, timeout):
                given += 1
                yield sample
        except (DamagedTarError, OSError) as error:
            why = str(error)
        if given < len(wanted) and not tolerant:
            raise SetupError(
                f"{len(wanted) - given} samples of {index.urls[shard]} cannot be read: {why}. Mend the shard, or leave "
                "such samples out with --skip-damaged"
            )
        lost += wanted[given:]


def _read_shard(url: str, offset: int, ids: list[int], timeout: float) -> Iterator[Sample]:
    """Samples of a shard whose first id is ``offset``. One that may lack files is not given."""
    current: Sample | None = None
    with ShardReader(url, timeout=timeout) as reader:
        for ordinal, key, member, data in reader.files(OrdinalSet([number - offset for number in ids])):
            if current is not None and current.sample_id != offset + ordinal:
                yield current
                current = None
            current = current or Sample(offset + ordinal, key, [])
            current.files.append((member.name, data))
    if current is not None:
        yield current


# ---- writing


class ShardWriter:
    """Writes samples to a tar, which is in place when it is closed.

    The same samples give the same bytes: owners and times are left out.
    """

    def __init__(self, path: Path, per_shard: int) -> None:
        self.path, self._per_shard = path, per_shard
        self._partial = path.with_suffix(".tmp")
        self._file = self._partial.open("wb")
        self._tar = tarfile.open(  # noqa: SIM115 - closed by close
            fileobj=self._file, mode="w", format=tarfile.GNU_FORMAT, encoding="utf-8", errors="surrogateescape"
        )
        self._last: Sample | None = None
        self.count = 0

    def takes(self, sample: Sample) -> bool:
        """Whether there is room, and the sample would not become one with the last.

        Neighbours with one key are one sample unless a suffix comes a second time, so they may not follow each other.
        """
        last = self._last
        merges = last is not None and last.key == sample.key and sample.suffixes[0] not in last.suffixes
        return self.count < self._per_shard and not merges

    def add(self, sample: Sample) -> None:
        """Append all files of a sample."""
        for name, data in sample.files:
            info = tarfile.TarInfo(name)
            info.size = len(data)
            self._tar.addfile(info, io.BytesIO(data))
        self.count += 1
        self._last = sample

    def close(self) -> int:
        """Put the shard in place; gives the id of its last sample.

        Raises:
            SetupError: read again, it does not have as many samples as were written.
        """
        assert self._last is not None
        self._tar.close()
        self._file.close()
        count = count_samples(str(self._partial))
        if count != self.count:
            raise SetupError(f"{self.path} would have {count} samples instead of {self.count}")
        put_in_place(self._partial, self.path)
        return self._last.sample_id

    def abandon(self) -> None:
        """Leave the shard; what was written of it goes."""
        self._file.close()
        self._partial.unlink(missing_ok=True)


def begin(output: Path, of: str) -> tuple[Path, State]:
    """The folder to write to, and what an export that was stopped has done in it.

    Raises:
        SetupError: something else is there.
    """
    if output.exists():
        raise SetupError(f"--output {output} is there already, and is not overwritten")
    partial = output.with_name(output.name + ".partial")
    path = partial / STATE_FILE
    if not path.exists():
        if partial.exists() and any(partial.iterdir()):
            raise SetupError(f"{partial} is not of an export: give another --output, or delete it")
        partial.mkdir(parents=True, exist_ok=True)
        State(of).write(path)
    state = State.read(path)
    if state.of != of:
        raise SetupError(f"{partial} is an export of other shards, or with other flags: delete it to begin anew")
    for leftover in partial.glob("*.tmp"):
        leftover.unlink()
    return partial, state


def write_shards(index: ShardIndex, keep: Bitmap, options: Export) -> tuple[State, int]:
    """Write the shards; what was done, and how many samples were to be written.

    Raises:
        SetupError: the output is in the way, or a sample cannot be read.
    """
    kept = ShardSubset.of(index.sizes, inverted(keep, index.num_samples))
    of = f"{index.fingerprint}+{list_digest(keep)} {options.per_shard} {options.skip_damaged}"
    partial, state = begin(options.output, hashlib.sha256(of.encode()).hexdigest())
    lost = list(state.lost)
    writer: ShardWriter | None = None

    def finish(done: ShardWriter) -> None:
        state.last_id = done.close()
        state.sizes[done.path.name] = done.count
        state.lost = [number for number in lost if number < state.last_id]
        state.write(partial / STATE_FILE)

    try:
        for sample in read_samples(index, kept, state.last_id, options.data_timeout, lost, options.skip_damaged):
            if writer is not None and not writer.takes(sample):
                finish(writer)
                writer = None
            writer = writer or ShardWriter(partial / f"{len(state.sizes):05d}.tar", options.per_shard)
            writer.add(sample)
        if writer is not None:
            finish(writer)
    except BaseException:
        if writer is not None:
            writer.abandon()
        raise
    state.lost = lost
    if not state.sizes:
        raise SetupError("none of the samples could be read, so nothing was written")
    state.write(partial / STATE_FILE)
    write_sizes(partial / SIZES_FILE, state.sizes)
    sync_folder(partial)
    os.rename(partial, options.output)
    sync_folder(options.output.parent)
    return state, int(kept.counts.sum())


def export(options: Export) -> None:
    """Export the samples of a list, and print what was written.

    Raises:
        SetupError: shards or the list cannot be read, or the output is in the way.
        OSError: a shard cannot be written.
    """
    urls = [url for source in expand(options.pattern, "PATTERN") for url in source]
    check_present(urls, "PATTERN")
    recorded = recorded_sizes(urls, None, ask_remote=True, timeout=options.data_timeout)
    index = index_shards(urls, recorded, World(), None, options.data_timeout)
    keep = read_list(options.keep, sample_names(index, options.data_timeout), "--keep")
    state, wanted = write_shards(index, keep, options)
    written = sum(state.sizes.values())
    print(f"wrote {written} of {wanted} samples to {len(state.sizes)} shards in {options.output}")
    if state.lost:
        places = np.bincount(index.locate(np.array(state.lost)), minlength=len(urls))
        for place in np.flatnonzero(places):
            print(f"  {places[place]} samples of {urls[place]} could not be read")
