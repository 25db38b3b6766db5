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

from dissect_clip.config.settings import Config
from dissect_clip.errors import TrainingError
from dissect_clip.run.atomic import put_in_place

log = logging.getLogger(__name__)

_FILE = re.compile(r"epoch_(\d+)(?:_step_(\d+))?\.pt")
_SPARE_SCORES = re.compile(r"(epoch_\d+_step_\d+|epoch_(?:\d+|latest)(?=-))(?:-[0-9a-f]+)?\.scores\.safetensors")
LATEST = "epoch_latest"

Place = tuple[int, int]
"""Complete epochs, and in the middle of an epoch the optimizer steps done in all, else 0: rises as training goes on."""


def place_of(name: str) -> Place | None:
    """The place of a checkpoint, by the name of its .pt; None of other files."""
    match = _FILE.fullmatch(name)
    return None if match is None else (int(match[1]), int(match[2] or 0))


def checkpoints_in(folder: Path) -> list[tuple[Place, Path]]:
    """The checkpoints in a folder with their places; without epoch_latest."""
    places = ((place_of(path.name), path) for path in folder.glob("epoch_*.pt"))
    return [(place, path) for place, path in places if place is not None]


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


def _write_scores(path: Path, scores: Tensor, metadata: Mapping[str, str]) -> None:
    """A safetensors file of one float32 tensor.

    The library's own function copies the whole table, which can be gigabytes, and holds Python's lock meanwhile
    (seen with 0.4.3), so that training would stand still.
    """
    table = scores.contiguous().numpy()
    entry = {"dtype": "F32", "shape": table.shape, "data_offsets": [0, table.nbytes]}
    header = json.dumps({"__metadata__": metadata, "scores": entry}).encode()
    header += b" " * (-len(header) % 8)
    with path.open("wb") as file:
        file.write(len(header).to_bytes(8, "little") + header)
        file.write(table.reshape(-1).view(np.uint8).data)


def _scores_files(path: Path) -> list[Path]:
    """All files of scores that are or were of the checkpoint at ``path``."""
    return [
        *path.parent.glob(f"{path.stem}.scores.safetensors"),
        *path.parent.glob(f"{path.stem}-*.scores.safetensors"),
    ]


def _write(path: Path, content: Mapping[str, Any], scores: Mapping[str, Any] | None) -> None:
    """Write the scores and then the checkpoint that names them; the scores of one it replaces stay until then."""
    token = secrets.token_hex(8)
    again = f"-{token[:8]}" if path.exists() else ""
    scores_path = path.with_name(f"{path.stem}{again}.scores.safetensors")
    if scores is not None:
        metadata = {"token": token, "columns": json.dumps(scores["columns"]), "epoch": str(content["epoch"])}
        with _in_place_when_complete(scores_path) as partial:
            _write_scores(partial, scores["scores"], metadata)
    reference = {"token": token, "scores_file": None if scores is None else scores_path.name}
    before = _identity(path)
    try:
        with _in_place_when_complete(path) as partial, partial.open("wb") as file:
            torch.save({**content, "dissect": {**content["dissect"], **reference}}, file)
    except TrainingError:
        if scores is not None and _identity(path) == before:  # else it is in place, and needs them
            _delete(scores_path)
        raise
    for old in _scores_files(path):
        if scores is None or old != scores_path:
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


def _delete_replaced(folder: Path, newest: Place, delete_previous: bool) -> None:
    """Delete the step checkpoints that the newest replaces, and the last epoch's before it where that is asked for.

    A step checkpoint replaces all others of its epoch: those with more steps are of smaller batches, or of an attempt
    that was given up.
    """
    others = [(place, path) for place, path in checkpoints_in(folder) if place != newest]
    for (epoch, step), path in others:
        if step > 0 and (epoch < newest[0] or (epoch == newest[0] and newest[1] > 0)):
            _delete_checkpoint(path)
    epochs = [(place, path) for place, path in others if place[1] == 0 and place < newest]
    if delete_previous and epochs:
        _delete_checkpoint(max(epochs)[1])


def wanted_names(config: Config, epoch: int, step: int | None, stopping: bool = False) -> list[str]:
    """Names, without their ending, of the checkpoints that ``config`` asks for now; at least one in a stop."""
    if step is not None:
        return [f"epoch_{epoch}_step_{step}"]
    due = config.checkpoint.save_frequency > 0 and epoch % config.checkpoint.save_frequency == 0
    last = epoch == config.training.epochs or (stopping and not config.checkpoint.save_most_recent)
    names = [f"epoch_{epoch}"] if due or last else []
    return [*names, LATEST] if config.checkpoint.save_most_recent else names


def save_checkpoint(
    folder: Path,
    epoch: int,
    content: Mapping[str, Any],
    scores: Mapping[str, Any] | None,
    *,
    config: Config,
    step: int | None = None,
    stopping: bool = False,
) -> Path | None:
    """Save what ``config`` asks for after ``epoch`` complete epochs, here and now; on rank 0. Returns the file, if any.

    ``--save-frequency`` decides which epochs are kept, the last always is; ``--save-most-recent`` keeps epoch_latest.pt
    besides. With ``--delete-previous-checkpoint`` the one before is deleted once the new one is complete. Step
    checkpoints are always deleted once a newer checkpoint is complete.

    Args:
        content: of :func:`checkpoint_content`, in main memory.
        scores: state dict of a store with columns, in main memory.
        step: of a step checkpoint, the optimizer steps done in all.
        stopping: the run ends with it, so that there has to be one.

    Raises:
        TrainingError: if a file cannot be written, or the folder not be read; earlier checkpoints are then whole.
    """
    content = {"epoch": epoch, **content}
    paths = [folder / f"{name}.pt" for name in wanted_names(config, epoch, step, stopping)]
    try:
        _delete_leftovers(folder)
        for path in paths:
            _write(path, content, scores)
        if not paths:
            return None
        kept = paths[0].stem == f"epoch_{epoch}"
        _delete_replaced(folder, (epoch, step or 0), config.checkpoint.delete_previous_checkpoint and kept)
    except OSError as error:  # of a file system that has gone
        raise _cannot_write(folder, error) from error
    return paths[0]
