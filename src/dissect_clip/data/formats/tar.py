"""Tar shards: their members, and the samples that the members make up.

The order of the samples in a tar gives them their ids, so one function says what a sample is
(:func:`number_members`), and counting and reading both go through it. Headers are read here rather than by
``tarfile``, which takes a damaged header for the end of the tar and several times as long to pass a member. Nothing is
believed that a header says: names are only compared and shown, and a size is no reason to ask for memory.

Format: POSIX.1-1988 (ustar), POSIX.1-2001 (pax) and GNU long names; plain, gzip, bzip2 or xz.
"""

from __future__ import annotations

import bz2
import gzip
import io
import lzma
import os
import re
import sys
import zlib
from collections.abc import Collection, Iterable, Iterator
from typing import Any, NamedTuple, Protocol

from dissect_clip.config.settings import DataSettings
from dissect_clip.data.formats.decode import MAX_FILE_SIZE
from dissect_clip.data.formats.download import open_stream
from dissect_clip.data.formats.urls import is_local, local_path

_BLOCK = 512
_CHUNK = 1 << 20
_MAX_NAMES = 1 << 20
"""Bytes of a long name or a pax header; no honest one has more."""
_MAX_SIZE = 1 << 40
"""Bytes of a member; more can only be a damaged header."""
_MAX_KEY = 1000
"""Characters of a key that are kept."""
_META = re.compile(r"__[^/]*__($|/)")
_REGULAR = b"0\x007"
_WITHOUT_DATA = b"123456"  # links, devices, folders, pipes
_DECOMPRESSORS: dict[bytes, Any] = {
    b"\x1f\x8b": gzip.open,
    b"BZh": bz2.open,
    b"\xfd7zXZ": lzma.open,
}


WHOLE = range(sys.maxsize)
"""Every ordinal."""


class DamagedTarError(Exception):
    """The tar ends in the middle of a member, or a header makes no sense."""


class Member(NamedTuple):
    """A regular file in a tar."""

    name: str
    size: int  # in bytes


class TarSample(NamedTuple):
    """The files of one sample."""

    ordinal: int  # place of the sample in its tar, from 0
    key: str  # the files' common name, without suffix; its first 1,000 characters
    files: dict[str, bytes]  # by suffix in lower case, without the dot
    too_large: list[str]  # suffixes of files of more than MAX_FILE_SIZE bytes, which were passed over


class Ordinals(Protocol):
    """Which samples of a tar to read, as a range says it."""

    @property
    def stop(self) -> int:
        """The first ordinal behind them."""
        ...

    def __contains__(self, ordinal: int, /) -> bool: ...


class _Readable(Protocol):
    def read(self, count: int, /) -> bytes | None: ...
    def close(self) -> None: ...


class _LocalFile:
    """A plain tar on this machine: data is passed by seeking. Unbuffered, since headers may lie far apart."""

    def __init__(self, file: io.FileIO) -> None:
        self._file, self._size = file, os.fstat(file.fileno()).st_size

    def read(self, count: int) -> bytes:
        return self._file.read(min(count, self._size))

    def skip(self, count: int) -> None:
        if count > self._size or (count and self._file.seek(count, io.SEEK_CUR) > self._size):
            raise DamagedTarError("it ends in the middle of a member")

    def close(self) -> None:
        self._file.close()


class _Stream:
    """A pipe, a download or a decompressor, which can only be read on."""

    def __init__(self, *layers: _Readable) -> None:
        self._top, self._layers = layers[0], layers

    def read(self, count: int) -> bytes:
        pieces, left = [], count
        try:
            while left and (piece := self._top.read(min(left, _CHUNK))):
                pieces.append(piece)
                left -= len(piece)
        except (EOFError, zlib.error, lzma.LZMAError, gzip.BadGzipFile, MemoryError) as error:
            raise DamagedTarError(f"its compression is broken ({error})") from error
        return b"".join(pieces)

    def skip(self, count: int) -> None:
        while count > 0:
            got = len(self.read(min(count, _CHUNK)))
            if got == 0:
                raise DamagedTarError("it ends in the middle of a member")
            count -= got

    def close(self) -> None:
        for layer in self._layers:
            layer.close()


