#!/usr/bin/env python3
"""Draws benchmarks from their JSON lines.

    python benchmarks/plot.py bench.jsonl --out docs/results/performance

OUT/step_cost.png and OUT/epoch_cost.png: the cost of a step against the rate. OUT/store.png: the score store against
the size of the data set. A picture is made where the files have its lines.
"""

from __future__ import annotations

import argparse
import math
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib as mpl
from common import read_lines

Line = Mapping[str, Any]

COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#7f7f7f", "#8c564b", "#000000", "#bcbd22")
"""Those of Okabe and Ito, which colour-blind people tell apart, and some more."""

MARKERS = "os^Dv<>PX*"


def new_figure(panels: int, title: str) -> tuple[Any, Any]:
    """A figure without a screen, and its axes in a row."""
    mpl.use("Agg")
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(1, panels, figsize=(1.5 + 5.5 * panels, 4.8), layout="constrained", squeeze=False)
    figure.suptitle(title, fontsize=10)
    for one in axes[0]:
        one.grid(alpha=0.3)
    return figure, axes[0]


def save(figure: Any, file: Path) -> Path:
    """Write a figure and let it go."""
    from matplotlib import pyplot as plt

    figure.savefig(file, dpi=110)
    plt.close(figure)
    return file


def machine(line: Line) -> str:
    """As in "AMD EPYC, 2 threads, torch 2.6.0"."""
    found = line["machine"]
    return f"{found['processor']}, {found['threads']} threads, torch {line['versions']['torch']}"


def draw_cost(lines: Sequence[Line], file: Path) -> Path:
    """Cost over a full step against the rate, and what is above the step with the choice given."""
    last = {line["rate"]: line for line in lines}
    rates = sorted(last)
    first = lines[-1]
    what = "a step, compute alone" if first["benchmark"] == "step_cost" else "an epoch, loading included"
    figure, (cost, above) = new_figure(2, f"{what}: {first['model']}, batch {first['batch_size']}; {machine(first)}")
    cost.plot(rates, rates, color="black", linestyle=":", label="limit: the rate")
    modes = [mode for mode in first["cost"] if all(mode in last[rate]["cost"] for rate in rates)]
    for place, mode in enumerate(modes):
        style = {"color": COLOURS[place % len(COLOURS)], "marker": MARKERS[place % len(MARKERS)], "markersize": 4}
        for axes, name in ((cost, "cost"), (above, "overhead")):
            if mode not in first[name]:
                continue
            found = [last[rate][name][mode] for rate in rates]
            axes.plot(rates, [value["median"] for value in found], label=mode if axes is cost else None, **style)
            low, high = [value["low"] for value in found], [value["high"] for value in found]
            axes.fill_between(rates, low, high, color=style["color"], alpha=0.12, linewidth=0)
    cost.set(xlabel="share of the batch trained on", ylabel="cost, a step on everything is 1", title="cost", ylim=0)
    above.set(xlabel="share of the batch trained on", ylabel="the same unit", title="above the choice given for free")
    above.axhline(0, color="black", linewidth=0.8)
    cost.legend(fontsize=8)
    return save(figure, file)


def draw_store(lines: Sequence[Line], file: Path) -> Path:
    """Seconds of reading and writing against the size of the store, both axes logarithmic."""
    figure, axes = new_figure(2, f"score store, batch {lines[-1]['batch_size']} a rank; {machine(lines[-1])}")
    processes = sorted({(line["ranks"], line["exchange"]) for line in lines})
    for place, (ranks, exchange) in enumerate(processes):
        own = sorted(
            (line for line in lines if (line["ranks"], line["exchange"]) == (ranks, exchange)),
            key=lambda line: line["samples"],
        )
        samples = [line["samples"] for line in own]
        style = {"color": COLOURS[place], "marker": MARKERS[place], "markersize": 4}
        label = (
            f"{ranks} rank{'s' * (ranks > 1)}" + {"none": "", "simulated": ", no network", "gloo": ", gloo"}[exchange]
        )
        for one, name in zip(axes, ("read_seconds", "write_seconds"), strict=True):
            values = [line[name] for line in own]
            one.plot(samples, [1000 * value["median"] for value in values], label=label, **style)
            one.fill_between(
                samples, [1000 * v["low"] for v in values], [1000 * v["high"] for v in values],
                color=style["color"], alpha=0.12, linewidth=0,
            )  # fmt: skip
    for one, title in zip(axes, ("reading a batch's scores", "writing all ranks' scores"), strict=True):
        one.set(xscale="log", yscale="log", xlabel="samples in the data set", ylabel="milliseconds a step", title=title)
        low, high = one.get_ylim()
        one.set_ylim(
            10 ** math.floor(math.log10(low)), 10 ** math.ceil(math.log10(high))
        )  # whole decades: flat looks flat
    axes[1].legend(fontsize=8)
    return save(figure, file)


LEGEND = {"full": "all data", "exact": "DISSect", "fast": "DISSect fast", "random": "random selection"}
"""Names of modes that a reader knows; others stand as they are."""


AXES = {"seconds": "seconds of training, with scoring and loading", "trained": "pairs trained on"}
"""What R@Sum is drawn against, and the name of that axis."""


def draw_quality(
    runs: Sequence[Line], targets: Sequence[float], file: Path, against: Sequence[str] = tuple(AXES)
) -> Path:
    """R@Sum against quantities of AXES, a panel each: each run thin, the mean over a mode's seeds thick."""
    figure, panels = new_figure(len(against), "mean over the seeds (thick) and each run (thin)")
    modes = list(dict.fromkeys(run["mode"] for run in runs))
    for place, mode in enumerate(modes):
        own = [run for run in runs if run["mode"] == mode]
        colour = COLOURS[place % len(COLOURS)]
        label = LEGEND.get(mode, mode.replace("full", "all data"))
        shortest = min(len(run["rsum"]) for run in own)
        for axes, quantity in zip(panels, against, strict=True):
            for run in own:
                axes.plot(run[quantity], run["rsum"], color=colour, alpha=0.25, linewidth=0.8)
            means = [
                [statistics.mean(run[name][point] for run in own) for point in range(shortest)]
                for name in (quantity, "rsum")
            ]
            axes.plot(*means, color=colour, linewidth=1.8, label=label, marker="o" if shortest == 1 else None)
    for axes, quantity in zip(panels, against, strict=True):
        for place, target in enumerate(targets):
            name = None if place else "final quality of all data, by seed"
            axes.axhline(target, color="black", linestyle=":", linewidth=1, label=name)
        axes.set(xlabel=AXES[quantity], ylabel="R@Sum", xlim=0)
    panels[-1].legend(fontsize=9)
    return save(figure, file)


def draw(lines: Sequence[Line], out: Path) -> list[Path]:
    """All pictures that there are lines for."""
    out.mkdir(parents=True, exist_ok=True)
    drawers = {"step_cost": draw_cost, "epoch_cost": draw_cost, "store": draw_store}
    found = {name: [line for line in lines if line["benchmark"] == name] for name in drawers}
    return [drawers[name](own, out / f"{name}.png") for name, own in found.items() if own]


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("files", nargs="+", type=Path, metavar="FILE")
    parser.add_argument("--out", type=Path, default=Path("."))
    options = parser.parse_args(argv)
    lines = [line for file in options.files for line in read_lines(file)]
    for picture in draw(lines, options.out):
        print(picture)


if __name__ == "__main__":
    main()
