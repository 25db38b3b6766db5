"""Reading checkpoints, ours and OpenCLIP's; whatever is damaged or hostile ends in an error that says so."""

from __future__ import annotations

import errno
import logging
import os
import pickle
import re
import tempfile
import zipfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import safe_open
from torch import Tensor

from dissect_clip.checkpoint.format import FORMAT_VERSION, OPENCLIP_PARTS, Checkpoint, States, map_tensors
from dissect_clip.checkpoint.legacy import checked, parts_of_openclip, translated
from dissect_clip.errors import SetupError
from dissect_clip.models.weights import without_prefix
from dissect_clip.run.remote_sync import download

log = logging.getLogger(__name__)


class NotDamagedError(SetupError):
    """A checkpoint cannot be read, and not because of what is in it: to pass over it would undo training."""


_STORAGE = frozenset({errno.EIO, errno.ESTALE, errno.EACCES, errno.EPERM, errno.ETIMEDOUT, errno.ENOMEM})
"""Errors of the storage or the machine, not of a file."""


@contextmanager
def _local(path: str) -> Iterator[Path]:
    """The file itself, or a copy of a remote one for as long as the block lasts."""
    if "://" not in path:
        yield Path(path)
        return
    log.info("Copying %s, which may take a while", path)
    with tempfile.TemporaryDirectory() as folder:
        copy = Path(folder) / path.rpartition("/")[2]
        download(path, copy)
        yield copy


@contextmanager
def _explaining(path: str) -> Iterator[None]:
    """Turn whatever a damaged file makes the readers raise into a SetupError that names the file."""
    try:
        yield
    except SetupError:
        raise
    except FileNotFoundError as error:
        raise SetupError(f"{path} does not exist: give another checkpoint") from error
    except Exception as error:
        if isinstance(error, OSError) and error.errno in _STORAGE:
            raise NotDamagedError(
                f"{path} cannot be read ({error.strerror}), which need not be its fault: see that its storage can be "
                "read and start again, or give another checkpoint"
            ) from error
        reason = str(error).partition("\n")[0]
        if isinstance(error, pickle.UnpicklingError):  # whose message says how to run what it holds
            reason = "it holds something other than tensors and plain values"
        raise SetupError(
            f"{path} cannot be read as a checkpoint, damaged or not one ({reason}): give another checkpoint"
        ) from error


def _numpy_scalars() -> list[Any]:
    """What pickles of numpy's floats refer to; OpenCLIP's checkpoints hold such a learning rate. All harmless."""
    scalar, (dtype, _) = np.float64(0).__reduce__()
    names = ("numpy.core.multiarray.scalar", "numpy._core.multiarray.scalar")
    return [np.dtype, type(dtype), *((scalar, name) for name in names)]


def _read_file(path: Path) -> dict[str, Any]:
    """The content of a .pt on the CPU. The tensors' values stay on the disk, where they are mapped from.

    Mapped, a tensor that claims to be larger than the file is refused; older versions of torch read past its end.
    Checksums, which torch does not look at, are compared in our own files.
    """
    zipped = zipfile.is_zipfile(path)  # else of a torch before 1.6, which cannot be mapped
    with torch.serialization.safe_globals(_numpy_scalars()):
        content = torch.load(path, map_location="cpu", weights_only=True, mmap=zipped)
    if not isinstance(content, dict):
        raise SetupError(f"{path} is not a checkpoint: it holds a {type(content).__name__}")
    if "dissect" in content:
        with zipfile.ZipFile(path) as archive:
            damaged = archive.testzip()
        if damaged is not None:
            raise SetupError(f"{path} is damaged (its checksums are wrong): give another checkpoint")
    return content


def _tensors_path(path: str, dissect: Mapping[str, Any]) -> str | None:
    """The file of big tensors of a checkpoint at ``path``, which stands beside it; None if it has none."""
    name = dissect.get("scores_file")
    if name is None:
        return None
    if re.fullmatch(r"[\w.-]+\.scores\.safetensors", name) is None:
        raise SetupError(f"{path} names its scores {name!r}, which is no file beside it: give another checkpoint")
    folder, slash, _ = path.rpartition("/")
    return f"{folder}{slash}{name}"