class _Rejoined:
    """A stream whose first bytes were already read."""

    def __init__(self, head: bytes, stream: _Readable) -> None:
        self._head, self._stream = head, stream

    def read(self, count: int) -> bytes:
        if not self._head:
            return self._stream.read(count) or b""
        data, self._head = self._head[:count], self._head[count:]
        return data

    def close(self) -> None:
        self._stream.close()


def _open(url: str, timeout: float) -> _LocalFile | _Stream:
    stream = io.FileIO(local_path(url)) if is_local(url) else open_stream(url, timeout)
    try:
        head = _Stream(stream).read(5)
        if not head:
            raise DamagedTarError("it is empty")
        opened = [opener for magic, opener in _DECOMPRESSORS.items() if head.startswith(magic)]
        if isinstance(stream, io.FileIO) and not opened:
            stream.seek(0)
            return _LocalFile(stream)
        rejoined = _Rejoined(head, stream)
        return _Stream(opened[0](rejoined), rejoined) if opened else _Stream(rejoined)
    except (DamagedTarError, OSError):
        stream.close()
        raise


def _number(field: bytes) -> int:
    """Of a header: in octal, or base 256 for files of 8 GiB and more. Raises ValueError."""
    if field[0] == 0x80:
        return int.from_bytes(field[1:], "big")
    return int(field.split(b"\0", 1)[0].strip() or b"0", 8)


def _checked_size(size: int) -> int:
    if not 0 <= size <= _MAX_SIZE:
        raise DamagedTarError(f"a header gives a file {size} bytes")
    return size


def _text(field: bytes) -> str:
    return field.split(b"\0", 1)[0].decode("utf-8", "surrogateescape")


def _parse_header(header: bytes) -> tuple[bytes, str, int]:
    """Type, name and size of a member.

    Raises:
        DamagedTarError: the block is cut off, or its checksum is wrong.
    """
    if len(header) < _BLOCK:
        raise DamagedTarError("it ends in the middle of a header")
    try:
        checksum, size = _number(header[148:156]), _number(header[124:136])
    except ValueError:
        raise DamagedTarError("a header makes no sense") from None
    if checksum != sum(header) - sum(header[148:156]) + 8 * ord(" "):
        raise DamagedTarError("the checksum of a header is wrong")
    name = _text(header[:100])
    if header[257:263] == b"ustar\0" and header[345]:
        name = _text(header[345:500]) + "/" + name
    return header[156:157], name, _checked_size(size)


def _parse_pax(data: bytes) -> dict[bytes, bytes]:
    """The records ``LENGTH KEY=VALUE`` of a pax header.

    Raises:
        DamagedTarError: it is not made of such records.
    """
    records = {}
    start = 0
    while data[start : start + 1].strip(b"\0"):
        space = data.find(b" ", start, start + len(str(_MAX_NAMES)) + 1)
        length = data[start : max(start, space)]
        if not length.isdigit() or not space < (end := start + int(length)) <= len(data):
            raise DamagedTarError("a pax header makes no sense")
        key, _, value = data[space + 1 : end - 1].partition(b"=")
        records[key] = value
        start = end
    return records


def _pax_size(value: bytes) -> int:
    if not value.isdigit() or len(value) > 20:
        raise DamagedTarError("a pax header makes no sense")
    return _checked_size(int(value))


def split_name(name: str) -> tuple[str, str] | None:
    """Key and suffix of a member: its name up to the first dot of the base name, and what follows; None without one.

    A base name that begins with a dot is a suffix if the folder before it has no dot. As ``base_plus_ext`` of
    webdataset, whose pattern takes the square of a long name's length.
    """
    base = name.rfind("/") + 1
    dot = name.find(".", base)
    folder = name[name.rfind("/", 0, max(0, base - 1)) + 1 : base]
    if dot < 0 or (dot == base and (not folder or "." in folder)):
        return None
    return name[:dot], name[dot + 1 :]


