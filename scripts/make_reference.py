#!/usr/bin/env python3
"""Writes the reference pages that follow from the settings: docs/reference/flags.md and docs/reference/strategies.md.

    python scripts/make_reference.py

A test checks that the committed pages are what this writes.
"""

from __future__ import annotations

import dataclasses
import re
import sys
import typing
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "src"))

from dissect_clip.config.flags import REMOVED, UNSUPPORTED  # noqa: E402
from dissect_clip.config.settings import GROUP_OF, GROUPS, declared  # noqa: E402
from dissect_clip.selection.registry import STRATEGIES  # noqa: E402

FOLDER = ROOT / "docs" / "reference"


def flag_of(name: str) -> str:
    """The flag of a setting, as Markdown."""
    return f"`--{name.replace('_', '-')}`"


def cell(text: str) -> str:
    """Text in a cell of a Markdown table; flags in it are code."""
    return re.sub(r"(?<![\w`-])--[a-z][\w-]*\w", r"`\g<0>`", text.replace("|", "\\|").replace("*", "\\*"))


def table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A Markdown table."""
    lines = [header, ["---"] * len(header), *rows]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def shown(value: Any) -> str:
    """A default as one would type it."""
    if value is None or value is False or value == "" or value is dataclasses.MISSING:
        return ""
    if value is True:
        return "on"
    return f"`{value!r}`" if value == "\t" else f"`{value:g}`" if isinstance(value, float) else f"`{value}`"


def values_of(field: dataclasses.Field[Any], hint: Any) -> str:
    """What a flag takes: its choices, or its type and range."""
    facts = field.metadata
    if facts["choices"]:
        return ", ".join(f"`{choice}`" for choice in facts["choices"])
    kinds = [kind for kind in typing.get_args(hint) or (hint,) if kind not in (type(None), Ellipsis)]
    kind = kinds[0] if typing.get_origin(hint) is not dict else dict
    several = typing.get_origin(kind) is tuple
    kind = typing.get_args(kind)[0] if several else kind
    name = {bool: "", int: "whole number", float: "number", str: "text", dict: "`KEY=VALUE` ..."}.get(kind, "text")
    name += "s" if several and kind is not str else ""
    return f"{name}, {facts['within']}" if facts["within"] is not None else name


def meaning(field: dataclasses.Field[Any], hint: Any, default: str) -> str:
    """The help of a flag, with its values and its default."""
    facts = [part for part in (values_of(field, hint), default and f"default {default}") if part not in ("", "text")]
    return cell(field.metadata["help"]) + (f" ({'; '.join(facts)})" if facts else "")


def flags_page() -> str:
    """All flags of training, by the sections of ``--help-all``."""
    parts = [
        "# Flags\n\nEvery flag of training, as `dissect-clip --help-all` lists them; flags without a value are off by "
        "default. Names and defaults are\nthose of OpenCLIP 3.3.0. The options of strategies are in "
        "[Strategies](strategies.md).\n"
    ]
    for group, settings in GROUPS.items():
        rows = []
        for name, (field, hint) in declared().items():
            if GROUP_OF[name] != group:
                continue
            flags = ", ".join([flag_of(name), *(f"`{alias}`" for alias in field.metadata["aliases"])])
            rows.append([flags, meaning(field, hint, shown(field.default))])
        title = settings.title[0].upper() + settings.title[1:]
        parts.append(f"\n## {title}\n\n" + table(["flag", "meaning"], rows))
    refused = [[f"`{flag}`", cell(entry.reason), cell(entry.instead)] for flag, entry in UNSUPPORTED.items()]
    removed = [[f"`{flag}`", cell(entry.reason), cell(entry.instead)] for flag, entry in REMOVED.items()]
    parts.append("\n## Flags of OpenCLIP that are refused\n\n" + table(["flag", "reason", "instead"], refused))
    parts.append("\n## Removed flags\n\n" + table(["flag", "reason", "instead"], removed))
    return "".join(parts)


def strategies_page() -> str:
    """The strategies, and the options of each."""
    aliases = {own: alias for alias, own in STRATEGIES.aliases.items()}
    rows = []
    for name in STRATEGIES:
        entry, alias = STRATEGIES[name], aliases.get(name)
        names = f"`{name}`" + (f", `{alias}`" if alias else "")
        scored = "optional" if entry.reuses else "yes" if entry.scores else "no"
        rows.append([names, cell(entry.summary), scored, "yes" if entry.combines else "no"])
    options = []
    for name, owners in STRATEGIES.flags(STRATEGIES).items():
        first, hint = next(iter(owners.values()))
        defaults: dict[str, list[str]] = {}
        for owner, (field, _) in owners.items():
            defaults.setdefault(shown(field.default), []).append(owner)
        default = ", ".join(
            text if len(defaults) == 1 else f"{text or 'none'} ({', '.join(own)})" for text, own in defaults.items()
        )
        options.append([flag_of(name), ", ".join(f"`{owner}`" for owner in owners), meaning(first, hint, default)])
    return (
        "# Strategies\n\n`--select-strategy` takes one of these names, several as `A:0.7+B:0.3` where they combine, or "
        "`package.module:Class`\n([Write a strategy](../guides/write-a-strategy.md)). How they work is in "
        "[Selection](../how-it-works/selection.md).\n\n"
        + table(["strategy", "selects", "scoring pass", "combines"], rows)
        + "\n## Options\n\nA flag of a strategy that is not selected is refused.\n\n"
        + table(["flag", "strategies", "meaning"], options)
    )


PAGES = {"flags.md": flags_page, "strategies.md": strategies_page}


def main() -> None:
    for name, page in PAGES.items():
        (FOLDER / name).write_text(page(), encoding="utf-8")


if __name__ == "__main__":
    main()
