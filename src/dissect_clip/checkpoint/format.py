"""What is in a checkpoint: a dictionary of the states of a run's parts.

    epoch, name, state_dict, optimizer, scaler    OpenCLIP's keys, so that whatever reads its checkpoints reads ours
    dissect: format_version                       3
             model                                --model, for messages
             parts                                the states of all other parts, by name
             tensors                              the big tensors by name: their part and shape
             token, scores_file                   the file beside the .pt that holds the big tensors

Nothing here depends on which parts there are, except that those with a key of OpenCLIP's stand under that key.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from torch import Tensor

from dissect_clip.run.stateful import Stateful, is_of

FORMAT_VERSION = 3

OPENCLIP_PARTS = ("state_dict", "optimizer", "scaler")
"""Parts whose names are keys of OpenCLIP's checkpoints."""

States = dict[str, dict[str, Any]]
"""The states of parts, by name."""


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """A checkpoint as it was read, whatever its format. Of bare weights there is only ``state_dict``."""

    path: str
    epoch: int  # complete epochs; 0 for bare weights
    parts: States
    model: str | None = None  # that it was saved from, if the file says so


@dataclass(frozen=True, slots=True)
class Content:
    """A checkpoint as it is to be written; without its token."""

    pt: dict[str, Any]
    tensors: dict[str, Tensor]  # that go into the other file
    names: dict[str, tuple[str, ...]]  # the names that describe these tensors, by their key


def pack(states: Mapping[str, Mapping[str, Any]], parts: Mapping[str, Stateful], *, name: str, model: str) -> Content:
    """A checkpoint from the states of its parts.

    Args:
        parts: of the same names; say which tensors are big.
        name: of the run.
        model: of ``--model``.
    """
    inside: States = {}
    tensors: dict[str, Tensor] = {}
    shapes: dict[str, Any] = {}
    names: dict[str, tuple[str, ...]] = {}
    for part, state in states.items():
        # An empty tensor needs no file.
        big = {key for key in parts[part].big_tensors if key in state and state[key].numel() > 0}
        assert big.isdisjoint(tensors), f"two parts have big tensors of one name, {big}"
        tensors |= {key: state[key] for key in big}
        shapes |= {key: {"part": part, "shape": list(state[key].shape)} for key in big}
        if big:
            names |= {key: value for key, value in state.items() if is_of(value, tuple[str, ...]) and len(value) > 0}
        inside[part] = plain({key: value for key, value in state.items() if key not in big})
    pt = {"name": name, **{part: state for part, state in inside.items() if part in OPENCLIP_PARTS}}
    pt["dissect"] = {
        "format_version": FORMAT_VERSION,
        "model": model,
        "parts": {part: state for part, state in inside.items() if part not in OPENCLIP_PARTS},
        "tensors": shapes,
    }
    return Content(pt, tensors, names)


def plain(value: Any) -> Any:
    """Containers of tensors and plain Python values; numpy's numbers cannot be loaded with ``weights_only=True``."""
    if isinstance(value, Mapping):
        return {key: plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return type(value)(plain(item) for item in value)
    return value.item() if isinstance(value, np.generic) else value


def map_tensors(value: Any, function: Callable[[tuple[Any, ...], Tensor], Tensor], path: tuple[Any, ...] = ()) -> Any:
    """Nested dicts, lists and tuples with every tensor replaced by ``function(path to it, tensor)``."""
    if isinstance(value, dict):
        return {key: map_tensors(item, function, (*path, key)) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return type(value)(map_tensors(item, function, (*path, place)) for place, item in enumerate(value))
    return function(path, value) if isinstance(value, Tensor) else value
