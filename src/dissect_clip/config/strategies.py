"""What the command line knows of strategies: their names, their options, and what they need of a run.

A registry holds one :class:`StrategyEntry` for each strategy of this project and finds those of others: installed
packages announce them in the entry-point group ``dissect_clip.strategies``, and any class can be named as
``package.module:Class``. Nothing here imports a strategy before it is asked for by name.
"""

from __future__ import annotations

import dataclasses
import difflib
import importlib
import importlib.metadata
import math
import operator
import typing
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from dissect_clip.config.fields import POSITIVE
from dissect_clip.config.options import StrategyOptions

ENTRY_POINTS = "dissect_clip.strategies"
"""The entry-point group in which installed packages announce strategies."""

Flag = tuple[dataclasses.Field[Any], Any]
"""The declaration of an option and its type."""


@dataclass(frozen=True, slots=True)
class StrategyEntry:
    """What is known of a strategy before its module is imported."""

    target: str  # "module:Class"
    summary: str  # its line in --help
    options: str | None = None  # "module:Class" of its options; None for a strategy without any
    scores: bool = True  # whether it needs a scoring pass
    combines: bool = True  # whether its rank may be one term of a combination
    reuses: bool = False  # whether it ranks by scores of earlier steps, whatever --score-refresh is


def import_target(target: str) -> Any:
    """The object that ``module:name`` names; the name may have dots.

    Raises:
        ValueError: if it cannot be imported.
    """
    module, _, name = target.partition(":")
    try:
        found = importlib.import_module(module)
    except Exception as error:  # whatever the module raises while it is imported
        raise ValueError(f"{module} cannot be imported: {type(error).__name__}: {error}") from error
    try:
        return operator.attrgetter(name)(found)
    except AttributeError:
        raise ValueError(f"{module} has no {name}") from None


def is_target(name: str) -> bool:
    """Whether a name is of the form ``package.module:Class``."""
    module, colon, attribute = name.partition(":")
    return bool(colon) and attribute.isidentifier() and all(part.isidentifier() for part in module.split("."))


def split_combination(text: str) -> dict[str, float]:
    """The names in a value of ``--select-strategy`` with their weights above 0; the weight of a single one is 1.

    Raises:
        ValueError: if the text is neither ``NAME`` nor ``NAME:WEIGHT+NAME:WEIGHT...``.
    """
    if "+" not in text and (":" not in text or (is_target(text) and not _is_number(text.rpartition(":")[2]))):
        return {text: 1.0}
    members: dict[str, float] = {}
    for part in text.split("+"):
        name, colon, number = part.rpartition(":")
        if not name or not colon:
            raise ValueError(f"{part!r} is not of the form NAME:WEIGHT, as in small_loss:0.7+clipscore:0.3")
        weight = float(number) if _is_number(number) else math.nan
        if weight not in POSITIVE:
            raise ValueError(f"the weight of {name} is {number!r}: it must be a number {POSITIVE}")
        if name in members:
            raise ValueError(f"{name} is there twice: give it one weight")
        members[name] = weight
    if len(members) == 1:
        raise ValueError(f"a weight needs several strategies: give {name} alone, or another one with +")
    return members


def _is_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True


