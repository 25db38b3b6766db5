"""A grid: which methods are trained on which data, at which rates, with which seeds; read from a YAML file.

docs/guides/reproduce.md lists the fields. Everything is checked before anything runs: the flags of every cell by the
parser of the command line.
"""

from __future__ import annotations

import contextlib
import dataclasses
import io
import re
import shlex
import types
import typing
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from dissect_clip.config.parser import parse_args
from dissect_clip.config.settings import Config
from dissect_clip.errors import SetupError
from dissect_clip.selection import summaries
from experiments.cells import Cell, Evaluation
from experiments.metrics import METRICS
from experiments.noise import noisy_shards
from experiments.point import Point

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
"""Flags that a grid sets by itself, and from what."""


class _Keys:
    """What may stand in a mapping of the file: the fields of a dataclass, with their types."""

    @classmethod
    def read(cls, where: str, content: Any) -> Any:
        """An instance, of a mapping.

        Raises:
            SetupError: a key is unknown or missing, or a value of another type; names the place.
        """
        hints = typing.get_type_hints(cls)
        fields = {f.name: f for f in dataclasses.fields(cls) if f.init}  # type: ignore[arg-type]
        if not isinstance(content, dict):
            raise SetupError(f"{where}: {content!r} is not a mapping; its keys are {', '.join(fields)}")
        for key in content:
            if key not in fields:
                raise SetupError(f"{where}: {key!r} is unknown; the keys are {', '.join(fields)}")
        missing = [
            name
            for name, f in fields.items()
            if name not in content and f.default is dataclasses.MISSING and f.default_factory is dataclasses.MISSING
        ]
        if missing:
            raise SetupError(f"{where}: {missing[0]!r} is missing")
        for key, value in content.items():
            if not _is_a(value, hints[key]):
                raise SetupError(f"{where}: {key}: {value!r} is not {_NAMES[str(hints[key])]}")
        return cls(**content)


_NAMES = {
    "<class 'str'>": "a text",
    "str | None": "a text",
    "list[str]": "a list of names",
    "list[str] | None": "a list of names",
    "list[int]": "a list of whole numbers",
    "list[float]": "a list of numbers",
    "dict[str, str]": "a mapping of names to texts",
    "dict[float, str]": "a mapping of numbers to texts",
    "dict[str, typing.Any]": "a mapping",
    "list[typing.Any]": "a list",
}


def _is_a(value: Any, hint: Any) -> bool:
    """Whether a value of a YAML file has a type; whole numbers are numbers, too, and truth values none."""
    origin, parts = typing.get_origin(hint), typing.get_args(hint)
    if origin is types.UnionType:
        return any(_is_a(value, part) for part in parts)
    if origin is list:
        return isinstance(value, list) and all(_is_a(item, parts[0]) for item in value)
    if origin is dict:
        pairs = value.items() if isinstance(value, dict) else ()
        return isinstance(value, dict) and all(_is_a(k, parts[0]) and _is_a(v, parts[1]) for k, v in pairs)
    if hint is Any:
        return True
    if hint is float:
        return isinstance(value, (int, float)) and not isinstance(value, bool)
    return isinstance(value, hint) and not (hint is int and isinstance(value, bool))


@dataclass(frozen=True)
class DataSet(_Keys):
    """What is trained on, and the sets that are evaluated on, the first of them during training."""

    train: str
    val: dict[str, str]
    flags: str = ""
    noise: dict[float, str] = field(default_factory=dict)  # share of wrong captions -> list of them


@dataclass(frozen=True)
class Method(_Keys):
    """A row of the tables. Without a strategy it trains on all data, at no rate."""

    strategy: str | None = None
    flags: str = ""
    published: list[str] = field(default_factory=list)  # its names in published tables, the first that is there counts
    commit: str | None = None  # the last that has its flags: later ones only show the results recorded with them


@dataclass(frozen=True)
class Table(_Keys):
    """A table of the collected results."""

    title: str
    metrics: list[str]
    published: str | None = None  # csv with the figures of a paper, relative to the grid
    published_for: str | None = None  # "train_set/benchmark" in it, where the grid's own names do not stand there
    also: list[str] = field(default_factory=list)  # published rows that have no run here


@dataclass(frozen=True)
class _File(_Keys):
    """A grid as it stands in the file."""

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


