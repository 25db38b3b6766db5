"""What everything that survives a restart can do: give its state, take it back, and say whether a saved one fits."""

from __future__ import annotations

import types
import typing
from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping
from typing import Any, ClassVar


class Stateful(ABC):
    """A part of a run that a checkpoint holds. A state is a dict of tensors and plain Python values."""

    big_tensors: ClassVar[tuple[str, ...]] = ()
    """Keys of float32 tensors of the state that go into a file of their own, since they can be gigabytes.

    A state may lack them. Entries of the state that are tuples of names are repeated in that file.
    """

    @abstractmethod
    def state_dict(self) -> dict[str, Any]:
        """The state now; equal on all ranks, or else that of rank 0 counts. May be collective."""

    @abstractmethod
    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue from a state that fits. Called on all ranks."""

    @abstractmethod
    def misfits(self, state: Mapping[str, Any] | None) -> list[str]:
        """Sentences that name what keeps this run from continuing from a state, with the flag; empty if it fits.

        None if the checkpoint holds nothing of this part. The state comes from a file and may hold anything. Changes
        nothing; not collective.
        """


def is_of(value: Any, kind: Any) -> bool:
    """Whether a value is of a type, with the types inside it; lists pass for tuples and integers for floats."""
    origin, inner = typing.get_origin(kind), typing.get_args(kind)
    if origin is types.UnionType:
        return any(is_of(value, option) for option in inner)
    if origin is dict:
        return isinstance(value, dict) and all(is_of(k, inner[0]) and is_of(v, inner[1]) for k, v in value.items())
    if origin is tuple:
        return isinstance(value, (tuple, list)) and all(is_of(item, inner[0]) for item in value)
    if kind is Any:
        return True
    if kind is dict:  # torch's state dicts are ordered ones
        return isinstance(value, dict)
    if kind is float:
        return type(value) in (int, float)
    return type(value) is (types.NoneType if kind is None else kind)


def malformed(what: str, state: Mapping[str, Any], kinds: Mapping[str, Any]) -> list[str]:
    """A sentence for each entry of a state that is missing or not of its type in ``kinds``.

    Args:
        what: the name of the part, for the sentence.
    """
    sentences = []
    for name, kind in kinds.items():
        if name not in state:
            sentences.append(f"its {what} lacks {name}, so it is damaged")
        elif not is_of(state[name], kind):
            sentences.append(f"its {what} has {state[name]!r:.60} for {name}, so it is damaged")
    return sentences


def listed(names: Iterable[str]) -> str:
    """The first three names, and how many more there are."""
    names = list(names)
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")
