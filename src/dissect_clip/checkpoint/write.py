"""How checkpoints are written so that a crash leaves none half written, what they are called, and which are deleted."""

from __future__ import annotations

import contextlib
import json
import logging
import re
import secrets
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from dissect_clip.checkpoint.format import Content
from dissect_clip.checkpoint.policy import Plan, Policy
from dissect_clip.errors import TrainingError
from dissect_clip.run.atomic import put_in_place

log = logging.getLogger(__name__)

_SPARE_SCORES = re.compile(r"(epoch_\d+_step_\d+|epoch_(?:\d+|latest)(?=-))(?:-[0-9a-f]+)?\.scores\.safetensors")


@contextmanager
def _in_place_when_complete(path: Path) -> Iterator[Path]:
    """A file to write beside ``path``, which takes its place when the block ends and all is on the disk.

    Raises:
        TrainingError: if it cannot be written; ``path`` is then what it was, or complete where only its folder could
            not be put on the disk.
    """
    # A name of its own: a second run of the same name, started by mistake, may be at the same checkpoint.
    partial = path.with_name(f"{path.name}.{secrets.token_hex(4)}.tmp")
    try:
        yield partial
        put_in_place(partial, path)
    except (OSError, RuntimeError) as error:
        with contextlib.suppress(OSError):
            partial.unlink(missing_ok=True)
        # torch raises a RuntimeError of its own after the one that says that the disk is full
        raise _cannot_write(path, error.__context__ if isinstance(error.__context__, OSError) else error) from error


def _cannot_write(path: Path, reason: BaseException) -> TrainingError:
    return TrainingError(
        f"cannot write the checkpoint {path}: {reason}. See that its folder is there, can be written to and has "
        "room, and that no second run of this name writes to it. Earlier checkpoints are whole: --resume latest goes "
        "on from the newest"
    )


def _identity(path: Path) -> int | None:
    """Which file is at a path; None where there is none."""
    return path.stat().st_ino if path.exists() else None


def _write_tensors(path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> None:
    """A safetensors file of float32 tensors.

    The library's own function copies every tensor, which can be gigabytes, and holds Python's lock meanwhile
    (seen with 0.4.3), so that training would stand still.
    """
    arrays = {name: tensor.contiguous().numpy() for name, tensor in tensors.items()}
    entries: dict[str, Any] = {"__metadata__": metadata}
    end = 0
    for name, array in arrays.items():
        begin, end = end, end + array.nbytes
        entries[name] = {"dtype": "F32", "shape": array.shape, "data_offsets": [begin, end]}
    header = json.dumps(entries).encode()
    header += b" " * (-len(header) % 8)
    with path.open("wb") as file:
        file.write(len(header).to_bytes(8, "little") + header)
        for array in arrays.values():
            file.write(array.reshape(-1).view(np.uint8).data)


def _scores_files(path: Path) -> list[Path]:
    """All files of scores that are or were of the checkpoint at ``path``."""
    return [
        *path.parent.glob(f"{path.stem}.scores.safetensors"),
        *path.parent.glob(f"{path.stem}-*.scores.safetensors"),
    ]


def _write(path: Path, epoch: int, content: Content) -> None:
    """Write the big tensors and then the .pt that names them; those of a checkpoint it replaces stay until then."""
    token = secrets.token_hex(8)
    again = f"-{token[:8]}" if path.exists() else ""
    scores_path = path.with_name(f"{path.stem}{again}.scores.safetensors")
    if content.tensors:
        names = {key: json.dumps(value) for key, value in content.names.items()}
        with _in_place_when_complete(scores_path) as partial:
            _write_tensors(partial, content.tensors, {"token": token, "epoch": str(epoch), **names})
    reference = {"token": token, "scores_file": scores_path.name if content.tensors else None}
    before = _identity(path)
    try:
        with _in_place_when_complete(path) as partial, partial.open("wb") as file:
            torch.save({"epoch": epoch, **content.pt, "dissect": {**content.pt["dissect"], **reference}}, file)
    except TrainingError:
        if content.tensors and _identity(path) == before:  # else it is in place, and needs them
            _delete(scores_path)
        raise
    for old in _scores_files(path):
        if not content.tensors or old != scores_path:
            _delete(old)


def _delete(path: Path) -> None:
    """Delete what is not needed; that it stays is no reason to stop."""
    try:
        path.unlink(missing_ok=True)
    except OSError as error:
        log.warning("Cannot delete %s: %s", path, error)


def _delete_checkpoint(path: Path) -> None:
    """Delete a checkpoint, the .pt first, since it names its scores."""
    for file in (path, *_scores_files(path)):
        _delete(file)


def _delete_leftovers(folder: Path) -> None:
    """Delete what crashes have left: temporary files, and scores whose checkpoint never came into being.

    ``epoch_7.scores.safetensors`` stays: somebody may have wanted it without its checkpoint.
    """
    for path in folder.glob("epoch_*.tmp"):
        _delete(path)
    for path in folder.glob("epoch_*.scores.safetensors"):
        match = _SPARE_SCORES.fullmatch(path.name)
        if match is not None and not path.with_name(f"{match[1]}.pt").exists():
            _delete(path)


def save_checkpoint(folder: Path, content: Content, *, plan: Plan, policy: Policy) -> Path:
    """Write the checkpoints of a plan, then delete those that they replace, here and now; on rank 0.

    Returns the first file.

    Args:
        content: in main memory.
        plan: with at least one name.

    Raises:
        TrainingError: if a file cannot be written, or the folder not be read; earlier checkpoints are then whole.
    """
    paths = [folder / f"{name}.pt" for name in plan.names]
    try:
        _delete_leftovers(folder)
        for path in paths:
            _write(path, plan.epoch_step[0], content)
        for name in policy.replaced(plan, [path.stem for path in folder.glob("epoch_*.pt")]):
            _delete_checkpoint(folder / f"{name}.pt")
    except OSError as error:  # of a file system that has gone
        raise _cannot_write(folder, error) from error
    return paths[0]
