"""The training data as a part of a checkpoint: which samples the ids stand for, and where the loaders stood."""

from __future__ import annotations

import json
import logging
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from dissect_clip.data.train_data import TrainData
from dissect_clip.run.stateful import Stateful, is_of, listed, malformed

log = logging.getLogger(__name__)

_KINDS: dict[str, Any] = {
    "epoch": int,
    "num_samples": int,
    "fingerprint": str,
    "shards": dict | None,
    "inside": bool,
    "position": dict | None,
}

Sizes = dict[str, int | None]
"""Samples by name of the shard, in the order of the ids; None if not known."""


class DataState(Stateful):
    """The identity of the data, and inside an epoch the position of the loaders of all ranks."""

    def __init__(self, data: TrainData) -> None:
        self.data = data

    def state_dict(self) -> dict[str, Any]:
        """Collective inside an epoch, see :meth:`TrainData.state_dict`.

        ``shards``: names as JSON in one string, since 40,000 strings take seconds to be read, and sizes [S] int64.
        """
        data, inside = self.data, self.data.inside_epoch
        sizes = None if data.shard_sizes is None else torch.from_numpy(data.shard_sizes)
        return {
            "epoch": data.epoch,
            "num_samples": data.num_samples,
            "fingerprint": data.fingerprint,
            "shards": {"names": json.dumps(data.shard_names), "sizes": sizes},
            "inside": inside,
            "position": data.state_dict() if inside else None,
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Inside an epoch set the loaders back to their position, else nothing."""
        if state["position"] is not None:
            note = self.data.resume(state["position"], state["epoch"])
            if note is not None:
                log.warning("%s", note)

    def misfits(self, state: Mapping[str, Any] | None) -> list[str]:
        """The ids have to stand for the same samples; names the shards that differ."""
        if state is None:  # weights, or a checkpoint of OpenCLIP
            return []
        if wrong := malformed("data", state, _KINDS):
            return wrong
        try:
            saved = _unpack(state["shards"])
        except (KeyError, ValueError):
            return ["its list of shards is damaged"]
        misfits = [*self._identity_misfits(state, saved)]
        if state["inside"] and state["position"] is None:
            misfits.append("it was saved inside an epoch, and does not say where the loaders stood")
        return misfits

    def _identity_misfits(self, state: Mapping[str, Any], saved: Sizes | None) -> Iterator[str]:
        data = self.data
        then, _, then_list = state["fingerprint"].partition("+")
        now, _, now_list = data.fingerprint.partition("+")
        if then_list != now_list:
            yield _list_misfit(then_list, now_list)
        if (state["num_samples"], then) == (data.num_samples, now):
            return
        if state["num_samples"] != data.num_samples:
            misfit = f"it was trained on {state['num_samples']} samples, --train-data has {data.num_samples}"
        else:
            misfit = f"it was trained on other data than --train-data: {then[:12]} is not {now[:12]}"
        if saved is not None:
            sizes = None if data.shard_sizes is None else torch.from_numpy(data.shard_sizes)
            misfit = "; ".join([misfit, *_shard_differences(saved, _by_name(data.shard_names, sizes))])
        yield misfit


def _by_name(names: tuple[str, ...] | list[str], sizes: Tensor | None) -> Sizes:
    return dict(zip(names, [None] * len(names) if sizes is None else sizes.tolist(), strict=True))


def _unpack(packed: Mapping[str, Any] | None) -> Sizes | None:
    """Raises KeyError or ValueError if these are no shards."""
    if packed is None:
        return None
    text, sizes = packed["names"], packed["sizes"]
    names: Any = json.loads(text) if isinstance(text, str) else None
    if not is_of(names, tuple[str, ...]):
        raise ValueError("no names")
    whole = isinstance(sizes, Tensor) and (sizes.dtype, sizes.shape) == (torch.int64, (len(names),))
    if sizes is not None and not whole:
        raise ValueError("no sizes")
    return _by_name(names, sizes)


def _shard_differences(then: Sizes, now: Sizes) -> Iterator[str]:
    resized = [
        f"{name} ({size} samples instead of {then[name]})"
        for name, size in now.items()
        if name in then and None not in (size, then[name]) and size != then[name]
    ]
    kinds = {
        "missing": [name for name in then if name not in now],
        "new": [name for name in now if name not in then],
        "of another size": resized,
    }
    yield from (f"{kind}: {listed(names)}" for kind, names in kinds.items() if names)
    if not any(kinds.values()) and list(then) != list(now):
        yield "the shards are the same in another order, which gives samples other ids"


def _list_misfit(then: str, now: str) -> str:
    """About digests of lists that are not the same; empty without one."""
    if not now:
        return "it was trained on a list of samples, this run has no --train-keep"
    if not then:
        return "it was trained on all samples of its data, this run has --train-keep"
    return f"it was trained on another list of samples than --train-keep: {then[:12]} is not {now[:12]}"
