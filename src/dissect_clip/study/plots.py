"""The plots of a grid: R@Sum against the rate, against the wrong captions, and over pairs and seconds.

Error bars are the deviation over the seeds; with one seed there are none.
"""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from dissect_clip.study.grid import Grid
from dissect_clip.study.metrics import Published, Run, published_value
from dissect_clip.study.point import Point

_COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#7f7f7f", "#8c564b")
"""Those of Okabe and Ito, which colour-blind people tell apart, and some more."""

_MARKERS = "os^Dv<>PX*ph"
_LINES = ("-", "--", ":")
_ALL_DATA = {"color": "black", "linestyle": "-", "linewidth": 1.6}
_YLABEL = "R@Sum (at 1 and 10)"


def _figure(panels: int, title: str) -> tuple[Any, list[Any]]:
    """A figure without a screen, and its axes in a row."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(2.2 + 4.6 * panels, 4.6), layout="constrained")
    FigureCanvasAgg(figure)
    figure.suptitle(title, fontsize=10)
    axes = [figure.add_subplot(1, panels, place + 1) for place in range(panels)]
    for one in axes:
        one.grid(alpha=0.3)
    return figure, axes


def _save(figure: Any, axes: Sequence[Any], file: Path) -> Path:
    """Write a figure, with one legend beside it."""
    handles, labels = axes[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside right upper", fontsize=8)
    figure.savefig(file, dpi=100, metadata={"Software": None})  # the same picture is the same file
    return file


def _style(grid: Grid, method: str) -> dict[str, Any]:
    """Colour, marker and line of a method, the same in all plots of a grid."""
    if method == grid.all_data():
        return _ALL_DATA
    place = list(grid.methods).index(method)
    line = _LINES[place // len(_COLOURS) % len(_LINES)]
    return {
        "color": _COLOURS[place % len(_COLOURS)], "marker": _MARKERS[place % len(_MARKERS)], "markersize": 4.5,
        "linestyle": line, "linewidth": 1.3,
    }  # fmt: skip


def _deviation(values: Sequence[float]) -> float:
    return statistics.stdev(values) if len(values) > 1 else 0.0


def _ends(grid: Grid, runs: Mapping[Point, Run], data: str, noise: float, method: str, rate: float) -> list[float]:
    """The final R@Sum of every seed."""
    own = rate if grid.methods[method].strategy else None
    points = [Point(data, noise, method, own, seed) for seed in grid.seeds]
    return [runs[point].rsum4[-1] for point in points if point in runs]


def _against(axes: Any, grid: Grid, series: Mapping[str, list[tuple[float, list[float]]]], step: float) -> None:
    """Means with error bars; methods stand a little apart, so that the bars can be told from each other."""
    for place, (method, found) in enumerate(series.items()):
        if not found:
            continue
        shift = step * (place - (len(series) - 1) / 2)
        x = [at + shift for at, _ in found]
        y = [statistics.mean(values) for _, values in found]
        bars = [_deviation(values) for _, values in found]
        has_bars = any(len(values) > 1 for _, values in found)
        axes.errorbar(x, y, bars if has_bars else None, label=method, capsize=2, elinewidth=0.8, **_style(grid, method))


def draw_rates(
    grid: Grid, runs: Mapping[Point, Run], published: Mapping[str, Published], data: str, file: Path
) -> Path:
    """R@Sum of the trained model against the rate, a panel for each share of wrong captions."""
    benchmark = next(iter(grid.data_sets[data].val))
    figure, panels = _figure(len(grid.noise), f"{grid.title}: {benchmark}, after training on {data}")
    low, high = min(grid.rates), max(grid.rates)
    for axes, noise in zip(panels, grid.noise, strict=True):
        series = {}
        for method in grid.methods:
            ends = [(100 * rate, _ends(grid, runs, data, noise, method, rate)) for rate in sorted(grid.rates)]
            series[method] = [(at, values) for at, values in ends if values]
        _against(axes, grid, series, 100 * (high - low) / 20 / len(series))
        _draw_published(axes, grid, published, data, benchmark)
        told = f"{100 * noise:g} % wrong captions" if noise or len(grid.noise) > 1 else ""
        axes.set(xlabel="share of the batch trained on, %", ylabel=_YLABEL, title=told)
        axes.set_xticks([100 * rate for rate in sorted(grid.rates)])
    return _save(figure, panels, file)


def _draw_published(axes: Any, grid: Grid, published: Mapping[str, Published], data: str, benchmark: str) -> None:
    """Published R@Sums as thin lines of the methods' colours, where a table has them for these very sets."""
    for table in grid.tables:
        if table.published is None or table.published_for is not None or "rsum4" not in table.metrics:
            continue
        for name, method in grid.methods.items():
            rates = sorted(grid.rates) if method.strategy else []
            found = [
                (100 * rate, published_value(
                    published[table.published], "rsum4", data, benchmark, method.published, round(100 * rate, 6), []
                ))
                for rate in rates
            ]  # fmt: skip
            line = [(at, value) for at, value in found if value is not None]
            if line:
                style = {**_style(grid, name), "linestyle": "none", "markerfacecolor": "none", "markersize": 8}
                axes.plot(*zip(*line, strict=True), label=f"{name}, published", **style)


