"""Checkpoints: what is in them, how they are written so that a crash leaves none half written, and how they are read.

    checkpoints/epoch_7.pt                    OpenCLIP's keys, and "dissect" with what selection needs
    checkpoints/epoch_7.scores.safetensors    the score store, which can be gigabytes; only with --select
    checkpoints/epoch_latest.pt               with --save-most-recent
    checkpoints/epoch_latest-TOKEN.scores.safetensors

The scores are in place before the .pt that refers to them, and both hold the same random token: a pair torn by a
crash is recognised. "epoch" counts complete epochs. Everything is read with ``weights_only=True``.
"""

from __future__ import annotations

import dataclasses
import json
import logging
import os
import re
import secrets
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from dissect_clip.config import Config
from dissect_clip.dist import World
from dissect_clip.errors import SetupError, TrainingError
from dissect_clip.remote import download, glob_remote
from dissect_clip.runfolder import RunFolder
from dissect_clip.selection.store import ScoreStore

log = logging.getLogger(__name__)

FORMAT_VERSION = 1
_EPOCH_FILE = re.compile(r"epoch_(\d+)\.pt")
_LATEST = "epoch_latest"


@dataclass(frozen=True, slots=True, kw_only=True)
class RunState:
    """Where a run stood and what it was made for; the "dissect" part of a checkpoint."""

    step: int  # optimizer steps done
    batch: int  # batches done by each rank; with accumulation several make a step
    seen: int  # samples loaded, and scored where the strategy scores, all ranks
    trained: int  # samples trained on, all ranks
    seconds: dict[str, float]  # spent by rank 0, by phase
    seed: int
    model: str
    strategy: str | None  # None without --select
    select_rate: float
    num_samples: int
    fingerprint: str  # of the data set
    world_size: int
    columns: tuple[str, ...]  # of the score store


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """A checkpoint as it was read. Without ``state`` it is not one of ours; of bare weights, only they are there."""

    path: str
    epoch: int  # complete epochs; 0 for bare weights
    state_dict: dict[str, Tensor]  # of the model, without "module."
    optimizer: dict[str, Any] | None
    scaler: dict[str, Any] | None
    state: RunState | None
    scores: Tensor | None  # [num_samples, C] float32


# ---- content