class StrategyRegistry:
    """The strategies by name. Iterates over the names of this project's own.

    Args:
        entries: this project's strategies.
        aliases: other names of them.
        describe: makes the entry of someone else's strategy from its class and target.
    """

    def __init__(
        self,
        entries: Mapping[str, StrategyEntry],
        aliases: Mapping[str, str],
        describe: Callable[[Any, str], StrategyEntry],
    ) -> None:
        self.entries = dict(entries)
        self.aliases = dict(aliases)
        self.describe = describe

    def __iter__(self) -> Iterator[str]:
        return iter(self.entries)

    def __len__(self) -> int:
        return len(self.entries)

    def __contains__(self, name: object) -> bool:
        return name in self.entries

    def installed(self) -> dict[str, str]:
        """Strategies of other installed packages: the target of each name. Imports none of them.

        Raises:
            ValueError: if one has the name of a strategy of this project.
        """
        found = {point.name: point.value for point in importlib.metadata.entry_points(group=ENTRY_POINTS)}
        for name in found:
            if name in self.entries or name in self.aliases:
                raise ValueError(
                    f"the installed strategy {name!r} ({found[name]}) has the name of a strategy of dissect-clip: "
                    "rename its entry point, or uninstall its package"
                )
        return found

    def canonical(self, name: str) -> str:
        """The name that checkpoints hold: that of the strategy which an alias stands for."""
        return self.aliases.get(name, name)

    def __getitem__(self, name: str) -> StrategyEntry:
        """The entry of a name, an alias, an installed strategy or a ``package.module:Class``, which is imported.

        Raises:
            ValueError: if there is none; the message lists the known names and says how to plug a strategy in.
        """
        name = self.canonical(name)
        if name in self.entries:
            return self.entries[name]
        installed = self.installed()
        target = installed.get(name, name if is_target(name) else None)
        if target is not None:
            return self.describe(import_target(target), target)
        known = [*self.entries, *self.aliases, *installed]
        close = difflib.get_close_matches(name, known, n=1)
        raise ValueError(
            f"{name!r} is unknown{f' (did you mean {close[0]}?)' if close else ''}: give one of {', '.join(known)}. "
            f"A strategy of your own is given as package.module:Class, or by an entry point in the group {ENTRY_POINTS}"
        )

    def members(self, text: str) -> dict[str, float]:
        """The strategies that ``--select-strategy`` names, by their canonical names, with their weights.

        Raises:
            ValueError: if the text is of no such form, or names a strategy twice or one that does not exist.
        """
        members: dict[str, float] = {}
        for name, weight in split_combination(text).items():
            self[name]
            if self.canonical(name) in members:
                raise ValueError(f"{self.canonical(name)} is there twice: give it one weight")
            members[self.canonical(name)] = weight
        return members

    def canonical_text(self, text: str) -> str:
        """A value of ``--select-strategy`` with canonical names.

        Raises:
            ValueError: see :meth:`members`.
        """
        self.members(text)
        if "+" not in text:
            return self.canonical(text)
        parts = (part.rpartition(":") for part in text.split("+"))
        return "+".join(f"{self.canonical(name)}:{weight}" for name, _, weight in parts)

    def class_of(self, name: str) -> Any:
        """The class of a strategy. Imports its module, and torch."""
        return import_target(self[name].target)

    def options_of(self, name: str) -> type[StrategyOptions]:
        """The class of a strategy's options."""
        target = self[name].options
        options: type[StrategyOptions] = StrategyOptions if target is None else import_target(target)
        return options

    def options(self, name: str, values: Mapping[str, Any]) -> StrategyOptions:
        """The options of a strategy by ``values`` of all options; those that are missing have their defaults."""
        options = self.options_of(name)
        return options(**{name: values[name] for name in options.__dataclass_fields__ if name in values})

    def known(self, text: str = "") -> list[str]:
        """All strategies whose options are flags: this project's, the installed ones, and those that ``text`` names."""
        names = [*self.entries, *self.installed()]
        if text:
            names += [name for name in self.members(text) if name not in names]
        return names

    def flags(self, names: Iterable[str]) -> dict[str, dict[str, Flag]]:
        """The options of these strategies: of each field's name its declaration by strategy.

        Raises:
            ValueError: if two strategies declare an option of the same name with different types or ranges.
        """
        found: dict[str, dict[str, Flag]] = {}
        for name in names:
            options = self.options_of(name)
            hints = typing.get_type_hints(options)
            for field in dataclasses.fields(options):
                owners = found.setdefault(field.name, {})
                for owner, (other, hint) in owners.items():
                    same = all(field.metadata[fact] == other.metadata[fact] for fact in ("within", "choices"))
                    if hint != hints[field.name] or not same:
                        raise ValueError(
                            f"the strategies {owner} and {name} both have an option {field.name}, of different kinds: "
                            "rename one of them"
                        )
                owners[name] = (field, hints[field.name])
        return found

    def warmup_epochs(self, text: str, values: Mapping[str, Any]) -> int:
        """Epochs of uniform sampling before the strategies that ``text`` names select, by ``values`` of all options."""
        return max(self.options(name, values).warmup_epochs for name in self.members(text))
