"""Grids are read from YAML files; docs/guides/reproduce.md lists the fields.

Everything is checked before anything runs: the flags of every cell by the parser of the command line.
"""

from __future__ import annotations

import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from dissect_clip.errors import SetupError
from experiments.grid import VARIABLE, Dataset, Grid, Method, TableSpec, locations
from experiments.metrics import METRICS
from experiments.schema import Section, read_yaml

PLOTS = {
    "rates": "against the share of the batch that is trained on",
    "noise": "against the share of wrong captions",
    "curves": "during training, against pairs and seconds",
}
"""The plots that a grid may have, and what they show R@Sum against."""

_RESERVED = {
    "--train-data": "data_sets", "--val-data": "data_sets", "--seed": "seeds", "--select": "strategy of a method",
    "--select-strategy": "strategy of a method", "--select-rate": "rates", "--name": "the cell",
    "--output-dir": "--runs", "--logs": "--runs", "--resume": "the state of the cell",
}  # fmt: skip
"""Flags that a grid sets itself, and their sources."""


@dataclass(frozen=True)
class _File(Section):
    """The keys of a grid file."""

    title: str
    data_sets: dict[str, Any]
    methods: dict[str, Any]
    tables: list[Any]
    seeds: list[int]
    rates: list[float]
    noise: list[float] = field(default_factory=lambda: [0.0])
    flags: str = ""
    select_flags: str = ""
    launcher: str = ""
    slurm: str = ""
    train_on: list[str] | None = None
    rows: list[str] | None = None
    plots: list[str] | None = None


def _with_base(file: Path) -> dict[str, Any]:
    """The content of a file; its keys override those of its ``base`` file."""
    content = read_yaml(file)
    base = content.pop("base", None)
    if base is None:
        return content
    if not isinstance(base, str):
        raise SetupError(f"{file}: base: {base!r} is not a text")
    below = read_yaml(file.parent / base)
    if "base" in below:
        raise SetupError(f"{file.parent / base}: a base cannot have a base")
    return {**below, **content}


def _chosen(file: Path, key: str, names: Sequence[str] | None, known: Mapping[str, Any]) -> list[str]:
    """The names in a list; all known names if there is no list.

    Raises:
        SetupError: one is unknown or appears twice.
    """
    for place, name in enumerate(names or ()):
        if name not in known:
            raise SetupError(f"{file}: {key}: {name!r} is unknown; there are {', '.join(known)}")
        if name in (names or ())[:place]:
            raise SetupError(f"{file}: {key}: {name!r} appears twice")
    return list(known if names is None else names)


def _check_numbers(file: Path, content: _File) -> None:
    lists: list[tuple[str, Sequence[float], float, float, str]] = [
        ("rates", content.rates, 1e-9, 1, "above 0 and at most 1"),
        ("noise", content.noise, 0, 1, "at least 0 and at most 1"),
        ("seeds", content.seeds, 0, 2**32, "at least 0"),
    ]
    for key, values, low, high, words in lists:
        if not values:
            raise SetupError(f"{file}: {key}: the list is empty")
        for value in values:
            if not low <= value <= high:
                raise SetupError(f"{file}: {key}: {value} must be {words}")
            if values.count(value) > 1:
                raise SetupError(f"{file}: {key}: {value} appears twice")


def _words(file: Path, key: str, text: str) -> list[str]:
    """A text of the file as words of a command line.

    Raises:
        SetupError: a quote is not closed, or the grid sets a flag itself.
    """
    try:
        words = shlex.split(text)
    except ValueError as error:
        raise SetupError(f"{file}: {key}: {text!r}: {error}") from error
    for word in words:
        if word.partition("=")[0] in _RESERVED:
            raise SetupError(f"{file}: {key}: {word} is set by the grid, from {_RESERVED[word.partition('=')[0]]}")
    return words


def _fill(data: Dataset, given: Mapping[str, str]) -> Dataset:
    """A data set with values for its variables; those without one stay."""

    def filled(text: str) -> str:
        return VARIABLE.sub(lambda found: given.get(found[1], found[0]), text)

    return Dataset(
        filled(data.train),
        {key: filled(value) for key, value in data.val.items()},
        data.flags,
        {float(level): filled(listed) for level, listed in data.noise.items()},
    )


def _read_tables(file: Path, content: Sequence[Any]) -> list[TableSpec]:
    tables: list[TableSpec] = [
        TableSpec.read(f"{file}: tables: {place + 1}", found) for place, found in enumerate(content)
    ]
    for table in tables:
        where = f"{file}: table {table.title!r}"
        _chosen(Path(where), "metrics", table.metrics, METRICS)
        if not table.metrics:
            raise SetupError(f"{where}: metrics: the list is empty")
        if table.published is None and (table.also or table.published_for):
            raise SetupError(f"{where}: also and published_for need published")
    if len({table.title for table in tables}) < len(tables):
        raise SetupError(f"{file}: two tables have the same title")
    return tables


def read_grid(file: Path, given: Mapping[str, str]) -> Grid:
    """Read a grid, and fill the given variables of its data; others stay.

    Raises:
        SetupError: a key or value is unknown, missing or invalid; names the file, the key and what is allowed.
    """
    content: _File = _File.read(str(file), _with_base(file))
    _check_numbers(file, content)
    data_sets = {name: Dataset.read(f"{file}: data_sets: {name}", c) for name, c in content.data_sets.items()}
    methods = {name: Method.read(f"{file}: methods: {name}", c) for name, c in content.methods.items()}
    used = {name: data_sets[name] for name in _chosen(file, "train_on", content.train_on, data_sets)}
    for name, data in used.items():
        _words(file, f"data_sets: {name}: flags", data.flags)
        if not data.val:
            raise SetupError(f"{file}: data_sets: {name}: val is empty")
        for level in content.noise:
            if level and level not in data.noise:
                raise SetupError(f"{file}: noise: {level} has no list in data_sets: {name}: noise")
    for name, method in methods.items():
        _words(file, f"methods: {name}: flags", method.flags)
    return Grid(
        file=file,
        title=content.title,
        data_sets={name: _fill(data, given) for name, data in used.items()},
        variables={name for data in used.values() for text in locations(data) for name in VARIABLE.findall(text)},
        methods={name: methods[name] for name in _chosen(file, "rows", content.rows, methods)},
        tables=_read_tables(file, content.tables),
        rates=content.rates,
        noise=content.noise,
        seeds=content.seeds,
        flags=_words(file, "flags", content.flags),
        select_flags=_words(file, "select_flags", content.select_flags),
        launcher=shlex.split(content.launcher),
        slurm=shlex.split(content.slurm),
        plots=_chosen(file, "plots", content.plots, PLOTS),
    )