def _check_tensors(path: str, file: Any, token: Any, shapes: Mapping[str, list[int]]) -> None:
    """See that an open file of big tensors belongs to the checkpoint with this token.

    Raises:
        SetupError: if it does not, or if a tensor is not float32 of its shape.
    """
    if (file.metadata() or {}).get("token") != token:
        raise SetupError(f"{path} belongs to another checkpoint, saving was cut short: resume from an earlier one")
    for name, shape in shapes.items():
        table = file.get_slice(name)
        found, expected = (table.get_dtype(), table.get_shape()), ("F32", shape)
        if found != expected:
            raise SetupError(
                f"{path} holds {name} of another dataset or strategy, {found} instead of {expected}: give another "
                "checkpoint"
            )


def _dissect(path: str, epoch: int, dissect: Mapping[str, Any]) -> dict[str, Any]:
    """ "dissect" in the layout of format 3, of the types that this layout has."""
    version = checked(path, "format_version", dissect["format_version"], int)
    if version > FORMAT_VERSION:
        raise NotDamagedError(f"{path} was saved by a newer version of this package: update it")
    if version < FORMAT_VERSION:
        return translated(path, epoch, dissect)
    checked(path, "model", dissect["model"], str)
    parts = checked(path, "list of parts", dissect["parts"], dict[str, dict[str, Any]])
    for name, entry in checked(path, "list of tensors", dissect["tensors"], dict[str, dict[str, Any]]).items():
        checked(path, f"shape of {name}", entry["shape"], tuple[int, ...])
        if entry["part"] not in parts:
            raise SetupError(f"{path} cannot be used as a checkpoint: it has no part for {name}")
    if bool(dissect["tensors"]) != (dissect["scores_file"] is not None):
        raise SetupError(f"{path} cannot be used as a checkpoint: it does not name the file of its tensors")
    return dict(dissect)


def _weights(path: str, weights: Any) -> dict[str, Tensor]:
    """A model's state, checked to be one."""
    if not isinstance(weights, dict) or not weights or not all(isinstance(w, Tensor) for w in weights.values()):
        raise SetupError(f"{path} is not a checkpoint: it holds no model weights")
    return without_prefix(weights)


def _parse(path: str, content: dict[str, Any]) -> tuple[Checkpoint, dict[str, Any]]:
    """A checkpoint from what its .pt holds, still without big tensors; and its "dissect", empty without one."""
    if "state_dict" not in content:
        return Checkpoint(path, 0, {"state_dict": _weights(path, content), **parts_of_openclip(0)}), {}
    epoch = checked(path, "epoch", content.get("epoch", 0), int)
    parts: States = {"state_dict": _weights(path, content["state_dict"])}
    for name in OPENCLIP_PARTS[1:]:
        if content.get(name) is not None:
            parts[name] = checked(path, name, content[name], dict)
    if "dissect" not in content:
        return Checkpoint(path, epoch, {**parts, **parts_of_openclip(epoch)}), {}
    dissect = _dissect(path, epoch, content["dissect"])
    return Checkpoint(path, epoch, {**dissect["parts"], **parts}, dissect["model"]), dissect


def read_checkpoint(path: str, keep: Callable[[Tensor], Tensor]) -> Checkpoint:
    """Read and check a checkpoint and its big tensors; ``keep`` gets every tensor, whose values are still on the disk.

    What a part's state has to hold is checked by the part, before it is restored.

    Raises:
        SetupError: if the file is missing, damaged, something else, or torn from its scores.
    """
    with _explaining(path), _local(path) as local:
        content = map_tensors(_read_file(local), lambda _, tensor: keep(tensor))
        checkpoint, dissect = _parse(path, content)
        tensors_path = _tensors_path(path, dissect)
    if tensors_path is None:
        return checkpoint
    entries = dissect["tensors"]
    with _explaining(tensors_path), _local(tensors_path) as local, safe_open(local, framework="pt") as file:
        shapes = {name: list(entry["shape"]) for name, entry in entries.items()}
        _check_tensors(tensors_path, file, dissect["token"], shapes)
        for name, entry in entries.items():
            checkpoint.parts[entry["part"]][name] = keep(file.get_tensor(name))
    return checkpoint


def load_checkpoint(path: str | os.PathLike[str]) -> Checkpoint:
    """Read a checkpoint of ours, of OpenCLIP, or a bare state dict; a local path or any fsspec URL. Not collective.

    Raises:
        SetupError: if the file is missing, damaged, something else, or torn from its scores.
    """
    return read_checkpoint(os.fspath(path), torch.clone)
