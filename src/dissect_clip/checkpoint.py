"""Checkpoints: what is in them, how they are written so that a crash leaves none half written, and how they are read.

    checkpoints/epoch_7.pt                    OpenCLIP's keys, and "dissect" with what selection needs
    checkpoints/epoch_7.scores.safetensors    the score store, which can be gigabytes; only with --select
    checkpoints/epoch_7_step_1200.pt          in the middle of an epoch: 7 are complete, 1200 steps done in all
    checkpoints/epoch_latest.pt               with --save-most-recent

The scores are in place before the .pt that names their file, and both hold the same random token. No file is written
over one that a complete .pt needs, so whatever moment a process dies at, every .pt has its scores. "epoch" counts
complete epochs. Everything is read with ``weights_only=True``.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import logging
import os
import pickle
import re
import secrets
import tempfile
import time
import types
import typing
import zipfile
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors import safe_open
from torch import Tensor

from dissect_clip.config import Config
from dissect_clip.dist import World
from dissect_clip.durable import put_in_place
from dissect_clip.errors import SetupError, TrainingError
from dissect_clip.remote import download, glob_remote
from dissect_clip.runfolder import RunFolder
from dissect_clip.selection.store import ScoreStore

log = logging.getLogger(__name__)

FORMAT_VERSION = 2
_FILE = re.compile(r"epoch_(\d+)(?:_step_(\d+))?\.pt")
_SPARE_SCORES = re.compile(r"(epoch_\d+_step_\d+|epoch_(?:\d+|latest)(?=-))(?:-[0-9a-f]+)?\.scores\.safetensors")
_LATEST = "epoch_latest"

_Place = tuple[int, int]
"""Complete epochs, and in the middle of an epoch the optimizer steps done in all, else 0: rises as training goes on."""


@dataclass(frozen=True, slots=True, kw_only=True)
class RunState:
    """Where a run stood and what it was made for; the "dissect" part of a checkpoint.

    None stands for what files of format 1 did not say.
    """

    step: int  # optimizer steps done
    batch: int  # batches done by each rank; with accumulation several make a step
    seen: int  # samples read, all ranks
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
    epoch_step: int = 0  # optimizer steps done in the current epoch; 0 at the end of one
    steps_per_epoch: int | None = None
    batch_size: int | None = None
    accum_freq: int | None = None
    workers: int | None = None
    scored: int = 0  # samples that had a scoring pass, all ranks
    score_refresh: float | None = None
    select_before_load: bool | None = None
    survey: tuple[float, ...] = ()  # what the strategy knew of the whole store when the epoch began


@dataclass(frozen=True, slots=True, eq=False)
class Shards:
    """The shards of a data set in order, S of them."""

    names: tuple[str, ...]  # [S]
    sizes: NDArray[np.int64] | None  # [S] samples; None where they are not known


@dataclass(frozen=True, slots=True)
class SavedReference:
    """The reference model of a run: its weights where it is the run's own, which is None in the warm-up."""

    digest: str | None  # of weights that were read from a file
    weights: dict[str, Tensor] | None


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """A checkpoint as it was read. Without ``state`` it is not one of ours; of bare weights, only they are there."""

    path: str
    epoch: int  # complete epochs; 0 for bare weights
    state_dict: dict[str, Tensor]  # of the model, without "module."
    optimizer: dict[str, Any] | None = None
    scaler: dict[str, Any] | None = None
    state: RunState | None = None
    loader: dict[str, Any] | None = None  # where the loaders stood; only in the middle of an epoch
    shards: Shards | None = None
    scores: Tensor | None = None  # [num_samples, C] float32
    reference: SavedReference | None = None  # only with strategies that have a reference model
    decoys: Tensor | None = None  # [P, L] int32, the captions of decoys, -1 in rows without; only with those


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
    loader: Mapping[str, Any] | None = None,
    shards: Shards | None = None,
    reference: SavedReference | None = None,
    decoys: Tensor | None = None,
) -> dict[str, Any]:
    """What :meth:`CheckpointWriter.save` takes, from state dicts: OpenCLIP's keys and "dissect".

    Args:
        loader: in the middle of an epoch, the loader's state: tensors and plain values.
        decoys: [P, L] int32, the captions of the decoys.
    """
    content = {"name": name, "state_dict": without_prefix(model), "optimizer": _plain(optimizer)}
    if scaler is not None:
        content["scaler"] = _plain(scaler)
    content["dissect"] = {
        "format_version": FORMAT_VERSION,
        **_plain(dataclasses.asdict(state)),
        "loader": _plain(loader),
        "shards": None if shards is None else _pack_shards(shards),
        "reference": None if reference is None else {"digest": reference.digest, "weights": reference.weights},
        "decoys": decoys,
    }
    return content


