"""The options of a strategy: a dataclass beside it, from which its flags, ranges and help follow."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TypeVar

from dissect_clip.config.run_plan import RunPlan

O = TypeVar("O", bound="StrategyOptions")  # noqa: E741


@dataclass(frozen=True, kw_only=True)
class StrategyOptions:
    """Base of the options of all strategies, and the options of a strategy that has none.

    A subclass is a frozen keyword-only dataclass whose fields are made by
    :func:`dissect_clip.config.fields.setting`; a field ``my_margin`` becomes the flag ``--my-margin``. Several
    strategies may share a field by inheritance, also with another default. Its module imports no torch, so that
    ``--help`` stays fast.
    """

    @property
    def warmup_epochs(self) -> int:
        """Epochs of uniform sampling before the strategy selects."""
        return 0

    def completed(self: O, run: RunPlan) -> O:
        """The same options, with the defaults that depend on the run filled in."""
        return self

    def contradictions(self, run: RunPlan) -> Iterator[str]:
        """Combinations of values that have no meaning: a sentence each, which names the flags and a way out."""
        yield from ()

    def given(self, name: str) -> bool:
        """Whether an option differs from its default."""
        return bool(getattr(self, name) != type(self).__dataclass_fields__[name].default)


def option_fields(options: type[StrategyOptions]) -> dict[str, dataclasses.Field[object]]:
    """The fields of an options class by name."""
    return {field.name: field for field in dataclasses.fields(options)}
