"""The cells that a command line asks for, of one grid or several."""

from __future__ import annotations

import argparse
from collections.abc import Collection, Sequence
from dataclasses import dataclass

from dissect_clip.errors import SetupError
from experiments.cells import Cell, CellKey
from experiments.grid import Grid


@dataclass(frozen=True)
class Job:
    """A cell of one grid or several."""

    grid: Grid
    key: CellKey
    cell: Cell
    epochs: int


def wanted_keys(grid: Grid, options: argparse.Namespace) -> list[CellKey]:
    """The cells of a grid that the command line asks for."""
    return [
        key
        for key in grid.cell_keys()
        if (options.rows is None or key.method in options.rows) and options.cell in (None, key.name)
    ]


def retired_keys(grids: Sequence[Grid], options: argparse.Namespace, recorded: Collection[CellKey]) -> list[CellKey]:
    """The cells whose results are recorded and whose flags were removed since.

    Raises:
        SetupError: one is not among the ``recorded`` runs, and so would have to be run.
    """
    found: dict[CellKey, None] = {}
    for grid in grids:
        keys = [key for key in wanted_keys(grid, options) if grid.is_retired(key)]
        for key in keys:
            if key not in recorded:
                raise SetupError(
                    f"{grid.file}: {key.method} cannot be run here: flags of it were removed after commit "
                    f"{grid.methods[key.method].commit}. Take its recorded results (--from experiments/small), "
                    "leave it out (--rows), or run it at that commit"
                )
        found |= dict.fromkeys(keys)
    return list(found)


def make_jobs(grids: Sequence[Grid], options: argparse.Namespace) -> list[Job]:
    """The cells of all grids that can be run, each once, checked.

    Raises:
        SetupError: flags of a cell are wrong, or grids have different cells of the same name.
    """
    jobs: dict[str, Job] = {}
    for grid in grids:
        keys = [key for key in wanted_keys(grid, options) if not grid.is_retired(key)]
        grid.check(keys)
        for key in keys:
            job = Job(grid, key, grid.cell(key, options.runs), grid.config(key).training.epochs)
            other = jobs.setdefault(key.name, job)
            if (other.cell.identity, other.cell.evaluations) != (job.cell.identity, job.cell.evaluations):
                raise SetupError(
                    f"{grid.file} and {other.grid.file} have different cells {key.name}: give each its own --runs"
                )
    if options.cell is not None and not any(wanted_keys(grid, options) for grid in grids):
        raise SetupError(f"--cell {options.cell}: no grid has this cell; --list shows them")
    return list(jobs.values())
