"""The plots of a grid: R@Sum against the rate, against the wrong captions, and over pairs and seconds.

Error bars are the deviation over the seeds; with one seed there are none.
"""

from __future__ import annotations

import itertools
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from experiments.cells import CellKey
from experiments.grid import Grid
from experiments.published import Published
from experiments.results import Run
from experiments.tables import values_of

_COLOURS = (
    "#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#7f7f7f", "#8c564b", "#6a3d9a", "#556b2f",
    "#8b0000", "#004c6d", "#bcbd22", "#e377c2",
)  # fmt: skip
"""Those of Okabe and Ito, which colour-blind people tell apart, and some more."""

_MARKERS = "os^Dv<>PX*phd8"
_ALL_DATA = {"color": "black", "linestyle": "-", "linewidth": 1.6}
_QUALITIES = {"rsum4": "R@Sum (at 1 and 10)", "rsum4_share": "% of all data's, same seed"}
"""What is drawn, and the name of its axis."""


def _figure(rows: int, columns: int, title: str) -> tuple[Any, list[list[Any]]]:
    """A figure without a screen, and its axes by row."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(2.4 + 4.4 * columns, 0.6 + 3.6 * rows), layout="constrained")
    FigureCanvasAgg(figure)
    figure.suptitle(title, fontsize=10, x=0.01, ha="left")
    axes = figure.subplots(rows, columns, squeeze=False)
    for one in axes.flat:
        one.grid(alpha=0.3)
        one.locator_params(axis="x", nbins=6)
    return figure, axes.tolist()


def _save(figure: Any, axes: Any, file: Path) -> Path:
    """Write a figure, with the legend of one of its axes beside it."""
    handles, labels = axes.get_legend_handles_labels()
    if labels:
        figure.legend(handles, labels, loc="outside right upper", fontsize=8)
    figure.savefig(file, dpi=90, metadata={"Software": None})  # the same picture is the same file
    return file


def _style(grid: Grid, method: str) -> dict[str, Any]:
    """Colour and marker of a method, the same in all plots of a grid."""
    if method == grid.all_data():
        return _ALL_DATA
    place = [name for name in grid.methods if name != grid.all_data()].index(method)
    return {
        "color": _COLOURS[place % len(_COLOURS)], "marker": _MARKERS[place % len(_MARKERS)], "markersize": 4.5,
        "linestyle": "-" if place < len(_COLOURS) else "--", "linewidth": 1.3,
    }  # fmt: skip


def _deviation(values: Sequence[float]) -> float:
    return statistics.stdev(values) if len(values) > 1 else 0.0


def _keys(grid: Grid, data: str, noise: float, method: str, rate: float) -> list[CellKey]:
    """The seeds of a method; one without a strategy has no rate."""
    own = rate if grid.methods[method].strategy else None
    return [CellKey(data, noise, method, own, seed) for seed in grid.seeds]


Series = dict[str, list[tuple[float, tuple[float, ...]]]]
"""Of each method, places on the x axis and the values of the seeds there."""


def _against(axes: Any, grid: Grid, series: Series) -> None:
    """Means with error bars; methods stand a little apart, so that the bars do not overlap."""
    places = sorted({at for found in series.values() for at, _ in found})
    gaps = [after - before for before, after in itertools.pairwise(places)]
    width = min(sum(gaps) / 12, min(gaps) / 3) if gaps else 0
    for number, (method, found) in enumerate(series.items()):
        if not found:
            continue
        shift = width * (number / max(len(series) - 1, 1) - 0.5)
        bars = [_deviation(values) for _, values in found]
        axes.errorbar(
            [at + shift for at, _ in found],
            [statistics.mean(values) for _, values in found],
            bars if any(len(values) > 1 for _, values in found) else None,
            label=method, capsize=2, elinewidth=0.8, **_style(grid, method),
        )  # fmt: skip
    axes.set_xticks(places)


def _qualities(grid: Grid) -> list[str]:
    """What can be drawn: shares of all data need a row that trains on it."""
    return list(_QUALITIES) if grid.all_data() is not None else ["rsum4"]


def _series(grid: Grid, runs: Mapping[CellKey, Run], places: Mapping[float, Sequence[Any]], quality: str) -> Series:
    """A quality of every method. ``places`` are data, noise and rate, by the place on the x axis."""
    found: Series = {}
    for method in grid.methods:
        found[method] = []
        for at, (data, noise, rate) in places.items():
            benchmark = next(iter(grid.data_sets[data].val))
            values = values_of(grid, runs, _keys(grid, data, noise, method, rate), quality, benchmark)
            if values:
                found[method].append((at, values))
    return found


def draw_rates(
    grid: Grid, runs: Mapping[CellKey, Run], published: Mapping[str, Published], data: str, file: Path
) -> Path:
    """Quality of the trained model against the rate, a row for each share of wrong captions."""
    benchmark = next(iter(grid.data_sets[data].val))
    qualities, rates = _qualities(grid), sorted(grid.rates)
    figure, panels = _figure(len(grid.noise), len(qualities), f"{grid.title}: {benchmark}, trained on {data}")
    for row, noise in zip(panels, grid.noise, strict=True):
        for axes, quality in zip(row, qualities, strict=True):
            _against(axes, grid, _series(grid, runs, {100 * rate: (data, noise, rate) for rate in rates}, quality))
            title = f"{100 * noise:g} % wrong captions" if noise or len(grid.noise) > 1 else ""
            axes.set_title(title, fontsize=10)
            axes.set(xlabel="share of the batch trained on, %", ylabel=_QUALITIES[quality])
        if not noise:
            _draw_published(row[0], grid, published, data, benchmark)
    return _save(figure, panels[0][0], file)


def _draw_published(axes: Any, grid: Grid, published: Mapping[str, Published], data: str, benchmark: str) -> None:
    """Published R@Sums as open markers of the methods' colours, where a table has them for these very sets."""
    for table in grid.tables:
        if table.published is None or table.published_for is not None or "rsum4" not in table.metrics:
            continue
        drawn: set[str] = set()
        for name, method in grid.methods.items():
            if not method.published or method.published[0] in drawn:  # several rows may stand beside the same figures
                continue
            drawn.add(method.published[0])
            found = [
                (100 * rate, published[table.published].find("rsum4", data, benchmark, method.published, percent))
                for rate in sorted(grid.rates)
                for percent in [round(100 * rate, 6) if method.strategy else 100.0]
            ]
            known = [(at, value) for at, value in found if value is not None]
            if known:
                style = {**_style(grid, name), "linestyle": ":", "markerfacecolor": "none", "linewidth": 0.8}
                axes.plot(*zip(*known, strict=True), label=f"{name}, published", **style)