def without_prefix(state_dict: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """A model's state without the prefixes of DistributedDataParallel and torch.compile."""
    return {re.sub(r"^(module\.|_orig_mod\.)+", "", name): value for name, value in state_dict.items()}


def _plain(value: Any) -> Any:
    """Containers of tensors and plain Python values; numpy's numbers cannot be loaded with ``weights_only=True``."""
    if isinstance(value, Mapping):
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return type(value)(_plain(item) for item in value)
    return value.item() if isinstance(value, np.generic) else value


def checkpoint_content(
    *,
    name: str,
    model: Mapping[str, Tensor],
    optimizer: Mapping[str, Any],
    scaler: Mapping[str, Any] | None,
    state: RunState,
) -> dict[str, Any]:
    """What :func:`save_checkpoint` takes, from state dicts: OpenCLIP's keys and "dissect"."""
    content = {"name": name, "state_dict": without_prefix(model), "optimizer": _plain(optimizer)}
    if scaler is not None:
        content["scaler"] = _plain(scaler)
    content["dissect"] = {"format_version": FORMAT_VERSION, **_plain(dataclasses.asdict(state))}
    return content


# ---- writing


@contextmanager
def _in_place_when_complete(path: Path) -> Iterator[Path]:
    """A file to write beside ``path``, which takes its place when the block ends and all is on the disk.

    Raises:
        TrainingError: if it cannot be written; ``path`` is then what it was.
    """
    partial = path.with_name(f"{path.name}.tmp")
    try:
        yield partial
        with partial.open("rb") as file:
            os.fsync(file.fileno())
        os.replace(partial, path)
        _sync_folder(path.parent)
    except (OSError, RuntimeError, SafetensorError) as error:  # torch reports a full disk as RuntimeError
        partial.unlink(missing_ok=True)
        raise TrainingError(
            f"cannot write the checkpoint {path}: {error}. Earlier checkpoints are whole: make room and go on with "
            "--resume latest"
        ) from error


def _sync_folder(folder: Path) -> None:
    """Put a rename on the disk."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _write(path: Path, content: Mapping[str, Any], scores: ScoreStore | None, scores_path: Path) -> None:
    """Write the scores and then the checkpoint that refers to them."""
    token = secrets.token_hex(8)
    reference = {"token": token, "scores_file": None if scores is None else scores_path.name}
    if scores is not None:
        metadata = {"token": token, "columns": json.dumps(scores.columns), "epoch": str(content["epoch"])}
        with _in_place_when_complete(scores_path) as partial:
            save_file({"scores": scores.scores.contiguous()}, partial, metadata=metadata)
    with _in_place_when_complete(path) as partial:
        torch.save({**content, "dissect": {**content["dissect"], **reference}}, partial)


def _scores_of(path: Path) -> Path:
    return path.with_name(f"{path.stem}.scores.safetensors")


def _save_epoch(folder: Path, content: Mapping[str, Any], scores: ScoreStore | None, delete_previous: bool) -> Path:
    epoch = content["epoch"]
    path = folder / f"epoch_{epoch}.pt"
    _write(path, content, scores, _scores_of(path))
    if scores is None:
        _scores_of(path).unlink(missing_ok=True)  # of an earlier run through this epoch
    earlier = [number for number in _epochs(folder) if number < epoch]
    if delete_previous and earlier:
        previous = folder / f"epoch_{max(earlier)}.pt"
        previous.unlink()
        _scores_of(previous).unlink(missing_ok=True)
    return path


def _save_latest(folder: Path, content: Mapping[str, Any], scores: ScoreStore | None) -> Path:
    """Both files change here, so the scores get a name of their own; the old ones go when nothing refers to them."""
    path = folder / f"{_LATEST}.pt"
    scores_path = folder / f"{_LATEST}-{secrets.token_hex(4)}.scores.safetensors"
    _write(path, content, scores, scores_path)
    for old in folder.glob(f"{_LATEST}-*.scores.safetensors"):
        if old != scores_path:
            old.unlink()
    return path


def save_checkpoint(
    folder: Path, epoch: int, content: Mapping[str, Any], scores: ScoreStore | None, *, config: Config
) -> Path | None:
    """Save what ``config`` asks for after ``epoch`` complete epochs; on rank 0. Returns the file, if any.

    ``--save-frequency`` decides which epochs are kept, the last always is; ``--save-most-recent`` keeps epoch_latest.pt
    besides. With ``--delete-previous-checkpoint`` the one before is deleted once the new one is complete.

    Args:
        content: of :func:`checkpoint_content`.

    Raises:
        TrainingError: if a file cannot be written; earlier checkpoints are then whole.
    """
    content = {"epoch": epoch, **content}
    if scores is not None and not scores.columns:
        scores = None  # of a strategy that remembers nothing
    for leftover in folder.glob("epoch_*.tmp"):  # of a crash
        leftover.unlink()
    saved: Path | None = None
    due = config.save_frequency > 0 and epoch % config.save_frequency == 0
    if due or epoch == config.epochs:
        saved = _save_epoch(folder, content, scores, config.delete_previous_checkpoint)
    if config.save_most_recent:
        latest = _save_latest(folder, content, scores)
        saved = saved or latest
    return saved


# ---- reading


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
        raise SetupError(f"{path} does not exist: give --resume another checkpoint") from error
    except Exception as error:
        reason = str(error).partition("\n")[0]
        raise SetupError(
            f"{path} cannot be read as a checkpoint, damaged or not one ({reason}): give --resume another"
        ) from error


def _numpy_scalars() -> list[Any]:
    """What pickles of numpy's floats refer to; OpenCLIP's checkpoints hold such a learning rate. All harmless."""
    scalar, (dtype, _) = np.float64(0).__reduce__()
    names = ("numpy.core.multiarray.scalar", "numpy._core.multiarray.scalar")
    return [np.dtype, type(dtype), *((scalar, name) for name in names)]


def _read_file(path: Path, *, mapped: bool = False) -> dict[str, Any]:
    """The content of a .pt on the CPU; ``mapped`` leaves the tensors' values on the disk."""
    with torch.serialization.safe_globals(_numpy_scalars()):
        content = torch.load(path, map_location="cpu", weights_only=True, mmap=mapped)
    if not isinstance(content, dict):
        raise SetupError(f"{path} is not a checkpoint: it holds a {type(content).__name__}")
    return content


def _scores_path(path: str, content: Mapping[str, Any]) -> str | None:
    """The scores that a checkpoint at ``path`` refers to, which stand beside it; None where it has none."""
    if "dissect" not in content or content["dissect"]["scores_file"] is None:
        return None
    folder, slash, _ = path.rpartition("/")
    return f"{folder}{slash}{content['dissect']['scores_file']}"


@contextmanager
def _open_scores(path: str, token: str) -> Iterator[Any]:
    """A file of scores, open to be read, once it is sure that it belongs to the checkpoint with this token.

    Raises:
        SetupError: if it is missing, damaged, or belongs to another checkpoint.
    """
    with _explaining(path), _local(path) as local, safe_open(local, framework="pt") as file:
        if (file.metadata() or {}).get("token") != token:
            raise SetupError(f"{path} belongs to another checkpoint, saving was cut short: resume from an earlier one")
        yield file


def _state(path: str, dissect: Mapping[str, Any]) -> RunState:
    if dissect["format_version"] > FORMAT_VERSION:
        raise SetupError(f"{path} was saved by a newer version of this package: update it")
    values = {field.name: dissect[field.name] for field in dataclasses.fields(RunState)}
    return RunState(**{**values, "columns": tuple(values["columns"])})


def _weights(path: str, weights: Any) -> dict[str, Tensor]:
    """A model's state, checked to be one."""
    if not isinstance(weights, dict) or not weights or not all(isinstance(w, Tensor) for w in weights.values()):
        raise SetupError(f"{path} is not a checkpoint: it holds no model weights")
    return without_prefix(weights)


def _parse(path: str, content: dict[str, Any]) -> Checkpoint:
    """A checkpoint from what its .pt holds, still without scores."""
    if "state_dict" not in content:
        return Checkpoint(path, 0, _weights(path, content), None, None, None, None)
    return Checkpoint(
        path=path,
        epoch=content.get("epoch", 0),
        state_dict=_weights(path, content["state_dict"]),
        optimizer=content.get("optimizer"),
        scaler=content.get("scaler"),
        state=_state(path, content["dissect"]) if "dissect" in content else None,
        scores=None,
    )


def load_checkpoint(path: str | os.PathLike[str]) -> Checkpoint:
    """Read a checkpoint of ours, of OpenCLIP, or a bare state dict; a local path or any fsspec URL. Not collective.

    Raises:
        SetupError: if the file is missing, damaged, something else, or torn from its scores.
    """
    path = os.fspath(path)
    with _explaining(path), _local(path) as local:
        content = _read_file(local)
        checkpoint = _parse(path, content)
        scores_path = _scores_path(path, content)
    if scores_path is None:
        return checkpoint
    with _open_scores(scores_path, content["dissect"]["token"]) as file:
        return dataclasses.replace(checkpoint, scores=file.get_tensor("scores"))


# ---- fitting a checkpoint to a run


def _few(names: list[str]) -> str:
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")


def _model_misfits(checkpoint: Checkpoint, model_name: str, model: Mapping[str, Tensor]) -> Iterator[str]:
    saved = checkpoint.state_dict
    differing = [
        f"{name} ({list(saved[name].shape)} instead of {list(value.shape)})"
        for name, value in model.items()
        if name in saved and saved[name].shape != value.shape
    ]
    kinds = {
        "lacks": [name for name in model if name not in saved],
        "has besides": [name for name in saved if name not in model],
        "has in another shape": differing,
    }
    found = [f"{kind} {_few(names)}" for kind, names in kinds.items() if names]
    if found:
        made_by = "" if checkpoint.state is None else f" It was saved from --model {checkpoint.state.model}."
        yield f"it is not of --model {model_name}: it {'; it '.join(found)}.{made_by}"


def _data_misfits(state: RunState, num_samples: int, fingerprint: str) -> Iterator[str]:
    if state.num_samples != num_samples:
        yield f"it was trained on {state.num_samples} samples, --train-data has {num_samples}"
    elif state.fingerprint != fingerprint:
        yield f"it was trained on other data than --train-data: {state.fingerprint[:12]} is not {fingerprint[:12]}"


def _selection_misfits(checkpoint: Checkpoint, strategy: str | None, columns: tuple[str, ...]) -> Iterator[str]:
    state = checkpoint.state
    if state is None or (strategy is not None and state.strategy is None):
        if strategy is not None:
            yield f"it was trained without --select and has no scores for --select-strategy {strategy}"
    elif state.strategy != strategy:
        now = "this run has no --select" if strategy is None else f"this run has {strategy}"
        yield f"it was trained with --select-strategy {state.strategy}, {now}"
    elif state.columns != columns:
        yield f"its scores are {', '.join(state.columns)}; --select-strategy {strategy} needs {', '.join(columns)}"
    elif columns and checkpoint.scores is None:
        yield f"it has no scores for --select-strategy {strategy}"


def check_fits(
    checkpoint: Checkpoint,
    *,
    model_name: str,
    model_state_dict: Mapping[str, Tensor],
    num_samples: int | None,
    fingerprint: str | None,
    strategy: str | None,
    columns: tuple[str, ...],
) -> None:
    """See that a run can go on from a checkpoint.

    Args:
        num_samples, fingerprint: of the training data; None in a run that only evaluates, to which only the model
            matters.
        strategy: None without ``--select``.
        columns: what the strategy remembers.

    Raises:
        SetupError: naming everything that does not fit.
    """
    misfits = list(_model_misfits(checkpoint, model_name, without_prefix(model_state_dict)))
    if num_samples is not None and fingerprint is not None:
        if checkpoint.state is not None:
            misfits += _data_misfits(checkpoint.state, num_samples, fingerprint)
        misfits += _selection_misfits(checkpoint, strategy, columns)
    if misfits:
        lines = "".join(f"\n  - {misfit}" for misfit in misfits)
        raise SetupError(
            f"cannot resume from {checkpoint.path}:{lines}\nResume with the settings it was saved with, or start anew "
            f"from its weights with --pretrained {checkpoint.path}"
        )


def changed_settings(then: RunState, now: RunState) -> list[str]:
    """What differs from the run that saved the checkpoint and so makes it go on otherwise than it would have."""
    return [
        f"{name} is {getattr(now, name)}, was {getattr(then, name)}"
        for name in ("seed", "select_rate", "world_size")
        if getattr(now, name) != getattr(then, name)
    ]


# ---- finding


def _epochs(folder: Path) -> list[int]:
    """The epochs whose checkpoints are in a folder, rising."""
    matches = (_EPOCH_FILE.fullmatch(path.name) for path in folder.glob("epoch_*.pt"))
    return sorted(int(match[1]) for match in matches if match)


def _readable_epoch(path: Path) -> int | None:
    """The complete epochs in a checkpoint; None, with a warning, where it cannot be resumed from.

    Leaves the tensors on the disk.
    """
    try:
        with _explaining(str(path)):
            content = _read_file(path, mapped=True)
            checkpoint = _parse(str(path), content)
            scores_path = _scores_path(str(path), content)
        if scores_path is not None:
            with _open_scores(scores_path, content["dissect"]["token"]):
                pass
        return checkpoint.epoch
    except SetupError as error:
        log.warning("Passed over a checkpoint: %s", error)
        return None


def find_latest(folder: Path) -> Path | None:
    """The checkpoint with the most complete epochs that can be read; of two alike, the one written last.

    Temporary files are ignored, unreadable ones passed over with a warning.
    """
    candidates = [(epoch, folder / f"epoch_{epoch}.pt") for epoch in _epochs(folder)]
    latest = folder / f"{_LATEST}.pt"
    epoch = _readable_epoch(latest) if latest.exists() else None
    if epoch is not None:
        candidates.append((epoch, latest))
    candidates.sort(key=lambda entry: (entry[0], entry[1].stat().st_mtime_ns), reverse=True)
    return next((path for _, path in candidates if _readable_epoch(path) is not None), None)


def _fetch_latest(url: str, folder: Path) -> Path | None:
    """Copy the newest readable checkpoint of a remote folder to ``folder``, with its scores."""
    names = glob_remote(url, "epoch_*")
    epochs = {name: int(match[1]) for name in names if (match := _EPOCH_FILE.fullmatch(name))}
    for name in sorted(epochs, key=lambda name: epochs[name], reverse=True):
        for wanted in (_scores_of(Path(name)).name, name):
            if wanted in names:
                download(f"{url}/{wanted}", folder / wanted)
        if _readable_epoch(folder / name) is not None:
            return folder / name
    return None


def _newest(config: Config, run: RunFolder) -> str | None:
    found = find_latest(run.checkpoints)
    if found is None and config.remote_sync is not None:
        found = _fetch_latest(f"{config.remote_sync.rstrip('/')}/{run.name}/checkpoints", run.checkpoints)
    if found is None:
        log.info("--resume latest: no checkpoint in %s, starting anew", run.checkpoints)
        return None
    log.info("--resume latest: found %s", found)
    return str(found)


def find_resume(config: Config, run: RunFolder | None, world: World) -> str | None:
    """The checkpoint that ``--resume`` means; None where there is none to resume from. Collective.

    ``latest`` is the newest in the run folder, else the newest of the run in the ``--remote-sync`` folder.
    """
    if config.resume != "latest" or run is None:
        return config.resume
    return world.on_main(lambda: _newest(config, run))
