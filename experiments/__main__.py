"""Run a grid of (data, method, rate, seed, wrong captions); make tables and plots of it, beside a paper's figures.

    python -m experiments experiments/small/methods/methods.yaml --data EMOJI=/data/emoji     run what is left, collect
    python -m experiments experiments/paper/cc3m/cc3m.yaml --data ... --list               the cells and their state
    python -m experiments experiments/paper/cc3m/cc3m.yaml --data ... --slurm cc3m.sbatch  a job array, a task a cell
    python -m experiments experiments/small/methods/methods.yaml --collect --beside           tables and plots only
    python -m experiments experiments/small/rates/rates.yaml --data ... --from experiments/small    and recorded runs

Each cell is one command line of src/main.py in a separate process. A finished cell is not run again; an interrupted one
resumes from its own checkpoints. Grids with the same --runs share the cells they have in common.
docs/guides/reproduce.md has the details.

Exit status: 0 when all cells are finished, 1 when some are not, 2 when something is wrong with grids, flags or data, 75
after a signal.
"""

from __future__ import annotations

import argparse
import importlib.util
import shutil
import sys
from collections.abc import Sequence
from pathlib import Path

from dissect_clip.errors import SetupError
from experiments.cells import Interrupted, Runs
from experiments.collect import collect, published_figures
from experiments.grid import Grid
from experiments.grid_file import read_grid
from experiments.jobs import make_jobs, retired_keys
from experiments.moved import moved
from experiments.recorded import check_recorded, read_recorded
from experiments.runner import list_jobs, run_all
from experiments.slurm import EXIT_STOPPED, ROOT, write_slurm

PROGRAM = (sys.executable, str(ROOT / "src" / "main.py"))
EXIT_SETUP = 2


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        prog="python -m experiments", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("grids", nargs="+", type=lambda text: moved(Path(text)), metavar="GRID.yaml")
    parser.add_argument("--data", action="append", default=[], metavar="NAME=VALUE", help="what ${NAME} stands for")
    parser.add_argument("--runs", type=Path, help="folder of the runs (default: reproduce/small for experiments/small)")
    where = parser.add_mutually_exclusive_group()
    where.add_argument("--out", type=Path, help="folder of tables and plots (default: RUNS/results)")
    where.add_argument("--beside", action="store_true", help="write tables and plots beside each grid")
    parser.add_argument(
        "--from", action="append", default=[], type=lambda text: moved(Path(text)), dest="recorded", metavar="FOLDER",
        help="take finished cells from this folder of collected results; may be repeated",
    )  # fmt: skip
    parser.add_argument("--rows", nargs="+", metavar="METHOD", help="run only these rows; tables have all of them")
    parser.add_argument("--retry-failed", action="store_true", help="run failed cells again")
    what = parser.add_mutually_exclusive_group()
    what.add_argument("--list", action="store_true", help="show the cells and their state; run nothing")
    what.add_argument("--collect", action="store_true", help="make tables and plots of what is finished; run nothing")
    what.add_argument("--slurm", type=Path, metavar="FILE", help="write a Slurm job array; run nothing")
    what.add_argument("--cell", metavar="NAME", help="run this cell only, and collect nothing")
    options = parser.parse_args(argv)
    given = {}
    for text in options.data:
        name, equals, value = text.partition("=")
        if not equals or not name:
            parser.error(f"argument --data: {text!r} is not of the form NAME=VALUE")
        given[name] = value
    options.data = given
    first = options.grids[0].resolve()
    folder = (
        first.parent if first.parent.name == first.stem else first
    ).parent.name  # small, of small/rates/rates.yaml
    options.runs = (options.runs or Path("reproduce") / folder).resolve()
    if options.out is not None and moved(options.out) != options.out:
        options.beside = True
    options.out = options.out or options.runs / "results"
    return options


def read_grids(options: argparse.Namespace) -> list[Grid]:
    """The grids of the command line.

    Raises:
        SetupError: one is wrong, or a variable or row is in none of them.
    """
    grids = [read_grid(file, options.data) for file in options.grids]
    known = set().union(*(grid.variables for grid in grids))
    for name in options.data:
        if name not in known:
            raise SetupError(f"--data {name}: no grid has ${{{name}}}; there are {', '.join(sorted(known)) or 'none'}")
    rows = list(dict.fromkeys(name for grid in grids for name in grid.methods))
    for name in options.rows or ():
        if name not in rows:
            raise SetupError(f"--rows {name}: no grid has this row; there are {', '.join(rows)}")
    for grid in grids:
        published_figures(grid)
    return grids


def _check_tools(grids: Sequence[Grid]) -> None:
    """Check the programs and packages that a run needs."""
    if importlib.util.find_spec("matplotlib") is None:
        raise SetupError("matplotlib is not installed: pip install -e '.[reproduce]'")
    for grid in grids:
        if grid.launcher and shutil.which(grid.launcher[0]) is None:
            raise SetupError(f"{grid.file}: launcher: {grid.launcher[0]} is not on the PATH")


def work(options: argparse.Namespace, program: tuple[str, ...]) -> int:
    """Do what the command line asks for; the exit status.

    Raises:
        SetupError: something is wrong with grids, flags or data.
        Interrupted: a signal requested a stop.
    """
    grids = read_grids(options)
    runs = Runs(options.runs, program)
    left = 0
    recorded = read_recorded(options.recorded)
    for grid in grids:
        known = [key for key in grid.cell_keys() if key in recorded]
        rest = [key for key in known if grid.is_retired(key) or runs.state(grid.cell(key, runs.folder)) != "done"]
        check_recorded(grid, rest, recorded)
    if not options.collect:
        retired = retired_keys(grids, options, recorded)
        jobs = make_jobs(grids, options)
        for job in jobs:
            runs.check_unchanged(job.cell)
        brought = [job for job in jobs if job.key in recorded and runs.state(job.cell) != "done"]
        if options.list:
            list_jobs(jobs, runs, brought, retired)
            return 0
        jobs = [job for job in jobs if job not in brought]
        if brought or retired:
            count = len(brought) + len(retired)
            print(f"# {count} cells were run elsewhere; {len(jobs)} are left for this folder")
        for grid in grids:
            grid.prepare([job.key for job in jobs if job.grid is grid], runs.folder)
        if options.slurm is not None:
            runs.folder.mkdir(parents=True, exist_ok=True)
            print(f"# {options.slurm}: {write_slurm(jobs, runs, options)} tasks")
            return 0
        _check_tools(grids)
        left = run_all(jobs, runs, options.retry_failed, sys.stdout)
    if options.cell is None:
        for grid in grids:
            out = grid.file.parent if options.beside else options.out
            for file in collect(grid, runs.folder, out, recorded):
                print(file)
    return 1 if left else 0


def main(argv: Sequence[str] | None = None, program: tuple[str, ...] = PROGRAM) -> int:
    """The exit status. ``program`` is what the command line of a cell is for, with its Python in front."""
    options = parse(argv)
    try:
        return work(options, program)
    except (SetupError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return EXIT_SETUP
    except (Interrupted, KeyboardInterrupt):
        print("# stopped; the same command resumes", file=sys.stderr)
        return EXIT_STOPPED


if __name__ == "__main__":
    sys.exit(main())
