"""What is told of a run: qualities, seconds, pairs; and the same of a paper, from its published figures.

R@Sum has two meanings. ``rsum`` is the trainer's, the sum of six recalls (at 1, 5 and 10, both ways); ``rsum4`` is
that of the DISSect paper, the sum of four (at 1 and 10). Both are in percent.

Seconds are those that the training process spent loading, scoring, training and updating; evaluation, saving and
start-up are left out. ``..._without_scoring`` leaves the scoring pass, ranking and the store out, too, as the paper
does.
"""

from __future__ import annotations

import csv
import dataclasses
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from dissect_clip.errors import SetupError
from dissect_clip.training.timer import PHASES
from experiments.point import Point

RECALLS = {
    f"{short}_r{k}": f"{way}_R@{k}"
    for short, way in (("i2t", "image_to_text"), ("t2i", "text_to_image"))
    for k in (1, 5, 10)
}
"""Short names of the recalls, and the trainer's."""

_OF_FOUR = ("i2t_r1", "i2t_r10", "t2i_r1", "t2i_r10")


@dataclass(frozen=True)
class Run:
    """A finished cell. Lists have an item for each evaluation during training; recalls are in percent."""

    point: Point
    epochs: list[int]
    rsum4: list[float]
    trained: list[int]  # pairs trained on until then
    scored: list[int]  # pairs that had a scoring pass until then
    seconds: list[float]
    score_seconds: list[float]  # of these, scoring
    final: dict[str, dict[str, float]]  # of the trained model: benchmark -> short name of a recall -> percent
    clean_share: float | None = None  # percent of what was trained on after the warm-up; None where it is not known
    flags: str = ""  # what it was trained with, without data and folders

    def to_json(self) -> dict[str, Any]:
        """As one flat object."""
        content = dataclasses.asdict(self)
        return {**content.pop("point"), **content}

    def spent(self, place: int, scoring: bool) -> float:
        """Seconds until an evaluation."""
        return self.seconds[place] - (0 if scoring else self.score_seconds[place])

    def first_at(self, target: float) -> int | None:
        """The first evaluation at or above a target."""
        return next((place for place, value in enumerate(self.rsum4) if value >= target), None)

    def best(self) -> int:
        """The evaluation with the highest R@Sum, the first of several."""
        return self.rsum4.index(max(self.rsum4))


def make_run(
    point: Point,
    rows: Sequence[Mapping[str, Any]],
    others: Mapping[str, Mapping[str, Any]],
    benchmark: str,
    clean_share: float | None,
    flags: str = "",
) -> Run:
    """A run, from the lines of its results.jsonl and those of the evaluations on other sets."""
    recalls = [_recalls(row) for row in rows]
    return Run(
        point=point,
        epochs=[row["epoch"] for row in rows],
        rsum4=[round(sum(found[name] for name in _OF_FOUR), 3) for found in recalls],
        trained=[row["trained"] for row in rows],
        scored=[row["scored"] for row in rows],
        seconds=[round(sum(row[f"{phase}_seconds"] for phase in PHASES), 2) for row in rows],
        score_seconds=[round(row["score_seconds"], 2) for row in rows],
        final={benchmark: recalls[-1], **{name: _recalls(row) for name, row in others.items()}},
        clean_share=clean_share,
        flags=flags,
    )


def _recalls(row: Mapping[str, Any]) -> dict[str, float]:
    return {short: round(100 * row[name], 3) for short, name in RECALLS.items()}


# ---- published figures


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
    if name == "rsum4" and name not in figures and all(part in figures for part in _OF_FOUR):
        return sum(figures[part] for part in _OF_FOUR)
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
        raise SetupError(f"{file}: column {unknown[0]!r} is no metric; there are {', '.join(METRICS)}")
    return Published(
        {
            (row["train_set"], row["benchmark"], row["method"], float(row["select_percent"])): {
                name: float(row[name]) for name in names if row[name]
            }
            for row in rows
        }
    )


# ---- metrics


@dataclass(frozen=True)
class Peers:
    """What a run is held against: runs on the same data with the same seed, and at the same rate."""

    all_data: Run | None
    random: Run | None