@dataclass(frozen=True)
class Grid:
    """A grid whose names and flags are all known."""

    file: Path
    title: str
    data_sets: dict[str, DataSet]
    variables: set[str]  # that the data sets are filled with
    methods: dict[str, Method]
    tables: list[Table]
    rates: list[float]
    noise: list[float]
    seeds: list[int]
    flags: list[str]
    select_flags: list[str]
    launcher: list[str]
    slurm: list[str]
    plots: list[str]

    @property
    def name(self) -> str:
        """The stem of its file, and of the files of its results."""
        return self.file.stem

    def is_recorded(self, point: Point) -> bool:
        """Whether the flags of a cell were removed, so that only an earlier commit can run it."""
        return self.methods[point.method].commit is not None

    def points(self) -> Iterator[Point]:
        """The cells, in the order in which they are run: seed by seed, so that all methods soon have one."""
        for seed in self.seeds:
            for data in self.data_sets:
                for noise in self.noise:
                    for name, method in self.methods.items():
                        for rate in self.rates if method.strategy else [None]:
                            yield Point(data, noise, name, rate, seed)

    def all_data(self) -> str | None:
        """The first method without a strategy."""
        return next((name for name, method in self.methods.items() if method.strategy is None), None)

    def random(self) -> str | None:
        """The first method whose strategy is ``random``."""
        return next((name for name, method in self.methods.items() if method.strategy == "random"), None)

    def training_flags(self, point: Point) -> list[str]:
        """The flags of a cell, without data and folders."""
        method = self.methods[point.method]
        words = [*self.flags, *shlex.split(self.data_sets[point.data].flags), *shlex.split(method.flags)]
        if method.strategy is not None:
            words += ["--select", "--select-strategy", method.strategy, "--select-rate", f"{point.rate:g}"]
            words += self.select_flags
        return [*words, "--seed", str(point.seed)]

    def config(self, point: Point) -> Config:
        """The settings of a cell.

        Raises:
            SetupError: flags that the trainer does not take.
        """
        problem = io.StringIO()
        with contextlib.redirect_stderr(problem):
            try:
                return parse_args(["--train-data", "t.tar", *self.training_flags(point)], summaries())
            except SystemExit as error:
                text = problem.getvalue().removeprefix("error: ").splitlines()[0]
                way_out = ". --rows runs other rows without this one" if "--select-strategy" in text else ""
                raise SetupError(f"{self.file}: {point}: {text}{way_out}") from error

    def check(self, points: Sequence[Point]) -> None:
        """Stop where a cell's data or flags are wrong, or two cells would share a folder.

        Raises:
            SetupError: names the cell.
        """
        names: dict[str, Point] = {}
        for name in {point.data: None for point in points}:
            used = {point.noise for point in points if point.data == name}
            lacking = sorted(v for text in _texts(self.data_sets[name], used) for v in _VARIABLE.findall(text))
            if lacking:
                raise SetupError(f"{self.file}: data set {name} needs --data {lacking[0]}=...")
        for point in points:
            other = names.setdefault(point.name, point)
            if other != point:
                raise SetupError(f"{self.file}: {point} and {other} would both be called {point.name}: rename one")
            self.config(point)

    def prepare(self, points: Sequence[Point], runs: Path) -> None:
        """Write the shards with wrong captions that cells need, where they are not there yet.

        Raises:
            SetupError: the shards, or the list of wrong captions, cannot be read.
        """
        for point in {(point.data, point.noise): point for point in points if point.noise}.values():
            data = self.data_sets[point.data]
            listed = Path(data.noise[point.noise])
            if not listed.is_file():
                raise SetupError(f"{self.file}: data_sets: {point.data}: noise: there is no file {listed}")
            runs.mkdir(parents=True, exist_ok=True)
            noisy_shards(data.train, listed, self.shards(point, runs), f"{self.file}: data_sets: {point.data}: train")

    def cell(self, point: Point, runs: Path) -> Cell:
        """The command lines of a cell."""
        data = self.data_sets[point.data]
        (_, first), *others = data.val.items()
        flags = self.training_flags(point)
        train, command = data.train, ["--train-data", data.train]
        if point.noise:
            train = str(self.shards(point, runs) / "*.tar")
            command += ["--noise-list", data.noise[point.noise]]
        own = ["--output-dir", str(runs), "--name", point.name, "--resume", "latest"]
        last = runs / point.name / "checkpoints" / f"epoch_{self.config(point).training.epochs}.pt"
        return Cell(
            name=point.name,
            label=str(point),
            command=(*command, "--val-data", first, *flags),
            words=("--train-data", train, "--val-data", first, *flags, *own),
            launcher=tuple(self.launcher),
            evaluations=tuple(self._evaluation(point, name, val, runs, last) for name, val in others),
        )

    def shards(self, point: Point, runs: Path) -> Path:
        """The folder of the shards with wrong captions."""
        return runs / f"shards-{point.data}-noise{point.noise:g}"

    def _evaluation(self, point: Point, name: str, val: str, runs: Path, checkpoint: Path) -> Evaluation:
        command = ("--val-data", val, *self.flags, *shlex.split(self.data_sets[point.data].flags))
        folder = f"{point.name}/evaluation/{name}"
        own = ("--resume", str(checkpoint), "--output-dir", str(runs), "--name", folder)
        return Evaluation(name, command, (*command, *own))