def _pack_shards(shards: Shards) -> dict[str, Any]:
    """Names as one string, since a checkpoint of 40,000 strings takes seconds to be read."""
    sizes = None if shards.sizes is None else torch.from_numpy(shards.sizes)
    return {"names": json.dumps(shards.names), "sizes": sizes}


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
        put_in_place(partial, path)
    except (OSError, RuntimeError) as error:
        with contextlib.suppress(OSError):
            partial.unlink(missing_ok=True)
        # torch raises a RuntimeError of its own after the one that says that the disk is full
        reason = error.__context__ if isinstance(error.__context__, OSError) else error
        raise TrainingError(
            f"cannot write the checkpoint {path}: {reason}. See that its folder is there, can be written to and has "
            "room. Earlier checkpoints are whole: --resume latest goes on from the newest"
        ) from error


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
    try:
        with _in_place_when_complete(path) as partial, partial.open("wb") as file:
            torch.save({**content, "dissect": {**content["dissect"], **reference}}, file)
    except TrainingError:
        if scores is not None:
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


def _delete_replaced(folder: Path, newest: _Place, delete_previous: bool) -> None:
    """Delete the step checkpoints that the newest replaces, and the last epoch's before it where that is asked for.

    A step checkpoint replaces all others of its epoch: those with more steps are of smaller batches, or of an attempt
    that was given up.
    """
    others = [(place, path) for place, path in _checkpoints(folder) if place != newest]
    for (epoch, step), path in others:
        if step > 0 and (epoch < newest[0] or (epoch == newest[0] and newest[1] > 0)):
            _delete_checkpoint(path)
    epochs = [(place, path) for place, path in others if place[1] == 0 and place < newest]
    if delete_previous and epochs:
        _delete_checkpoint(max(epochs)[1])


def _wanted(config: Config, epoch: int, step: int | None) -> list[str]:
    """Names, without their ending, of the checkpoints that ``config`` asks for at this moment."""
    if step is not None:
        return [f"epoch_{epoch}_step_{step}"]
    due = config.save_frequency > 0 and epoch % config.save_frequency == 0
    names = [f"epoch_{epoch}"] if due or epoch == config.epochs else []
    return [*names, _LATEST] if config.save_most_recent else names


def save_checkpoint(
    folder: Path,
    epoch: int,
    content: Mapping[str, Any],
    scores: Mapping[str, Any] | None,
    *,
    config: Config,
    step: int | None = None,
) -> Path | None:
    """Save what ``config`` asks for after ``epoch`` complete epochs, here and now; on rank 0. Returns the file, if any.

    ``--save-frequency`` decides which epochs are kept, the last always is; ``--save-most-recent`` keeps epoch_latest.pt
    besides. With ``--delete-previous-checkpoint`` the one before is deleted once the new one is complete. Step
    checkpoints are always deleted once a newer checkpoint is complete.

    Args:
        content: of :func:`checkpoint_content`, in main memory.
        scores: state dict of a store with columns, in main memory.
        step: in the middle of an epoch, the optimizer steps done in all.

    Raises:
        TrainingError: if a file cannot be written; earlier checkpoints are then whole.
    """
    _delete_leftovers(folder)
    content = {"epoch": epoch, **content}
    paths = [folder / f"{name}.pt" for name in _wanted(config, epoch, step)]
    for path in paths:
        _write(path, content, scores)
    if not paths:
        return None
    kept = paths[0].stem == f"epoch_{epoch}"
    _delete_replaced(folder, (epoch, step or 0), config.delete_previous_checkpoint and kept)
    return paths[0]


# ---- writing while training goes on