def draw_noise(grid: Grid, runs: Mapping[Point, Run], data: str, file: Path) -> Path:
    """R@Sum of the trained model against the share of wrong captions, a panel for each rate."""
    figure, panels = _figure(len(grid.rates), f"{grid.title}: after training on {data}")
    for axes, rate in zip(panels, grid.rates, strict=True):
        series = {}
        for method in grid.methods:
            ends = [(100 * noise, _ends(grid, runs, data, noise, method, rate)) for noise in sorted(grid.noise)]
            series[method] = [(at, values) for at, values in ends if values]
        _against(axes, grid, series, 100 * (max(grid.noise) - min(grid.noise)) / 20 / len(series))
        axes.set(xlabel="wrong captions, %", ylabel=_YLABEL, title=f"{100 * rate:g} % trained on")
        axes.set_xticks([100 * noise for noise in sorted(grid.noise)])
    return _save(figure, panels, file)


def draw_curves(grid: Grid, runs: Mapping[Point, Run], data: str, noise: float, rate: float, file: Path) -> Path:
    """R@Sum during training against pairs trained on and seconds, with scoring; means over the seeds."""
    noisy = f", {100 * noise:g} % wrong captions" if noise else ""
    figure, panels = _figure(2, f"{grid.title}: {data}{noisy}, {100 * rate:g} % trained on")
    for axes, quantity in zip(panels, ("trained", "seconds"), strict=True):
        for method, facts in grid.methods.items():
            own = [
                runs[point]
                for seed in grid.seeds
                if (point := Point(data, noise, method, rate if facts.strategy else None, seed)) in runs
            ]
            if own:
                _draw_curve(axes, own, quantity, method, _style(grid, method))
        axes.set(ylabel=_YLABEL, xlim=0)
    panels[0].set(xlabel="pairs trained on")
    panels[1].set(xlabel="seconds of training, scoring and loading included")
    return _save(figure, panels, file)


def _draw_curve(axes: Any, runs: Sequence[Run], quantity: str, method: str, style: Mapping[str, Any]) -> None:
    """The mean of some runs, and their deviation at the end."""
    count = min(len(run.rsum4) for run in runs)
    x = [statistics.mean(getattr(run, quantity)[place] for run in runs) for place in range(count)]
    y = [statistics.mean(run.rsum4[place] for run in runs) for place in range(count)]
    axes.plot(x, y, label=method, **{**style, "markevery": [count - 1]})
    if len(runs) > 1:
        ends = [run.rsum4[count - 1] for run in runs]
        axes.errorbar(x[-1], y[-1], _deviation(ends), color=style["color"], capsize=2, elinewidth=0.8)


def draw(grid: Grid, runs: Mapping[Point, Run], published: Mapping[str, Published], out: Path) -> list[Path]:
    """Every plot that there are runs for; returns the files."""
    found = []
    for data in grid.data_sets:
        own = [point for point in runs if point.data == data]
        if not own:
            continue
        stem = f"{grid.file.stem}-{data}" if len(grid.data_sets) > 1 else grid.file.stem
        if len(grid.rates) > 1:
            found.append(draw_rates(grid, runs, published, data, out / f"{stem}-rates.png"))
        if len(grid.noise) > 1:
            found.append(draw_noise(grid, runs, data, out / f"{stem}-noise.png"))
        for noise in grid.noise:
            for rate in grid.rates:
                if any(point.noise == noise and point.rate in (None, rate) for point in own):
                    file = out / f"{stem}-curves-{f'noise{noise:g}-' if noise else ''}{rate:g}.png"
                    found.append(draw_curves(grid, runs, data, noise, rate, file))
    return found
