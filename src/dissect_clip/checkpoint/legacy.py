"""Checkpoints of OpenCLIP, bare weights, and formats 1 and 2, translated into the parts of today.

The only place that knows what the old formats held. Format 1 (before checkpoints inside an epoch) lacks the second
group of fields, early files of format 2 the third.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from dissect_clip.checkpoint.format import States
from dissect_clip.errors import SetupError
from dissect_clip.run.stateful import is_of

_FIELDS: dict[str, Any] = {
    "step": int,
    "batch": int,
    "seen": int,
    "trained": int,
    "seconds": dict[str, float],
    "seed": int,
    "model": str,
    "strategy": str | None,
    "select_rate": float,
    "num_samples": int,
    "fingerprint": str,
    "world_size": int,
    "columns": tuple[str, ...],
}
_SINCE_2: dict[str, tuple[Any, Any]] = {  # type and default
    "epoch_step": (int, 0),
    "steps_per_epoch": (int | None, None),
    "batch_size": (int | None, None),
    "accum_freq": (int | None, None),
    "workers": (int | None, None),
    "scored": (int, 0),
    "score_refresh": (float | None, None),
    "select_before_load": (bool | None, None),
}
_LATER: dict[str, tuple[Any, Any]] = {
    "survey": (tuple[float, ...], ()),
    "survey_of": (str | None, None),
    "depends_on": (str | None, None),
}


def parts_of_openclip(epoch: int) -> States:
    """What a checkpoint of OpenCLIP says beside weights and optimizer; bare weights are of epoch 0."""
    nothing: dict[str, Any] = {
        "epoch_step": 0,
        "step": None,
        "batch": 0,
        "seen": 0,
        "trained": 0,
        "scored": 0,
        "seconds": {},
    }
    return {"progress": {"epoch": epoch, **nothing}}


def translated(path: str, epoch: int, old: Mapping[str, Any]) -> dict[str, Any]:
    """ "dissect" of format 1 or 2 in the layout of format 3.

    Raises:
        SetupError: if a value is not of its type.
        KeyError: if one is missing.
    """
    facts = _facts(path, old)
    inside = facts["epoch_step"] > 0
    loader = old.get("loader")
    parts: States = {
        "data": {
            "epoch": epoch,
            "inside": inside,
            "num_samples": facts["num_samples"],
            "fingerprint": facts["fingerprint"],
            "shards": _shards(path, old.get("shards")),
            "position": None if loader is None else checked(path, "loader", loader, dict),
        },
        "progress": {"epoch": epoch, **_some(facts, "epoch_step step batch seen trained scored seconds")},
        "selection": {
            **_some(facts, "strategy num_samples columns depends_on survey survey_of world_size seed"),
            "epoch": epoch if inside else epoch - 1,
            "step": facts["batch"],
            "inside": inside,
            "decoy_captions": _decoys(path, old.get("decoys")),
        },
        "reference": {**_reference(path, old.get("reference")), "epochs_begun": epoch + inside},
        "run": _some(
            facts, "seed select_rate world_size batch_size accum_freq workers score_refresh select_before_load"
        ),
    }
    scores = {"part": "selection", "shape": [facts["num_samples"], len(facts["columns"])]}
    return {
        "model": facts["model"],
        "parts": parts,
        "tensors": {} if old["scores_file"] is None else {"scores": scores},
        "token": old["token"],
        "scores_file": old["scores_file"],
    }


def checked(path: str, name: str, value: Any, kind: Any) -> Any:
    """The value, if it is of its type.

    Raises:
        SetupError: if not.
    """
    if not is_of(value, kind):
        raise SetupError(f"{path} cannot be used as a checkpoint: its {name} is {value!r:.60}. Give another checkpoint")
    return value


def _some(facts: Mapping[str, Any], names: str) -> dict[str, Any]:
    return {name: facts[name] for name in names.split()}


def _facts(path: str, old: Mapping[str, Any]) -> dict[str, Any]:
    facts = {name: checked(path, name, old[name], kind) for name, kind in _FIELDS.items()}
    first = old["format_version"] == 1
    for name, (kind, default) in {**_SINCE_2, **_LATER}.items():
        absent = first or (name in _LATER and name not in old)
        facts[name] = default if absent else checked(path, name, old[name], kind)
    return {name: tuple(value) if isinstance(value, list) else value for name, value in facts.items()}


def _shards(path: str, packed: Any) -> dict[str, Any] | None:
    return None if packed is None else dict(checked(path, "list of shards", packed, dict))


def _reference(path: str, saved: Any) -> dict[str, Any]:
    if saved is None:
        return {"digest": None, "weights": None}
    checked(path, "reference", saved, dict)
    weights = saved.get("weights")
    return {
        "digest": checked(path, "reference's digest", saved.get("digest"), str | None),
        "weights": None if weights is None else checked(path, "reference", weights, dict[str, Tensor]),
    }


def _decoys(path: str, saved: Any) -> Tensor | None:
    if saved is None:
        return None
    captions: Tensor = checked(path, "decoys", saved, Tensor)
    if captions.dtype != torch.int32 or captions.dim() != 2:
        raise SetupError(f"{path} cannot be used as a checkpoint: its decoys are no captions. Give another checkpoint")
    return captions
