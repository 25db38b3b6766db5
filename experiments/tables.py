"""The tables of a grid: methods down, noise, rates and metrics across; ours beside what was published."""

from __future__ import annotations

import csv
import io
import statistics
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

from experiments.grid import Grid, Table
from experiments.metrics import METRICS, Peers, Published, Run, published_value
from experiments.point import Point

MISSING = "missing"
"""What stands in a cell of which no run is finished."""


@dataclass(frozen=True)
class Column:
    """A metric at a rate, on data with so many wrong captions."""

    noise: float
    rate: float
    metric: str


@dataclass(frozen=True)
class Entry:
    """What stands in a cell of a table: the seeds' mean and deviation, and the published figure."""

    values: tuple[float, ...]  # of the seeds that have the metric
    runs: int  # finished
    seeds: int  # asked for
    published: float | None

    @property
    def mean(self) -> float | None:
        """Over the seeds that have it."""
        return statistics.mean(self.values) if self.values else None

    @property
    def deviation(self) -> float | None:
        """That of a sample; None for fewer than two seeds."""
        return statistics.stdev(self.values) if len(self.values) > 1 else None

    @property
    def difference(self) -> float | None:
        """Ours minus published."""
        return None if self.mean is None or self.published is None else self.mean - self.published


@dataclass(frozen=True)
class Sheet:
    """A table of one data set and benchmark, filled in. ``name`` is that of its files."""

    name: str
    title: str
    columns: list[Column]
    rows: list[tuple[str, list[Entry]]]
    several_noises: bool

    def group(self, column: Column) -> str:
        """The head over all metrics of a rate."""
        noise = f"{100 * column.noise:g} % wrong captions, " if self.several_noises else ""
        return f"{noise}{100 * column.rate:g} %"


# ---- filling in


def peers_of(grid: Grid, runs: Mapping[Point, Run], point: Point) -> Peers:
    """The runs that a run is held against."""
    full, random = grid.all_data(), grid.random()
    return Peers(
        all_data=None if full is None else runs.get(Point(point.data, point.noise, full, None, point.seed)),
        random=None
        if random is None or point.rate is None
        else runs.get(Point(point.data, point.noise, random, point.rate, point.seed)),
    )


def values_of(
    grid: Grid, runs: Mapping[Point, Run], points: Sequence[Point], metric: str, benchmark: str
) -> tuple[float, ...]:
    """A metric of those of the points that have it."""
    value = METRICS[metric].value
    found = [value(runs[p], peers_of(grid, runs, p), benchmark) for p in points if p in runs]
    return tuple(one for one in found if one is not None)


def _points(grid: Grid, data: str, method: str, noise: float, rate: float) -> list[Point]:
    """The seeds of a cell of a table; a method without a strategy has no rate."""
    own = rate if grid.methods[method].strategy else None
    return [Point(data, noise, method, own, seed) for seed in grid.seeds]


def _sheet(
    grid: Grid, table: Table, data: str, benchmark: str, runs: Mapping[Point, Run], published: Published, name: str
) -> Sheet:
    train_set, published_benchmark = (table.published_for or f"{data}/{benchmark}").split("/", 1)
    columns = [Column(n, r, m) for n in grid.noise for r in grid.rates for m in table.metrics]
    full = grid.all_data()
    whole = [] if full is None else grid.methods[full].published

    def told(names: Sequence[str], column: Column, rate: float) -> float | None:
        percent = round(100 * rate, 6)
        return published_value(published, column.metric, train_set, published_benchmark, names, percent, whole)

    def entry(name: str, column: Column) -> Entry:
        method = grid.methods[name]
        points = _points(grid, data, name, column.noise, column.rate)
        values = values_of(grid, runs, points, column.metric, benchmark)
        finished = sum(point in runs for point in points)
        return Entry(
            values, finished, len(points), told(method.published, column, column.rate if method.strategy else 1)
        )

    rows = [(method, [entry(method, column) for column in columns]) for method in grid.methods]
    rows += [
        (f"{other} (published only)", [Entry((), 0, 0, told([other], column, column.rate)) for column in columns])
        for other in table.also
    ]
    where = [f"trained on {data}"] if len(grid.data_sets) > 1 else []
    where += [benchmark] if METRICS[table.metrics[0]].of_benchmark and len(grid.data_sets[data].val) > 1 else []
    where += [f"{100 * grid.noise[0]:g} % wrong captions"] if len(grid.noise) == 1 and grid.noise[0] else []
    return Sheet(name, ", ".join([table.title, *where]), columns, rows, len(grid.noise) > 1)


def sheets(grid: Grid, runs: Mapping[Point, Run], published: Mapping[str, Published]) -> Iterator[Sheet]:
    """Every table of the grid, one for each data set, and for each benchmark where its metrics depend on that."""
    for number, table in enumerate(grid.tables, 1):
        figures = published[table.published] if table.published is not None else Published()
        by_benchmark = any(METRICS[metric].of_benchmark for metric in table.metrics)
        for data, facts in grid.data_sets.items():
            for benchmark in list(facts.val)[: None if by_benchmark else 1]:
                parts = [grid.name, f"table{number}"]
                parts += [data] if len(grid.data_sets) > 1 else []
                parts += [benchmark] if by_benchmark and len(facts.val) > 1 else []
                yield _sheet(grid, table, data, benchmark, runs, figures, "-".join(parts))


