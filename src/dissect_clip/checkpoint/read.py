"""Reading checkpoints, ours and OpenCLIP's; whatever is damaged or hostile ends in an error that says so."""

from __future__ import annotations

import dataclasses
import errno
import json
import logging
import os
import pickle
import re
import tempfile
import types
import typing
import zipfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import safe_open
from torch import Tensor

from dissect_clip.checkpoint.format import (
    FORMAT_VERSION,
    Checkpoint,
    RunState,
    SavedReference,
    Shards,
    map_tensors,
    without_prefix,
)
from dissect_clip.errors import SetupError
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


def _scores_path(path: str, content: Mapping[str, Any]) -> str | None:
    """The scores that a checkpoint at ``path`` refers to, which stand beside it; None where it has none."""
    name = content["dissect"]["scores_file"] if "dissect" in content else None
    if name is None:
        return None
    if re.fullmatch(r"[\w.-]+\.scores\.safetensors", name) is None:
        raise SetupError(f"{path} names its scores {name!r}, which is no file beside it: give another checkpoint")
    folder, slash, _ = path.rpartition("/")
    return f"{folder}{slash}{name}"


def _check_scores(path: str, file: Any, token: Any, state: RunState) -> None:
    """See that an open file of scores belongs to the checkpoint with this token and state.

    Raises:
        SetupError: if it does not.
    """
    if (file.metadata() or {}).get("token") != token:
        raise SetupError(f"{path} belongs to another checkpoint, saving was cut short: resume from an earlier one")
    table = file.get_slice("scores")
    found, expected = (table.get_dtype(), table.get_shape()), ("F32", [state.num_samples, len(state.columns)])
    if found != expected:
        raise SetupError(f"{path} holds scores of another data set or strategy, {found} instead of {expected}")


_LATER = {"survey", "survey_of", "depends_on"}
"""What files of format 2 may lack."""


def _is(value: Any, hint: Any) -> bool:
    """Whether a value is of a type as RunState's fields have them; lists pass for tuples."""
    origin, inner = typing.get_origin(hint), typing.get_args(hint)
    if origin is types.UnionType:
        return any(_is(value, option) for option in inner)
    if origin is dict:
        return isinstance(value, dict) and all(_is(k, inner[0]) and _is(v, inner[1]) for k, v in value.items())
    if origin is tuple:
        return isinstance(value, (tuple, list)) and all(_is(item, inner[0]) for item in value)
    if hint is float:
        return type(value) in (int, float)
    return type(value) is hint


def _checked(path: str, name: str, value: Any, hint: Any) -> Any:
    if not _is(value, hint):
        raise SetupError(f"{path} cannot be used as a checkpoint: its {name} is {value!r:.60}. Give another checkpoint")
    return value


def _state(path: str, dissect: Mapping[str, Any]) -> RunState:
    if _checked(path, "format_version", dissect["format_version"], int) > FORMAT_VERSION:
        raise NotDamagedError(f"{path} was saved by a newer version of this package: update it")
    hints = typing.get_type_hints(RunState)
    added = {field.name for field in dataclasses.fields(RunState) if field.default is not dataclasses.MISSING}
    names = set(hints) - (added if dissect["format_version"] == 1 else _LATER - set(dissect))
    values: dict[str, Any] = {name: _checked(path, name, dissect[name], hints[name]) for name in names}
    return RunState(**values | {name: tuple(value) for name, value in values.items() if isinstance(value, list)})


def _unpack_shards(path: str, packed: Any) -> Shards | None:
    if packed is None:
        return None
    names, sizes = json.loads(packed["names"]), packed["sizes"]
    _checked(path, "list of shards", names, tuple[str, ...])
    if sizes is not None and (sizes.dtype != torch.int64 or sizes.shape != (len(names),)):
        raise SetupError(
            f"{path} cannot be used as a checkpoint: its list of shards is not whole. Give another checkpoint"
        )
    return Shards(tuple(names), None if sizes is None else sizes.numpy())


def _reference(path: str, saved: Any) -> SavedReference | None:
    if saved is None:
        return None
    _checked(path, "reference", saved, dict)
    digest = _checked(path, "reference's digest", saved.get("digest"), str | None)
    weights = saved.get("weights")
    return SavedReference(digest, None if weights is None else _weights(path, weights))


def _decoys(path: str, saved: Any) -> Tensor | None:
    if saved is None:
        return None
    captions: Tensor = _checked(path, "decoys", saved, Tensor)
    if captions.dtype != torch.int32 or captions.dim() != 2:
        raise SetupError(f"{path} cannot be used as a checkpoint: its decoys are no captions. Give another checkpoint")
    return captions


def _weights(path: str, weights: Any) -> dict[str, Tensor]:
    """A model's state, checked to be one."""
    if not isinstance(weights, dict) or not weights or not all(isinstance(w, Tensor) for w in weights.values()):
        raise SetupError(f"{path} is not a checkpoint: it holds no model weights")
    return without_prefix(weights)


def _parse(path: str, content: dict[str, Any]) -> Checkpoint:
    """A checkpoint from what its .pt holds, still without scores."""
    if "state_dict" not in content:
        return Checkpoint(path, 0, _weights(path, content))
    epoch = _checked(path, "epoch", content.get("epoch", 0), int)
    optimizer, scaler = content.get("optimizer"), content.get("scaler")
    checkpoint = Checkpoint(
        path=path,
        epoch=epoch,
        state_dict=_weights(path, content["state_dict"]),
        optimizer=None if optimizer is None else _checked(path, "optimizer", optimizer, dict),
        scaler=None if scaler is None else _checked(path, "scaler", scaler, dict),
    )
    if "dissect" not in content:
        return checkpoint
    dissect = content["dissect"]
    loader = dissect.get("loader")
    return dataclasses.replace(
        checkpoint,
        state=_state(path, dissect),
        loader=None if loader is None else _checked(path, "loader", loader, dict),
        shards=_unpack_shards(path, dissect.get("shards")),
        reference=_reference(path, dissect.get("reference")),
        decoys=_decoys(path, dissect.get("decoys")),
    )


def read_checkpoint(path: str, keep: Callable[[Tensor], Tensor]) -> Checkpoint:
    """Read and check a checkpoint and its scores; ``keep`` is given every tensor, whose values are still on the disk.

    Raises:
        SetupError: if the file is missing, damaged, something else, or torn from its scores.
    """
    with _explaining(path), _local(path) as local:
        content = map_tensors(_read_file(local), lambda _, tensor: keep(tensor))
        checkpoint = _parse(path, content)
        scores_path = _scores_path(path, content)
        token: Any = None if scores_path is None else content["dissect"]["token"]
    if scores_path is None:
        return checkpoint
    assert checkpoint.state is not None
    with _explaining(scores_path), _local(scores_path) as local, safe_open(local, framework="pt") as file:
        _check_scores(scores_path, file, token, checkpoint.state)
        return dataclasses.replace(checkpoint, scores=keep(file.get_tensor("scores")))


def load_checkpoint(path: str | os.PathLike[str]) -> Checkpoint:
    """Read a checkpoint of ours, of OpenCLIP, or a bare state dict; a local path or any fsspec URL. Not collective.

    Raises:
        SetupError: if the file is missing, damaged, something else, or torn from its scores.
    """
    return read_checkpoint(os.fspath(path), torch.clone)