# ---- reading


def _check_keys(file: Path, text: str) -> None:
    """Stop at a key that comes twice in a mapping, of which YAML would keep the last."""
    nodes = [yaml.compose(text, Loader=yaml.SafeLoader)]
    while nodes:
        node = nodes.pop()
        if isinstance(node, yaml.MappingNode):
            keys = [key.value for key, _ in node.value]
            for place, (key, _) in enumerate(node.value):
                if key.value in keys[:place]:
                    raise SetupError(f"{file}, line {key.start_mark.line + 1}: {key.value!r} comes twice")
            nodes += [value for _, value in node.value]
        elif isinstance(node, yaml.SequenceNode):
            nodes += node.value


def _read_yaml(file: Path) -> dict[str, Any]:
    """The mapping that a file holds.

    Raises:
        SetupError: it cannot be read, is no YAML, or holds something else.
    """
    try:
        text = file.read_text(encoding="utf-8")
        _check_keys(file, text)
        content = yaml.safe_load(text)
    except OSError as error:
        raise SetupError(f"cannot read {file}: {error.strerror}") from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise SetupError(f"{file} is no YAML: {error}") from error
    if not isinstance(content, dict):
        raise SetupError(f"{file}: a grid is a mapping; this is {type(content).__name__}")
    return content


def _with_base(file: Path) -> dict[str, Any]:
    """The content of a file, over that of the file it names as ``base``."""
    content = _read_yaml(file)
    base = content.pop("base", None)
    if base is None:
        return content
    if not isinstance(base, str):
        raise SetupError(f"{file}: base: {base!r} is not a text")
    below = _read_yaml(file.parent / base)
    if "base" in below:
        raise SetupError(f"{file.parent / base}: a base has no base of its own")
    return {**below, **content}


def _chosen(file: Path, key: str, names: Sequence[str] | None, known: Mapping[str, Any]) -> list[str]:
    """The names that a list chooses, all without one.

    Raises:
        SetupError: one is unknown or comes twice.
    """
    for place, name in enumerate(names or ()):
        if name not in known:
            raise SetupError(f"{file}: {key}: {name!r} is unknown; there are {', '.join(known)}")
        if name in (names or ())[:place]:
            raise SetupError(f"{file}: {key}: {name!r} comes twice")
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
                raise SetupError(f"{file}: {key}: {value} comes twice")


def _words(file: Path, key: str, text: str) -> list[str]:
    """A text of the file as words of a command line.

    Raises:
        SetupError: a quote is not closed, or a flag is the grid's own business.
    """
    try:
        words = shlex.split(text)
    except ValueError as error:
        raise SetupError(f"{file}: {key}: {text!r}: {error}") from error
    for word in words:
        if word.partition("=")[0] in _RESERVED:
            raise SetupError(f"{file}: {key}: {word} is set by the grid, from {_RESERVED[word.partition('=')[0]]}")
    return words


_VARIABLE = re.compile(r"\$\{([A-Za-z_]\w*)\}")


def _texts(data: DataSet, levels: Collection[float] | None = None) -> list[str]:
    """Where a data set is: with the lists of these ``levels`` of noise, or with all."""
    lists = (listed for level, listed in data.noise.items() if levels is None or level in levels)
    return [data.train, *data.val.values(), *lists]


def _fill(data: DataSet, given: Mapping[str, str]) -> DataSet:
    """A data set with values for its variables; those without one stay."""

    def filled(text: str) -> str:
        return _VARIABLE.sub(lambda found: given.get(found[1], found[0]), text)

    return DataSet(
        filled(data.train),
        {key: filled(value) for key, value in data.val.items()},
        data.flags,
        {float(level): filled(listed) for level, listed in data.noise.items()},
    )


def _read_tables(file: Path, content: Sequence[Any]) -> list[Table]:
    tables: list[Table] = [Table.read(f"{file}: tables: {place + 1}", found) for place, found in enumerate(content)]
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
    """A grid, with values for the variables of its data; those that are not given stay.

    Raises:
        SetupError: anything in the file is unknown, missing or of no meaning; names file, place and what is allowed.
    """
    content: _File = _File.read(str(file), _with_base(file))
    _check_numbers(file, content)
    data_sets = {name: DataSet.read(f"{file}: data_sets: {name}", c) for name, c in content.data_sets.items()}
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
        variables={name for data in used.values() for text in _texts(data) for name in _VARIABLE.findall(text)},
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
