"""Files that are whole or absent, whatever happens while they are written: written beside, put on the disk, renamed."""

from __future__ import annotations

import os
from pathlib import Path


def put_in_place(partial: Path, target: Path) -> None:
    """Let a complete file take the place of ``target`` in the same file system, once all of it is on the disk.

    Raises:
        OSError: if it cannot; ``target`` is then what it was, or complete where only its folder could not be put on
            the disk.
    """
    with partial.open("rb") as file:
        os.fsync(file.fileno())
    os.replace(partial, target)
    sync_folder(target.parent)


def sync_folder(folder: Path) -> None:
    """Put what was made, renamed or deleted in a folder on the disk."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
