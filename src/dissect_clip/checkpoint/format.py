"""What a checkpoint says of a run."""

from __future__ import annotations

import dataclasses
import json
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

FORMAT_VERSION = 2


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
    survey_of: str | None = None  # flags that say what these numbers mean
    depends_on: str | None = None  # flags without which the scores mean something else


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
    decoys: Tensor | None = None  # [P + W, L] int32, see Decoys.captions; only with those


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
        decoys: [P + W, L] int32, the captions of the decoys, and of the last decoy of each rank.
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


def map_tensors(value: Any, function: Callable[[tuple[Any, ...], Tensor], Tensor], path: tuple[Any, ...] = ()) -> Any:
    """Nested dicts, lists and tuples with every tensor replaced by ``function(path to it, tensor)``."""
    if isinstance(value, dict):
        return {key: map_tensors(item, function, (*path, key)) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return type(value)(map_tensors(item, function, (*path, place)) for place, item in enumerate(value))
    return function(path, value) if isinstance(value, Tensor) else value