@dataclass(frozen=True)
class Metric:
    """A column of a table."""

    heading: str
    digits: int
    value: Callable[[Run, Peers, str], float | None]  # the last is the benchmark
    of_benchmark: bool = False  # other on every benchmark
    share_of: tuple[str, str] | None = None  # published: percent that the first, here, has of the second on all data


def _quality(names: Sequence[str]) -> Callable[[Run, Peers, str], float | None]:
    def value(run: Run, peers: Peers, benchmark: str) -> float | None:
        found = run.final.get(benchmark)
        return None if found is None else sum(found[name] for name in names)

    return value


def _share(of: Callable[[Run, Peers, str], float | None]) -> Callable[[Run, Peers, str], float | None]:
    """Percent of the value that all data has with the same seed."""

    def value(run: Run, peers: Peers, benchmark: str) -> float | None:
        ours = of(run, peers, benchmark)
        full = None if peers.all_data is None else of(peers.all_data, peers, benchmark)
        return None if ours is None or not full else 100 * ours / full

    return value


def _place(run: Run, peers: Peers, until: str) -> int | None:
    """The evaluation at which something is reached; None where it is not, or has no meaning."""
    if until == "end":
        return len(run.rsum4) - 1
    if until == "own_best":
        return run.best()
    other = peers.random if until == "random_best" else peers.all_data
    if other is None:
        return None
    return run.first_at(max(other.rsum4) if until == "random_best" else other.rsum4[-1])


def _time(until: str, scoring: bool, unit: float) -> Callable[[Run, Peers, str], float | None]:
    def value(run: Run, peers: Peers, benchmark: str) -> float | None:
        place = _place(run, peers, until)
        return None if place is None else run.spent(place, scoring) / unit

    return value


def _time_share(until: str, scoring: bool) -> Callable[[Run, Peers, str], float | None]:
    """Percent of the seconds of all data's whole run, counted in the same way."""
    spent, whole = _time(until, scoring, 1), _time("end", scoring, 1)

    def value(run: Run, peers: Peers, benchmark: str) -> float | None:
        ours = spent(run, peers, benchmark)
        full = None if peers.all_data is None else whole(peers.all_data, peers, benchmark)
        return None if ours is None or not full else 100 * ours / full

    return value


_UNTIL = {
    "end": "", "own_best": " to own best", "random_best": " to random's best", "all_data": " to the end of all data",
}  # fmt: skip
"""Moments of a run: its end; its highest R@Sum; its first R@Sum that reaches random's highest, or all data's last."""


def _times() -> dict[str, Metric]:
    found = {}
    for until, words in _UNTIL.items():
        for suffix, scoring in (("", True), ("_without_scoring", False)):
            told = words + ("" if scoring else ", no scoring")
            for unit, seconds, digits in (("seconds", 1, 0), ("hours", 3600, 1)):
                value = _time(until, scoring, seconds)
                found[f"{unit}_to_{until}{suffix}"] = Metric(f"{unit}{told}", digits, value)
            of = (f"hours_to_{until}{suffix}", f"hours_to_end{suffix}")
            share = Metric(f"% of all data's time{told}", 0, _time_share(until, scoring), share_of=of)
            found[f"time_share_to_{until}{suffix}"] = share
    return found


METRICS: dict[str, Metric] = {
    **{
        name: Metric(f"{'I→T' if name.startswith('i2t') else 'T→I'} R@{name[5:]}", 2, _quality([name]), True)
        for name in RECALLS
    },
    "rsum4": Metric("R@Sum (1, 10)", 2, _quality(_OF_FOUR), True),
    "rsum": Metric("R@Sum (1, 5, 10)", 2, _quality(list(RECALLS)), True),
    "rsum4_share": Metric("R@Sum (1, 10), % of all data", 1, _share(_quality(_OF_FOUR)), True, ("rsum4", "rsum4")),
    "clean_share": Metric("clean of what is kept, %", 1, lambda run, *_: run.clean_share),
    "trained": Metric("pairs trained on", 0, lambda run, *_: run.trained[-1]),
    "scored": Metric("pairs scored", 0, lambda run, *_: run.scored[-1]),
    **_times(),
}  # fmt: skip
"""The columns that a table may have, by name."""


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
