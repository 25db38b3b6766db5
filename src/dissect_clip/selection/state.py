"""Selection as a part of a checkpoint: its own state, and whether a run with or without ``--select`` fits it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Protocol

import torch
from torch import Tensor

from dissect_clip.run.stateful import Stateful, malformed
from dissect_clip.selection.selection import Selection

_KINDS: dict[str, Any] = {
    "num_samples": int,
    "columns": tuple[str, ...],
    "depends_on": str | None,
    "survey": tuple[float, ...],
    "survey_of": str | None,
    "epoch": int,
    "step": int,
    "world_size": int,
    "decoy_captions": Tensor | None,
    "seed": int,
    "inside": bool,
}


class Counts(Protocol):
    """How far training is."""

    epoch_step: int  # optimizer steps in the current epoch
    batch: int  # batches of this rank


class SelectionState(Stateful):
    """The state of a selection, or of a run without ``--select``.

    Args:
        counts: have to be restored before.
    """

    big_tensors = ("scores",)

    def __init__(self, selection: Selection | None, seed: int, counts: Counts) -> None:
        self.selection = selection
        self.seed = seed
        self.counts = counts

    def state_dict(self) -> dict[str, Any]:
        """That of :class:`Selection`, with the run's seed and whether it was taken inside an epoch. Collective."""
        if self.selection is None:
            return {"strategy": None}
        return {**self.selection.state_dict(), "seed": self.seed, "inside": self.counts.epoch_step > 0}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue from a selection's state; with batches of another size, counted from where training is."""
        if self.selection is not None:
            self.selection.load_state_dict(self._used(state))
            self.selection.continue_at(self.counts.batch)

    def _used(self, state: Mapping[str, Any]) -> dict[str, Any]:
        """What the run can use of a state.

        Between two epochs a new survey is taken before the next, and another seed has other decoys.
        """
        return {
            **state,
            "scores": state.get("scores"),
            "survey": state["survey"] if state["inside"] else (),
            "decoy_captions": state["decoy_captions"] if state["seed"] == self.seed else None,
        }

    def misfits(self, state: Mapping[str, Any] | None) -> list[str]:
        """Strategy and columns have to be the same, and the scores there; see :meth:`Selection.misfits`."""
        name = None if self.selection is None else self.selection.name
        if state is not None and (wrong := malformed("selection", state, {"strategy": str | None})):
            return wrong
        then = None if state is None else state["strategy"]
        if then is None or state is None:
            return [] if name is None else [f"it was trained without --select, and has no scores for {_flag(name)}"]
        if wrong := malformed("selection", state, _KINDS):
            return wrong
        if self.selection is None:
            return [f"it was trained with {_flag(then)}, this run has no --select"]
        captions = state["decoy_captions"]
        if captions is not None and (captions.dtype, captions.dim()) != (torch.int32, 2):
            return ["its decoys are no captions, so it is damaged"]
        used = self._used(state)
        if not isinstance(used["scores"], Tensor | None):
            return ["its scores are no tensor, so it is damaged"]
        misfits = self.selection.misfits(used)
        if misfits and used["survey"]:
            misfits.append("it was saved inside an epoch: the strategy's flags have to be as they were, or resume from "
                           "the end of an epoch")  # fmt: skip
        return misfits


def _flag(strategy: str) -> str:
    return f"--select-strategy {strategy}"
