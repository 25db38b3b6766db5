"""Published figures of a paper, read from tables."""

from __future__ import annotations

import csv
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from dissect_clip.errors import SetupError
from experiments.metrics import METRICS
from experiments.results import OF_FOUR


@dataclass(frozen=True)
class Published:
    """Figures of a paper, by train set, benchmark, method and share selected in percent."""

    rows: dict[tuple[str, str, str, float], dict[str, float]] = field(default_factory=dict)

    @property
    def methods(self) -> set[str]:
        """The names of all methods."""
        return {method for _, _, method, _ in self.rows}

    def find(self, name: str, train_set: str, benchmark: str, methods: Sequence[str], percent: float) -> float | None:
        """A metric of the first of ``methods`` that is there; None where there is none."""
        for method in methods:
            for place in (benchmark, ""):  # some figures hold for no benchmark in particular
                figures = self.rows.get((train_set, place, method, percent))
                if figures is not None:
                    return _figure(name, figures)
        return None


def _figure(name: str, figures: Mapping[str, float]) -> float | None:
    if name == "rsum4" and name not in figures and all(part in figures for part in OF_FOUR):
        return sum(figures[part] for part in OF_FOUR)
    return figures.get(name)


_KEYS = ("train_set", "benchmark", "method", "select_percent")


def read_published(file: Path) -> Published:
    """A csv with the columns train_set, benchmark, method and select_percent, and one for each metric.

    Raises:
        SetupError: it cannot be read, or a column is missing or no metric.
    """
    try:
        with file.open(encoding="utf-8", newline="") as lines:
            table = csv.DictReader(lines)
            rows = list(table)
    except OSError as error:
        raise SetupError(f"cannot read {file}: {error.strerror}") from error
    columns = list(table.fieldnames or ())
    if missing := [key for key in _KEYS if key not in columns]:
        raise SetupError(f"{file} has no column {missing[0]}")
    names = [name for name in columns if name not in _KEYS]
    if unknown := [name for name in names if name not in METRICS]:
        raise SetupError(f"{file}: column {unknown[0]!r} is not a metric; there are {', '.join(METRICS)}")
    return Published(
        {
            (row["train_set"], row["benchmark"], row["method"], float(row["select_percent"])): {
                name: float(row[name]) for name in names if row[name]
            }
            for row in rows
        }
    )


def published_value(
    published: Published,
    name: str,
    train_set: str,
    benchmark: str,
    methods: Sequence[str],
    percent: float,
    full: Sequence[str],
) -> float | None:
    """The published figure of a metric; of a share, that of ``methods`` over that of ``full`` at 100 %."""
    parts = METRICS[name].share_of
    if parts is None:
        return published.find(name, train_set, benchmark, methods, percent)
    ours = published.find(parts[0], train_set, benchmark, methods, percent)
    whole = published.find(parts[1], train_set, benchmark, full, 100)
    return None if ours is None or not whole else 100 * ours / whole