def number_members(members: Iterable[Member]) -> Iterator[tuple[int, str, str, Member]]:
    """The samples that a tar's members make up: (ordinal, key, suffix, member) of each member that belongs to one.

    Neighbours with the same name up to the first dot of the base name are one sample, as in webdataset; a suffix that
    comes a second time begins another sample, as in OpenCLIP. Members called ``__NAME__`` are not data.
    """
    ordinal, key = -1, None
    suffixes: set[str] = set()
    for member in members:
        parts = split_name(member.name)
        if parts is None or _META.match(member.name):
            continue
        base, suffix = parts[0], parts[1].lower()
        if base != key or suffix in suffixes:
            ordinal, key, suffixes = ordinal + 1, base, set()
        suffixes.add(suffix)
        yield ordinal, base, suffix, member


class ShardReader:
    """Reads the samples of one shard in order; a context manager.

    Raises:
        DamagedTarError, OSError: when made, where the shard cannot be opened or is empty.
    """

    def __init__(self, url: str, suffixes: Collection[str] = (), timeout: float = DataSettings.data_timeout) -> None:
        """``suffixes`` are wanted by :meth:`read`; a remote shard is given up after ``timeout`` silent seconds."""
        self._file = _open(url, timeout)
        self._suffixes = suffixes
        self._left = 0  # bytes up to the next header
        self._numbered = number_members(self._members())
        self.count = 0
        """Samples met so far."""

    def __enter__(self) -> ShardReader:
        return self

    def __exit__(self, *exception: object) -> None:
        self._file.close()

    def _read(self, size: int) -> bytes:
        data = self._file.read(size)
        self._left -= len(data)
        if len(data) < size:
            raise DamagedTarError("it ends in the middle of a member")
        return data

    def _read_names(self, size: int) -> bytes:
        if size > _MAX_NAMES:
            raise DamagedTarError(f"a header gives a name {size} bytes")
        return self._read(size)

    def _members(self) -> Iterator[Member]:
        override: dict[bytes, bytes] = {}
        while True:
            self._file.skip(self._left)
            header = self._file.read(_BLOCK)
            if not any(header):
                return
            kind, name, size = _parse_header(header)
            if kind not in b"LKxXg" and b"size" in override:
                size = _pax_size(override[b"size"])
            self._left = 0 if kind in _WITHOUT_DATA else -(-size // _BLOCK) * _BLOCK
            if kind == b"L":
                override[b"path"] = self._read_names(size).rstrip(b"\0")
            elif kind in b"xX":
                override |= _parse_pax(self._read_names(size))
            elif kind not in b"Kg":
                if kind in _REGULAR:
                    path = override.get(b"path")
                    yield Member(name if path is None else _text(path), size)
                override = {}

    def read(self, keep: Ordinals) -> Iterator[TarSample]:
        """The samples whose ordinals are in ``keep``, with the files of the wanted suffixes; stops at its end.

        Raises:
            DamagedTarError, OSError: after the last sample that could be read, which may lack files.
        """
        current: TarSample | None = None
        problem: Exception | None = None
        try:
            for ordinal, key, suffix, member in self._numbered:
                self.count = ordinal + 1
                if current is not None and ordinal != current.ordinal:
                    yield current
                    current = None
                if ordinal >= keep.stop:
                    break
                if ordinal in keep:
                    current = current or TarSample(ordinal, key[:_MAX_KEY], {}, [])
                    if suffix in self._suffixes and member.size > MAX_FILE_SIZE:
                        current.too_large.append(suffix)
                    elif suffix in self._suffixes:
                        current.files[suffix] = self._read(member.size)
        except (DamagedTarError, OSError) as error:
            problem = error
        if current is not None:
            yield current
        if problem is not None:
            raise problem

    def files(self, keep: Ordinals) -> Iterator[tuple[int, str, Member, bytes]]:
        """Every file of the samples whose ordinals are in ``keep``, whatever its suffix and size; stops at its end.

        Ordinal and key of the sample, the member, and what is in it.

        Raises:
            DamagedTarError, OSError: after the last file that could be read; its sample may have had more.
        """
        for ordinal, key, _, member in self._numbered:
            self.count = ordinal + 1
            if ordinal >= keep.stop:
                break
            if ordinal in keep:
                yield ordinal, key, member, self._read(member.size)

    def finish(self) -> int:
        """Pass the rest of the tar by, and give the number of samples in the whole.

        Raises:
            DamagedTarError, OSError: ``count`` holds the samples before the damage.
        """
        for ordinal, _, _, _ in self._numbered:
            self.count = ordinal + 1
        return self.count