def draw_noise(grid: Grid, runs: Mapping[CellKey, Run], data: str, file: Path) -> Path:
    """Quality of the trained model against the share of wrong captions, a row for each rate."""
    qualities, noises = _qualities(grid), sorted(grid.noise)
    figure, panels = _figure(len(grid.rates), len(qualities), f"{grid.title}: trained on {data}")
    for row, rate in zip(panels, grid.rates, strict=True):
        for axes, quality in zip(row, qualities, strict=True):
            _against(axes, grid, _series(grid, runs, {100 * noise: (data, noise, rate) for noise in noises}, quality))
            axes.set_title(f"{100 * rate:g} % trained on", fontsize=10)
            axes.set(xlabel="wrong captions, %", ylabel=_QUALITIES[quality])
    return _save(figure, panels[0][0], file)


def draw_curves(grid: Grid, runs: Mapping[CellKey, Run], data: str, noise: float, rate: float, file: Path) -> Path:
    """R@Sum during training against pairs trained on and seconds, with scoring; means over the seeds."""
    noisy = f", {100 * noise:g} % wrong captions" if noise else ""
    figure, ((by_pairs, by_seconds),) = _figure(1, 2, f"{grid.title}: {data}{noisy}, {100 * rate:g} % trained on")
    shown = {
        method: [runs[key] for key in _keys(grid, data, noise, method, rate) if key in runs] for method in grid.methods
    }
    for axes, quantity in ((by_pairs, "trained"), (by_seconds, "seconds")):
        longest = max(getattr(run, quantity)[-1] for own in shown.values() for run in own)
        for number, (method, own) in enumerate(shown.items()):
            if own:
                shift = 0.003 * longest * (number - len(shown) / 2)
                _draw_curve(axes, own, quantity, method, _style(grid, method), shift)
        axes.set(ylabel=_QUALITIES["rsum4"], xlim=0)
    by_pairs.set(xlabel="pairs trained on")
    by_seconds.set(xlabel="seconds of training, scoring and loading included")
    return _save(figure, by_pairs, file)


def _draw_curve(
    axes: Any, runs: Sequence[Run], quantity: str, method: str, style: Mapping[str, Any], shift: float
) -> None:
    """The mean of some runs, and their deviation at the end, moved by ``shift`` so that bars do not hide each other."""
    count = min(len(run.rsum4) for run in runs)
    x = [statistics.mean(getattr(run, quantity)[place] for run in runs) for place in range(count)]
    y = [statistics.mean(run.rsum4[place] for run in runs) for place in range(count)]
    axes.plot(x, y, label=method, **{**style, "markevery": [count - 1]})
    if len(runs) > 1:
        ends = [run.rsum4[count - 1] for run in runs]
        axes.errorbar(x[-1] + shift, y[-1], _deviation(ends), color=style["color"], capsize=2, elinewidth=0.8)


def draw(grid: Grid, runs: Mapping[CellKey, Run], published: Mapping[str, Published], out: Path) -> list[Path]:
    """The plots of the grid that there are runs for; returns the files."""
    found = []
    for data in grid.data_sets:
        own = [key for key in runs if key.data == data]
        if not own:
            continue
        stem = f"{grid.name}-{data}" if len(grid.data_sets) > 1 else grid.name
        if "rates" in grid.plots and len(grid.rates) > 1:
            found.append(draw_rates(grid, runs, published, data, out / f"{stem}-rates.png"))
        if "noise" in grid.plots and len(grid.noise) > 1:
            found.append(draw_noise(grid, runs, data, out / f"{stem}-noise.png"))
        for noise in grid.noise if "curves" in grid.plots else ():
            for rate in grid.rates:
                if any(key.noise == noise and key.rate in (None, rate) for key in own):
                    file = out / f"{stem}-curves-{f'noise{noise:g}-' if noise else ''}{rate:g}.png"
                    found.append(draw_curves(grid, runs, data, noise, rate, file))
    return found
