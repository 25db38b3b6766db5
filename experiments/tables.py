"""The tables of a grid: methods down, noise, rates and metrics across; ours beside what was published."""

from __future__ import annotations

import csv
import io
import statistics
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

from experiments.cells import CellKey
from experiments.grid import Grid, TableSpec
from experiments.metrics import METRICS, Peers
from experiments.published import Published, published_value
from experiments.results import Run

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
class Table:
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


def peers_of(grid: Grid, runs: Mapping[CellKey, Run], key: CellKey) -> Peers:
    """The runs that a run is held against."""
    full, random = grid.all_data(), grid.random()
    return Peers(
        all_data=None if full is None else runs.get(CellKey(key.data, key.noise, full, None, key.seed)),
        random=None
        if random is None or key.rate is None
        else runs.get(CellKey(key.data, key.noise, random, key.rate, key.seed)),
    )


def values_of(
    grid: Grid, runs: Mapping[CellKey, Run], keys: Sequence[CellKey], metric: str, benchmark: str
) -> tuple[float, ...]:
    """A metric of those of the keys that have it."""
    value = METRICS[metric].value
    found = [value(runs[p], peers_of(grid, runs, p), benchmark) for p in keys if p in runs]
    return tuple(one for one in found if one is not None)


def _keys(grid: Grid, data: str, method: str, noise: float, rate: float) -> list[CellKey]:
    """The seeds of a cell of a table; a method without a strategy has no rate."""
    own = rate if grid.methods[method].strategy else None
    return [CellKey(data, noise, method, own, seed) for seed in grid.seeds]


def _table(
    grid: Grid, spec: TableSpec, data: str, benchmark: str, runs: Mapping[CellKey, Run], published: Published, name: str
) -> Table:
    train_set, published_benchmark = (spec.published_for or f"{data}/{benchmark}").split("/", 1)
    columns = [Column(n, r, m) for n in grid.noise for r in grid.rates for m in spec.metrics]
    full = grid.all_data()
    whole = [] if full is None else grid.methods[full].published

    def figure(names: Sequence[str], column: Column, rate: float) -> float | None:
        percent = round(100 * rate, 6)
        return published_value(published, column.metric, train_set, published_benchmark, names, percent, whole)

    def entry(name: str, column: Column) -> Entry:
        method = grid.methods[name]
        keys = _keys(grid, data, name, column.noise, column.rate)
        values = values_of(grid, runs, keys, column.metric, benchmark)
        finished = sum(key in runs for key in keys)
        return Entry(
            values, finished, len(keys), figure(method.published, column, column.rate if method.strategy else 1)
        )

    rows = [(method, [entry(method, column) for column in columns]) for method in grid.methods]
    rows += [
        (f"{other} (published only)", [Entry((), 0, 0, figure([other], column, column.rate)) for column in columns])
        for other in spec.also
    ]
    where = [f"trained on {data}"] if len(grid.data_sets) > 1 else []
    where += [benchmark] if METRICS[spec.metrics[0]].of_benchmark and len(grid.data_sets[data].val) > 1 else []
    where += [f"{100 * grid.noise[0]:g} % wrong captions"] if len(grid.noise) == 1 and grid.noise[0] else []
    return Table(name, ", ".join([spec.title, *where]), columns, rows, len(grid.noise) > 1)


def make_tables(grid: Grid, runs: Mapping[CellKey, Run], published: Mapping[str, Published]) -> Iterator[Table]:
    """Every table of the grid, one for each data set, and for each benchmark where its metrics depend on that."""
    for number, spec in enumerate(grid.tables, 1):
        figures = published[spec.published] if spec.published is not None else Published()
        by_benchmark = any(METRICS[metric].of_benchmark for metric in spec.metrics)
        for data, facts in grid.data_sets.items():
            for benchmark in list(facts.val)[: None if by_benchmark else 1]:
                parts = [grid.name, f"table{number}"]
                parts += [data] if len(grid.data_sets) > 1 else []
                parts += [benchmark] if by_benchmark and len(facts.val) > 1 else []
                yield _table(grid, spec, data, benchmark, runs, figures, "-".join(parts))


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


def as_markdown(table: Table) -> str:
    """A table, a line for each method. What is the same for all columns stands over the methods."""
    groups = {table.group(column) for column in table.columns}
    metrics = {METRICS[column.metric].heading for column in table.columns}
    corner, heads = "method", [f"{table.group(c)}: {METRICS[c.metric].heading}" for c in table.columns]
    if len(metrics) == 1:
        corner, heads = next(iter(metrics)), [table.group(column) for column in table.columns]
    elif len(groups) == 1:
        corner, heads = next(iter(groups)), [METRICS[column.metric].heading for column in table.columns]
    lines = [[corner, *heads], ["---", *["--:"] * len(table.columns)]]
    for name, entries in table.rows:
        cells = [
            _ours(entry, METRICS[column.metric].digits, "±") + _beside(entry, METRICS[column.metric].digits)
            for column, entry in zip(table.columns, entries, strict=True)
        ]
        lines.append([name, *cells])
    return "\n".join(f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in cells)} |" for cells in lines)


_CSV = (
    "method", "noise", "rate", "metric", "mean", "deviation", "seeds", "runs", "seeds_asked", "published", "difference",
)  # fmt: skip


def as_csv(table: Table) -> str:
    """A line for each method and column; empty where there is no number. ``seeds`` are those that have the metric."""
    file = io.StringIO()
    writer = csv.writer(file, lineterminator="\n")
    writer.writerow(_CSV)
    for name, entries in table.rows:
        for column, entry in zip(table.columns, entries, strict=True):
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


def _groups(table: Table) -> list[tuple[str, int]]:
    """The heads over the metrics, and how many columns each spans."""
    found: list[tuple[str, int]] = []
    for column in table.columns:
        head = table.group(column)
        if found and found[-1][0] == head:
            found[-1] = (head, found[-1][1] + 1)
        else:
            found.append((head, 1))
    return found


def as_latex(table: Table) -> str:
    """A ``table`` with rules of booktabs."""
    spans = " & ".join(rf"\multicolumn{{{count}}}{{c}}{{{_escaped(head)}}}" for head, count in _groups(table))
    heads = " & ".join(_escaped(METRICS[column.metric].heading) for column in table.columns)
    lines = [
        "% needs \\usepackage{booktabs}",
        r"\begin{table}",
        r"\centering",
        rf"\caption{{{_escaped(table.title)}. Mean $\pm$ deviation over the seeds [published, difference].}}",
        rf"\begin{{tabular}}{{l{'r' * len(table.columns)}}}",
        r"\toprule",
        rf" & {spans} \\",
        rf"method & {heads} \\",
        r"\midrule",
    ]
    for name, entries in table.rows:
        cells = [
            _ours(entry, METRICS[column.metric].digits, "±") + _beside(entry, METRICS[column.metric].digits)
            for column, entry in zip(table.columns, entries, strict=True)
        ]
        lines.append(" & ".join(_escaped(cell) for cell in [name, *cells]) + r" \\")
    return "\n".join([*lines, r"\bottomrule", r"\end{tabular}", r"\end{table}", ""])


FORMATS: dict[str, Callable[[Table], str]] = {"csv": as_csv, "tex": as_latex}
"""The formats that have a file for each table; the Markdown is one page."""
