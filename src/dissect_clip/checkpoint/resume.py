"""The checkpoint that --resume means, and how a run continues from it."""

from __future__ import annotations

import logging
import re
from collections.abc import Mapping
from pathlib import Path

from dissect_clip.checkpoint.format import Checkpoint
from dissect_clip.checkpoint.policy import LATEST, epoch_step_of
from dissect_clip.checkpoint.read import NotDamagedError, read_checkpoint
from dissect_clip.config.settings import Config
from dissect_clip.distributed.world import World
from dissect_clip.errors import SetupError
from dissect_clip.run.folder import RunFolder
from dissect_clip.run.remote_sync import download, glob_remote
from dissect_clip.run.stateful import Stateful

log = logging.getLogger(__name__)


def _readable_epoch(path: Path) -> int | None:
    """The complete epochs in a checkpoint; None, with a warning, where it cannot be resumed from.

    Raises:
        SetupError: if it is of a newer version of this package, or its storage cannot be read: to pass over it would
            undo training.
    """
    try:
        return read_checkpoint(str(path), lambda tensor: tensor).epoch
    except NotDamagedError:
        raise
    except SetupError as error:
        log.warning("Passed over a checkpoint: %s", error)
        return None


def find_latest(folder: Path) -> Path | None:
    """The checkpoint that is furthest on and can be read; of two alike, the one written last.

    Temporary files are ignored, unreadable ones passed over with a warning. Reads no more than it must: the names tell
    the order. Changes nothing.
    """
    paths = folder.glob("epoch_*.pt")
    candidates = [(at, path) for path in paths if (at := epoch_step_of(path.stem)) is not None]
    latest = folder / f"{LATEST}.pt"
    epoch = _readable_epoch(latest) if latest.exists() else None
    if epoch is not None:
        candidates.append(((epoch, 0), latest))
    candidates.sort(key=lambda entry: (entry[0], entry[1].stat().st_mtime_ns), reverse=True)
    return next((path for _, path in candidates if _readable_epoch(path) is not None), None)


def _fetch_latest(url: str, folder: Path) -> Path | None:
    """Copy the newest readable checkpoint of a remote folder to ``folder``, with its scores."""
    names = glob_remote(url, "epoch_*")
    stems = [Path(name).stem for name in names if name.endswith(".pt")]
    found = [(at, stem) for stem in stems if (at := epoch_step_of(stem)) is not None]
    for _, stem in sorted(found, reverse=True):
        name = f"{stem}.pt"
        scores = [other for other in names if re.fullmatch(rf"{stem}(-[0-9a-f]+)?\.scores\.safetensors", other)]
        for wanted in (*scores, name):
            download(f"{url}/{wanted}", folder / wanted)
        if _readable_epoch(folder / name) is not None:
            return folder / name
    return None


def _newest(config: Config, run: RunFolder) -> str | None:
    found = find_latest(run.checkpoints)
    if found is None and config.run.remote_sync is not None:
        found = _fetch_latest(f"{config.run.remote_sync.rstrip('/')}/{run.name}/checkpoints", run.checkpoints)
    if found is None:
        if damaged := sorted(path.name for path in run.checkpoints.glob("epoch_*.pt")):
            raise SetupError(
                f"--resume latest: none of the checkpoints in {run.checkpoints} can be read ({', '.join(damaged)}; see "
                "the warnings). Bring a good one, or move these away to start anew"
            )
        log.info("--resume latest: no checkpoint in %s, starting anew", run.checkpoints)
        return None
    log.info("--resume latest: found %s", found)
    return str(found)


def find_resume(config: Config, run: RunFolder | None, world: World) -> str | None:
    """The checkpoint that ``--resume`` means; None where there is none to resume from. Collective.

    ``latest`` is the newest in the run folder, else the newest of the run in the ``--remote-sync`` folder.
    """
    if config.checkpoint.resume != "latest" or run is None:
        return config.checkpoint.resume
    return world.on_main(lambda: _newest(config, run))


def restore(checkpoint: Checkpoint, parts: Mapping[str, Stateful], evaluating: bool = False) -> None:
    """Put the parts of a run where the checkpoint left them, in their order; nothing is changed if one does not fit.

    Parts that the run does not have are ignored. What the checkpoint does not have stays as it is, if that fits.

    Raises:
        SetupError: naming everything that does not fit.
    """
    states = checkpoint.parts
    misfits = [misfit for name, part in parts.items() for misfit in part.misfits(states.get(name))]
    if misfits:
        lines = "".join(f"\n  - {misfit}" for misfit in misfits)
        saved_from = "" if checkpoint.model is None else f"\nIt was saved from --model {checkpoint.model}."
        if evaluating:
            raise SetupError(
                f"cannot evaluate {checkpoint.path}:{lines}{saved_from}\nGive the model, and flags that shape it "
                "such as --siglip, as in the training of these weights"
            )
        raise SetupError(
            f"cannot resume from {checkpoint.path}:{lines}{saved_from}\nResume with the settings it was saved with, or "
            f"start again from its weights with --pretrained {checkpoint.path}"
        )
    for name, part in parts.items():
        if name in states:
            part.load_state_dict(states[name])