def _map_tensors(value: Any, function: Callable[[tuple[Any, ...], Tensor], Tensor], path: tuple[Any, ...] = ()) -> Any:
    """Nested dicts, lists and tuples with every tensor replaced by ``function(path to it, tensor)``."""
    if isinstance(value, dict):
        return {key: _map_tensors(item, function, (*path, key)) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return type(value)(_map_tensors(item, function, (*path, place)) for place, item in enumerate(value))
    return function(path, value) if isinstance(value, Tensor) else value


class HostCopies:
    """Copies of tensors in main memory, which are kept and filled again; pinned ones of what is on a GPU."""

    def __init__(self) -> None:
        self._kept: dict[tuple[Any, ...], Tensor] = {}  # by the path to it
        self._pinned = False

    def take(self, value: Any) -> Any:
        """The same nested containers with copies of all tensors, valid until the next call. At most one device sync."""
        copied = _map_tensors(value, self._copy)
        if self._pinned:
            torch.cuda.current_stream().synchronize()
        return copied

    def _copy(self, path: tuple[Any, ...], tensor: Tensor) -> Tensor:
        kept = self._kept.get(path)
        if kept is None or kept.shape != tensor.shape or kept.dtype != tensor.dtype:
            kept = torch.empty_like(tensor, device="cpu", pin_memory=tensor.is_cuda)
            self._kept[path] = kept
        self._pinned |= tensor.is_cuda
        return kept.copy_(tensor, non_blocking=True)


_PATIENCE = 1.0
"""Seconds that a save may wait for the one before without a word."""


class CheckpointWriter:
    """Saves checkpoints while training goes on; on rank 0, from one thread. See :func:`save_checkpoint` for the files.

    A save copies all tensors to main memory and returns; another thread writes them. Where that fails,
    ``--on-save-error`` decides: an error in the log and a new attempt at the next save, or a TrainingError.
    """

    def __init__(self, folder: Path, config: Config) -> None:
        self.folder = folder
        self.config = config
        self._failed = False
        self._last: Path | None = None
        self._copies = HostCopies()
        self._thread = ThreadPoolExecutor(1, "checkpoint")
        self._pending: Future[None] | None = None

    @property
    def failed(self) -> bool:
        """Whether the last save that came to an end could not be written; with --on-save-error continue."""
        return self._failed

    def save(self, *, epoch: int, content: Mapping[str, Any], scores: ScoreStore | None, step: int | None) -> None:
        """Take a copy of all tensors, to be written as a checkpoint after ``epoch`` complete epochs. A device sync.

        Does nothing where the settings ask for none. Waits for the save before.

        Args:
            content: of :func:`checkpoint_content`.
            step: in the middle of an epoch, the optimizer steps done in all.

        Raises:
            TrainingError: if the save before has failed, with ``--on-save-error stop``.
        """
        began = time.monotonic()
        self.wait()
        waited = time.monotonic() - began
        if waited > _PATIENCE:
            log.warning("Training waited %.0f s for the checkpoint before to be written: save less often", waited)
        if _wanted(self.config, epoch, step):
            state = None if scores is None or not scores.columns else scores.state_dict()
            content, state = self._copies.take((dict(content), state))
            self._pending = self._thread.submit(self._write, epoch, step, content, state)

    def wait(self) -> None:
        """Wait until what was saved is on the disk.

        Raises:
            TrainingError: if it could not be written, with ``--on-save-error stop``; once.
        """
        pending, self._pending = self._pending, None
        if pending is not None:
            pending.result()

    def close(self) -> None:
        """:meth:`wait`, and end the thread."""
        try:
            self.wait()
        finally:
            self._thread.shutdown()

    def _write(
        self, epoch: int, step: int | None, content: Mapping[str, Any], scores: Mapping[str, Any] | None
    ) -> None:
        try:
            self._last = save_checkpoint(self.folder, epoch, content, scores, config=self.config, step=step)
        except TrainingError as error:
            if self.config.on_save_error == "stop":
                raise
            self._failed = True
            newest = self._last or "the one that this run began from, if any"
            log.error(
                "CHECKPOINT NOT SAVED: %s. Training goes on (--on-save-error continue) and tries again at the next "
                "save. The newest checkpoint is %s", error, newest,
            )  # fmt: skip
        else:
            self._failed = False
            log.info("Saved %s", self._last)


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
        if isinstance(error, pickle.UnpicklingError):  # whose message says how to run what it holds
            reason = "it holds something other than tensors and plain values"
        raise SetupError(
            f"{path} cannot be read as a checkpoint, damaged or not one ({reason}): give --resume another"
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
            raise SetupError(f"{path} is damaged (its checksums are wrong): give --resume another")
    return content


def _scores_path(path: str, content: Mapping[str, Any]) -> str | None:
    """The scores that a checkpoint at ``path`` refers to, which stand beside it; None where it has none."""
    name = content["dissect"]["scores_file"] if "dissect" in content else None
    if name is None:
        return None
    if re.fullmatch(r"[\w.-]+\.scores\.safetensors", name) is None:
        raise SetupError(f"{path} names its scores {name!r}, which is no file beside it: give --resume another")
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


_LATER = {"survey"}
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
        raise SetupError(f"{path} cannot be used as a checkpoint: its {name} is {value!r:.60}. Give --resume another")
    return value


def _state(path: str, dissect: Mapping[str, Any]) -> RunState:
    if _checked(path, "format_version", dissect["format_version"], int) > FORMAT_VERSION:
        raise SetupError(f"{path} was saved by a newer version of this package: update it")
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
            f"{path} cannot be used as a checkpoint: its list of shards is not whole. Give --resume another"
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
        raise SetupError(f"{path} cannot be used as a checkpoint: its decoys are no captions. Give --resume another")
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


def _read(path: str, keep: Callable[[Tensor], Tensor]) -> Checkpoint:
    """Read and check a checkpoint and its scores; ``keep`` is given every tensor, whose values are still on the disk.

    Raises:
        SetupError: if the file is missing, damaged, something else, or torn from its scores.
    """
    with _explaining(path), _local(path) as local:
        content = _map_tensors(_read_file(local), lambda _, tensor: keep(tensor))
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
    return _read(os.fspath(path), torch.clone)


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


def _sizes(shards: Shards) -> dict[str, int | None]:
    """Samples by name of the shard; None where they are not known."""
    sizes: list[int | None] = [None] * len(shards.names) if shards.sizes is None else shards.sizes.tolist()
    return dict(zip(shards.names, sizes, strict=True))


def _shard_differences(then: Shards, now: Shards) -> Iterator[str]:
    before, after = _sizes(then), _sizes(now)
    resized = [
        f"{name} ({size} samples instead of {before[name]})"
        for name, size in after.items()
        if name in before and None not in (size, before[name]) and size != before[name]
    ]
    kinds = {
        "missing": [name for name in before if name not in after],
        "new": [name for name in after if name not in before],
        "of another size": resized,
    }
    yield from (f"{kind}: {_few(names)}" for kind, names in kinds.items() if names)
    if not any(kinds.values()) and then.names != now.names:
        yield "the shards are the same in another order, which gives samples other ids"


def _list_misfit(then: str, now: str) -> str:
    """Of the digests of lists that are not the same; empty without one."""
    if not now:
        return "it was trained on a list of samples, this run has no --train-keep"
    if not then:
        return "it was trained on all samples of its data, this run has --train-keep"
    return f"it was trained on another list of samples than --train-keep: {then[:12]} is not {now[:12]}"


def _data_misfits(checkpoint: Checkpoint, num_samples: int, fingerprint: str, shards: Shards | None) -> Iterator[str]:
    state = checkpoint.state
    if state is None:
        return
    then, _, then_list = state.fingerprint.partition("+")
    now, _, now_list = fingerprint.partition("+")
    if then_list != now_list:
        yield _list_misfit(then_list, now_list)
    if (state.num_samples, then) == (num_samples, now):
        return
    if state.num_samples != num_samples:
        misfit = f"it was trained on {state.num_samples} samples, --train-data has {num_samples}"
    else:
        misfit = f"it was trained on other data than --train-data: {then[:12]} is not {now[:12]}"
    if shards is not None and checkpoint.shards is not None:
        misfit = "; ".join([misfit, *_shard_differences(checkpoint.shards, shards)])
    yield misfit


def _selection_misfits(checkpoint: Checkpoint, strategy: str | None, columns: tuple[str, ...]) -> Iterator[str]:
    state = checkpoint.state
    if state is None or (strategy is not None and state.strategy is None):
        if strategy is not None:
            yield f"it was trained without --select and has no scores for --select-strategy {strategy}"
    elif state.strategy != strategy:
        now = "this run has no --select" if strategy is None else f"this run has {strategy}"
        yield f"it was trained with --select-strategy {state.strategy}, {now}"
    elif state.columns != columns:
        wanted = f"--select-strategy {strategy} with this --score-refresh needs {', '.join(columns)}"
        yield f"its scores are {', '.join(state.columns)}; {wanted}"
    elif columns and checkpoint.scores is None:
        yield f"it has no scores for --select-strategy {strategy}"


def goes_on_with_reference(checkpoint: Checkpoint, after: int | None) -> bool:
    """Whether the run's own reference model, which it has after so many epochs, is in use at this place."""
    step = 0 if checkpoint.state is None else checkpoint.state.epoch_step
    return after is not None and (checkpoint.epoch, step) > (after, 0)


def _reference_misfits(checkpoint: Checkpoint, model: Mapping[str, Tensor], after: int | None) -> Iterator[str]:
    if not goes_on_with_reference(checkpoint, after):
        return
    if checkpoint.reference is None or checkpoint.reference.weights is None:
        yield (
            f"it has no reference model, which the run has after --warmup-point {after} epochs without "
            "--select-reference"
        )
        return
    saved = {name: value.shape for name, value in checkpoint.reference.weights.items()}
    if saved != {name: value.shape for name, value in model.items()}:
        yield "its reference model is of another --model"


def _loader_misfits(checkpoint: Checkpoint) -> Iterator[str]:
    state = checkpoint.state
    if state is not None and state.epoch_step > 0 and checkpoint.loader is None:
        yield f"it was saved after {state.epoch_step} steps of an epoch, and does not say where the loaders stood"


def check_fits(
    checkpoint: Checkpoint,
    *,
    model_name: str,
    model_state_dict: Mapping[str, Tensor],
    num_samples: int | None,
    fingerprint: str | None,
    strategy: str | None,
    columns: tuple[str, ...],
    shards: Shards | None = None,
    reference_after: int | None = None,
) -> None:
    """See that a run can go on from a checkpoint.

    Args:
        num_samples, fingerprint: of the training data; None in a run that only evaluates, to which only the model
            matters.
        strategy: None without ``--select``.
        columns: what the strategy remembers.
        shards: of the training data, so that the message can say which differ.
        reference_after: complete epochs after which the run's own model is its reference; None where it never is.

    Raises:
        SetupError: naming everything that does not fit.
    """
    misfits = list(_model_misfits(checkpoint, model_name, without_prefix(model_state_dict)))
    if num_samples is not None and fingerprint is not None:
        misfits += _data_misfits(checkpoint, num_samples, fingerprint, shards)
        misfits += _selection_misfits(checkpoint, strategy, columns)
        misfits += _loader_misfits(checkpoint)
        misfits += _reference_misfits(checkpoint, without_prefix(model_state_dict), reference_after)
    if misfits:
        lines = "".join(f"\n  - {misfit}" for misfit in misfits)
        raise SetupError(
            f"cannot resume from {checkpoint.path}:{lines}\nResume with the settings it was saved with, or start anew "
            f"from its weights with --pretrained {checkpoint.path}"
        )


def changed_settings(then: RunState, now: RunState) -> list[str]:
    """What differs from the run that saved the checkpoint and so makes it go on otherwise than it would have."""
    names = (
        "seed",
        "select_rate",
        "world_size",
        "batch_size",
        "accum_freq",
        "workers",
        "score_refresh",
        "select_before_load",
    )
    return [
        f"{name} is {getattr(now, name)}, was {getattr(then, name)}"
        for name in names
        if getattr(now, name) != getattr(then, name) and getattr(then, name) is not None
    ]


# ---- finding


def _place(name: str) -> _Place | None:
    """The place of a checkpoint, by the name of its .pt; None of other files."""
    match = _FILE.fullmatch(name)
    return None if match is None else (int(match[1]), int(match[2] or 0))


def _checkpoints(folder: Path) -> list[tuple[_Place, Path]]:
    """The checkpoints in a folder with their places; without epoch_latest."""
    places = ((_place(path.name), path) for path in folder.glob("epoch_*.pt"))
    return [(place, path) for place, path in places if place is not None]


def _readable_epoch(path: Path) -> int | None:
    """The complete epochs in a checkpoint; None, with a warning, where it cannot be resumed from."""
    try:
        return _read(str(path), lambda tensor: tensor).epoch
    except SetupError as error:
        log.warning("Passed over a checkpoint: %s", error)
        return None


def find_latest(folder: Path) -> Path | None:
    """The checkpoint that is furthest on and can be read; of two alike, the one written last.

    Temporary files are ignored, unreadable ones passed over with a warning. Reads no more than it must: the names tell
    the order. Changes nothing.
    """
    candidates = _checkpoints(folder)
    latest = folder / f"{_LATEST}.pt"
    epoch = _readable_epoch(latest) if latest.exists() else None
    if epoch is not None:
        candidates.append(((epoch, 0), latest))
    candidates.sort(key=lambda entry: (entry[0], entry[1].stat().st_mtime_ns), reverse=True)
    return next((path for _, path in candidates if _readable_epoch(path) is not None), None)


def _fetch_latest(url: str, folder: Path) -> Path | None:
    """Copy the newest readable checkpoint of a remote folder to ``folder``, with its scores."""
    names = glob_remote(url, "epoch_*")
    places = {name: place for name in names if (place := _place(name)) is not None}
    for name in sorted(places, key=lambda name: places[name], reverse=True):
        stem = Path(name).stem
        scores = [other for other in names if re.fullmatch(rf"{stem}(-[0-9a-f]+)?\.scores\.safetensors", other)]
        for wanted in (*scores, name):
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