# ---- writing


def _number(value: float, digits: int) -> str:
    text = f"{value:,.{digits}f}"
    return text[1:] if text.startswith("-") and not text.strip("-0.,") else text  # no minus before 0


def _ours(entry: Entry, digits: int, plus_minus: str) -> str:
    if entry.runs == 0 and entry.seeds:
        return MISSING
    if entry.mean is None:
        return "–"
    deviation = "" if entry.deviation is None else f" {plus_minus} {_number(entry.deviation, digits)}"
    count = "" if len(entry.values) == entry.seeds else f" ({len(entry.values)} of {entry.seeds})"
    return _number(entry.mean, digits) + deviation + count


def _beside(entry: Entry, digits: int) -> str:
    """As in " [141.59, -0.40]"; nothing without a published figure."""
    if entry.published is None:
        return ""
    if entry.difference is None:
        return f" [{_number(entry.published, digits)}]"
    difference = _number(entry.difference, digits)
    sign = "" if difference.startswith("-") else "+"
    return f" [{_number(entry.published, digits)}, {sign}{difference}]"


def as_markdown(sheet: Sheet) -> str:
    """A table, a line for each method. What is the same for all columns stands over the methods."""
    groups = {sheet.group(column) for column in sheet.columns}
    metrics = {METRICS[column.metric].heading for column in sheet.columns}
    corner, heads = "method", [f"{sheet.group(c)}: {METRICS[c.metric].heading}" for c in sheet.columns]
    if len(metrics) == 1:
        corner, heads = next(iter(metrics)), [sheet.group(column) for column in sheet.columns]
    elif len(groups) == 1:
        corner, heads = next(iter(groups)), [METRICS[column.metric].heading for column in sheet.columns]
    lines = [[corner, *heads], ["---", *["--:"] * len(sheet.columns)]]
    for name, entries in sheet.rows:
        cells = [
            _ours(entry, METRICS[column.metric].digits, "±") + _beside(entry, METRICS[column.metric].digits)
            for column, entry in zip(sheet.columns, entries, strict=True)
        ]
        lines.append([name, *cells])
    return "\n".join(f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in cells)} |" for cells in lines)


_CSV = (
    "method", "noise", "rate", "metric", "mean", "deviation", "seeds", "runs", "seeds_asked", "published", "difference",
)  # fmt: skip


def as_csv(sheet: Sheet) -> str:
    """A line for each method and column; empty where there is no number. ``seeds`` are those that have the metric."""
    file = io.StringIO()
    writer = csv.writer(file, lineterminator="\n")
    writer.writerow(_CSV)
    for name, entries in sheet.rows:
        for column, entry in zip(sheet.columns, entries, strict=True):
            numbers = [entry.mean, entry.deviation, entry.published, entry.difference]
            mean, deviation, published, difference = ("" if n is None else f"{n:.3f}" for n in numbers)
            writer.writerow(
                [
                    name, f"{column.noise:g}", f"{column.rate:g}", column.metric, mean, deviation, len(entry.values),
                    entry.runs, entry.seeds, published, difference,
                ]
            )  # fmt: skip
    return file.getvalue()


_LATEX = {
    "\\": r"\textbackslash{}", "&": r"\&", "%": r"\%", "$": r"\$", "#": r"\#", "_": r"\_", "{": r"\{", "}": r"\}",
    "~": r"\textasciitilde{}", "^": r"\textasciicircum{}", "→": r"$\rightarrow$", "±": r"$\pm$", "–": "--",
}  # fmt: skip


def _escaped(text: str) -> str:
    return "".join(_LATEX.get(character, character) for character in text)


def _groups(sheet: Sheet) -> list[tuple[str, int]]:
    """The heads over the metrics, and how many columns each spans."""
    found: list[tuple[str, int]] = []
    for column in sheet.columns:
        head = sheet.group(column)
        if found and found[-1][0] == head:
            found[-1] = (head, found[-1][1] + 1)
        else:
            found.append((head, 1))
    return found


def as_latex(sheet: Sheet) -> str:
    """A ``table`` with rules of booktabs."""
    spans = " & ".join(rf"\multicolumn{{{count}}}{{c}}{{{_escaped(head)}}}" for head, count in _groups(sheet))
    heads = " & ".join(_escaped(METRICS[column.metric].heading) for column in sheet.columns)
    lines = [
        "% needs \\usepackage{booktabs}",
        r"\begin{table}",
        r"\centering",
        rf"\caption{{{_escaped(sheet.title)}. Mean $\pm$ deviation over the seeds [published, difference].}}",
        rf"\begin{{tabular}}{{l{'r' * len(sheet.columns)}}}",
        r"\toprule",
        rf" & {spans} \\",
        rf"method & {heads} \\",
        r"\midrule",
    ]
    for name, entries in sheet.rows:
        cells = [
            _ours(entry, METRICS[column.metric].digits, "±") + _beside(entry, METRICS[column.metric].digits)
            for column, entry in zip(sheet.columns, entries, strict=True)
        ]
        lines.append(" & ".join(_escaped(cell) for cell in [name, *cells]) + r" \\")
    return "\n".join([*lines, r"\bottomrule", r"\end{tabular}", r"\end{table}", ""])


FORMATS: dict[str, Callable[[Sheet], str]] = {"csv": as_csv, "tex": as_latex}
"""The formats that have a file for each table; the Markdown is one page."""
