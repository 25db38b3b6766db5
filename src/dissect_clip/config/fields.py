"""What a setting is: its default, its line of help, and the values it may take."""

from __future__ import annotations

import dataclasses
import math
import types
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True, slots=True)
class Range:
    """The finite numbers a setting may take; an open end is None."""

    above: float | None = None
    at_least: float | None = None
    at_most: float | None = None
    below: float | None = None

    def __contains__(self, value: float) -> bool:
        return (
            abs(value) < math.inf
            and (self.above is None or value > self.above)
            and (self.at_least is None or value >= self.at_least)
            and (self.at_most is None or value <= self.at_most)
            and (self.below is None or value < self.below)
        )

    def __str__(self) -> str:
        ends = [("above", self.above), ("at least", self.at_least), ("at most", self.at_most), ("below", self.below)]
        return " and ".join(f"{name} {end:g}" for name, end in ends if end is not None) or "finite"


POSITIVE = Range(above=0)
NOT_NEGATIVE = Range(at_least=0)
COUNT = Range(at_least=1)
FRACTION = Range(above=0, at_most=1)
FINITE = Range()


def setting(
    default: Any,
    help: str,  # noqa: A002 - argparse's own name for it
    *,
    choices: Sequence[str] | None = None,
    within: Range | None = None,
    aliases: tuple[str, ...] = (),
    metavar: str | None = None,
    ignored_by_others: bool = False,
    common: bool = False,
) -> Any:
    """One setting: its default, its line in ``--help``, and the values that are allowed.

    ``ignored_by_others``: an option of a strategy that is accepted, and has no effect, with other strategies.
    ``common``: a flag that ``--help`` shows, too, and not only ``--help-all``.
    """
    facts = {
        "help": help,
        "choices": choices,
        "within": within,
        "aliases": aliases,
        "metavar": metavar,
        "ignored_by_others": ignored_by_others,
        "common": common,
    }
    factory = {"default_factory": dict} if default == {} else {"default": default}
    return dataclasses.field(metadata=facts, **factory)


def section(title: str, default: Any, help: str, **facts: Any) -> Any:  # noqa: A002
    """A setting that opens a section of ``--help``."""
    field = setting(default, help, **facts)
    field.metadata = types.MappingProxyType({**field.metadata, "section": title})
    return field
