"""A grid: which methods are trained on which data, at which rates, with which seeds."""

from __future__ import annotations

import contextlib
import io
import re
import shlex
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from dissect_clip.config.parser import parse_args
from dissect_clip.config.settings import Config
from dissect_clip.errors import SetupError
from dissect_clip.selection import STRATEGIES
from experiments.cells import Cell, CellKey, Evaluation
from experiments.noise import noisy_shards
from experiments.schema import Section


@dataclass(frozen=True)
class Dataset(Section):
    """What is trained on, and the sets that are evaluated on, the first of them during training."""

    train: str
    val: dict[str, str]
    flags: str = ""
    noise: dict[float, str] = field(default_factory=dict)  # share of wrong captions -> list of them


@dataclass(frozen=True)
class Method(Section):
    """A row of the tables. Without a strategy it trains on all data, at no rate."""

    strategy: str | None = None
    flags: str = ""
    published: list[str] = field(default_factory=list)  # its names in published tables, the first that is there counts
    commit: str | None = None  # the last that has its flags: later ones only show the results recorded with them


@dataclass(frozen=True)
class TableSpec(Section):
    """A table of the collected results."""

    title: str
    metrics: list[str]
    published: str | None = None  # csv with the figures of a paper, relative to the grid
    published_for: str | None = None  # "train_set/benchmark" in it, where the grid's own names do not stand there
    also: list[str] = field(default_factory=list)  # published rows that have no run here


VARIABLE = re.compile(r"\$\{([A-Za-z_]\w*)\}")


def locations(data: Dataset, levels: Collection[float] | None = None) -> list[str]:
    """Where a data set is: with the lists of these ``levels`` of noise, or with all."""
    lists = (listed for level, listed in data.noise.items() if levels is None or level in levels)
    return [data.train, *data.val.values(), *lists]


@dataclass(frozen=True)
class Grid:
    """A grid whose names and flags are all known."""

    file: Path
    title: str
    data_sets: dict[str, Dataset]
    variables: set[str]  # that the data sets are filled with
    methods: dict[str, Method]
    tables: list[TableSpec]
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

    def is_retired(self, key: CellKey) -> bool:
        """Whether the flags of a cell were removed, so that only an earlier commit can run it."""
        return self.methods[key.method].commit is not None

    def cell_keys(self) -> Iterator[CellKey]:
        """The cells, in the order in which they are run: seed by seed, so that all methods soon have one."""
        for seed in self.seeds:
            for data in self.data_sets:
                for noise in self.noise:
                    for name, method in self.methods.items():
                        for rate in self.rates if method.strategy else [None]:
                            yield CellKey(data, noise, name, rate, seed)

    def all_data(self) -> str | None:
        """The first method without a strategy."""
        return next((name for name, method in self.methods.items() if method.strategy is None), None)

    def random(self) -> str | None:
        """The first method whose strategy is ``random``."""
        return next((name for name, method in self.methods.items() if method.strategy == "random"), None)

    def training_flags(self, key: CellKey) -> list[str]:
        """The flags of a cell, without data and folders."""
        method = self.methods[key.method]
        words = [*self.flags, *shlex.split(self.data_sets[key.data].flags), *shlex.split(method.flags)]
        if method.strategy is not None:
            words += ["--select", "--select-strategy", method.strategy, "--select-rate", f"{key.rate:g}"]
            words += self.select_flags
        return [*words, "--seed", str(key.seed)]

    def config(self, key: CellKey) -> Config:
        """The settings of a cell.

        Raises:
            SetupError: flags that the trainer does not take.
        """
        problem = io.StringIO()
        with contextlib.redirect_stderr(problem):
            try:
                return parse_args(["--train-data", "t.tar", *self.training_flags(key)], STRATEGIES)
            except SystemExit as error:
                text = problem.getvalue().removeprefix("error: ").splitlines()[0]
                way_out = ". --rows runs other rows without this one" if "--select-strategy" in text else ""
                raise SetupError(f"{self.file}: {key}: {text}{way_out}") from error

    def check(self, keys: Sequence[CellKey]) -> None:
        """Stop where a cell's data or flags are wrong, or two cells would share a folder.

        Raises:
            SetupError: names the cell.
        """
        names: dict[str, CellKey] = {}
        for name in {key.data: None for key in keys}:
            used = {key.noise for key in keys if key.data == name}
            lacking = sorted(v for text in locations(self.data_sets[name], used) for v in VARIABLE.findall(text))
            if lacking:
                raise SetupError(f"{self.file}: data set {name} needs --data {lacking[0]}=...")
        for key in keys:
            other = names.setdefault(key.name, key)
            if other != key:
                raise SetupError(f"{self.file}: {key} and {other} would both be called {key.name}: rename one")
            self.config(key)

    def prepare(self, keys: Sequence[CellKey], runs: Path) -> None:
        """Write the shards with wrong captions that cells need, where they are not there yet.

        Raises:
            SetupError: the shards, or the list of wrong captions, cannot be read.
        """
        for key in {(key.data, key.noise): key for key in keys if key.noise}.values():
            data = self.data_sets[key.data]
            listed = Path(data.noise[key.noise])
            if not listed.is_file():
                raise SetupError(f"{self.file}: data_sets: {key.data}: noise: there is no file {listed}")
            runs.mkdir(parents=True, exist_ok=True)
            noisy_shards(data.train, listed, self.shards(key, runs), f"{self.file}: data_sets: {key.data}: train")

    def cell(self, key: CellKey, runs: Path) -> Cell:
        """The command lines of a cell."""
        data = self.data_sets[key.data]
        (_, first), *others = data.val.items()
        flags = self.training_flags(key)
        train, command = data.train, ["--train-data", data.train]
        if key.noise:
            train = str(self.shards(key, runs) / "*.tar")
            command += ["--noise-list", data.noise[key.noise]]
        own = ["--output-dir", str(runs), "--name", key.name, "--resume", "latest"]
        last = runs / key.name / "checkpoints" / f"epoch_{self.config(key).training.epochs}.pt"
        return Cell(
            name=key.name,
            label=str(key),
            command=(*command, "--val-data", first, *flags),
            words=("--train-data", train, "--val-data", first, *flags, *own),
            launcher=tuple(self.launcher),
            evaluations=tuple(self._evaluation(key, name, val, runs, last) for name, val in others),
        )

    def shards(self, key: CellKey, runs: Path) -> Path:
        """The folder of the shards with wrong captions."""
        return runs / f"shards-{key.data}-noise{key.noise:g}"

    def _evaluation(self, key: CellKey, name: str, val: str, runs: Path, checkpoint: Path) -> Evaluation:
        command = ("--val-data", val, *self.flags, *shlex.split(self.data_sets[key.data].flags))
        folder = f"{key.name}/evaluation/{name}"
        own = ("--resume", str(checkpoint), "--output-dir", str(runs), "--name", folder)
        return Evaluation(name, command, (*command, *own))
