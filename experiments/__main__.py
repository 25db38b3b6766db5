"""Run a grid of (data, method, rate, seed, wrong captions); make tables and plots of it, beside a paper's figures.

    python -m experiments experiments/small/methods/methods.yaml --data EMOJI=/data/emoji     run what is left, collect
    python -m experiments experiments/paper/cc3m/cc3m.yaml --data ... --list               the cells and their state
    python -m experiments experiments/paper/cc3m/cc3m.yaml --data ... --slurm cc3m.sbatch  a job array, a task a cell
    python -m experiments experiments/small/methods/methods.yaml --collect --beside           tables and plots only
    python -m experiments experiments/small/rates/rates.yaml --data ... --from experiments/small    and recorded runs

Each cell is one command line of src/main.py in a process of its own. Cells that are finished are not run again; one
that was cut off goes on from its own checkpoints. Grids that are given together, or one after the other with the same
--runs, share the cells they have in common. docs/guides/reproduce.md tells the rest.

Exit status: 0 when all cells are finished, 1 when some are not, 2 when something is wrong with grids, flags or data, 75
when a signal has stopped it.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib.util
import json
import shlex
import shutil
import statistics
import sys
import time
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TextIO

from dissect_clip.errors import SetupError
from experiments.cells import CUT_OFF, Busy, Cell, Interrupted, Runs, read_results
from experiments.collect import collect, published_figures
from experiments.earlier import check_earlier, read_earlier
from experiments.grid import Grid, read_grid
from experiments.moved import moved
from experiments.point import Point

ROOT = Path(__file__).resolve().parent.parent
PROGRAM = (sys.executable, str(ROOT / "src" / "main.py"))
EXIT_SETUP, EXIT_STOPPED = 2, 75
_QUIET = 60.0  # seconds between two lines of progress where the output is no terminal
_TAIL = 4096  # bytes at the end of a log that hold its last line


@dataclass(frozen=True)
class Job:
    """A cell of one grid or several."""

    grid: Grid
    point: Point
    cell: Cell
    epochs: int


# ---- progress


def short_time(seconds: float) -> str:
    """As in "1 h 05 min", "5 min 10 s", "7 s"."""
    minutes, rest = divmod(round(seconds), 60)
    if minutes >= 60:
        return f"{minutes // 60} h {minutes % 60:02d} min"
    return f"{minutes} min {rest:02d} s" if minutes else f"{rest} s"


def trained_epochs(run: Path) -> float:
    """How far a run is, with the part of the current epoch where that was logged."""
    found = [float(row["epoch"]) for row in read_results(run / "checkpoints" / "results.jsonl")[-1:]]
    log = run / "train.jsonl"
    if log.exists():
        with log.open("rb") as file:  # it may be long
            file.seek(max(0, log.stat().st_size - _TAIL))
            lines = file.read().splitlines()
        for line in lines[-2:]:
            with contextlib.suppress(ValueError):  # the last may be in the middle of being written
                found.append(float(json.loads(line)["epoch"]))
    return max(found, default=0.0)


@dataclass
class Progress:
    """Tells how far the grid is: one line that changes on a terminal, a line now and then elsewhere."""

    runs: Runs
    jobs: Sequence[Job]
    stream: TextIO
    began: float = 0.0
    _before: float = 0.0  # epochs that the running cell had when it was started
    _told: float = 0.0
    _text: str = ""
    _seconds: dict[str, float] = field(default_factory=dict)  # of finished cells

    def say(self, text: str) -> None:
        """A line that stays."""
        clear = "\r\x1b[K" if self.stream.isatty() else ""
        print(f"{clear}{text}", file=self.stream, flush=True)

    def begin(self, job: Job, states: Mapping[str, str]) -> None:
        """A cell is about to run."""
        self.began, self._told = time.monotonic(), time.monotonic()
        self._before = trained_epochs(self.runs.run_folder(job.cell))
        notes = {name: self.runs.note(j.cell) for j in self.jobs if states[name := j.cell.name] == "done"}
        self._seconds = {name: note.seconds for name, note in notes.items() if note is not None}
        self.say(f"# {job.cell.label}: {shlex.join(job.cell.words)}")

    def left(self, job: Job, states: Mapping[str, str], epochs: float) -> float | None:
        """Seconds until everything is done, if all cells take what those before took; None if nothing is known."""
        gone, fresh = time.monotonic() - self.began, epochs - self._before
        rest = gone / fresh * (job.epochs - epochs) if fresh > 0 else None
        known = list(self._seconds.values()) or ([gone + rest] if rest is not None else [])
        if not known:
            return None
        mean = statistics.mean(known)
        waiting = sum(state in ("waiting", "cut off") for state in states.values()) - 1
        return (max(mean - gone, 0) if rest is None else rest) + mean * max(waiting, 0)

    def show(self, job: Job, states: Mapping[str, str]) -> None:
        """How far the running cell and the grid are, not more often than can be read."""
        now, pause = time.monotonic(), 1.0 if self.stream.isatty() else _QUIET
        if now - self._told < pause:
            return
        self._told = now
        epochs = trained_epochs(self.runs.run_folder(job.cell))
        left = self.left(job, states, epochs)
        counts = ", ".join(
            f"{list(states.values()).count(state)} {state}" for state in ("done", "failed") if state in states.values()
        )
        text = (
            f"[{counts or '0 done'} of {len(states)}] {job.cell.label}: epoch {epochs:.4g} of {job.epochs}"
            f"{'' if left is None else f'; all done in {short_time(left)}'}"
        )
        if self.stream.isatty():
            width = shutil.get_terminal_size().columns
            print(f"\r\x1b[K{text[: width - 1]}", end="", file=self.stream, flush=True)
        elif text != self._text:
            self._text = text
            self.say(text)


# ---- running


def run_all(jobs: Sequence[Job], runs: Runs, retry_failed: bool, stream: TextIO) -> int:
    """Run what is left, one cell after the other; the number of cells that are not finished in the end.

    Raises:
        Interrupted: a signal asked for the end.
    """
    progress = Progress(runs, jobs, stream)
    wanted = ("waiting", "cut off", "failed") if retry_failed else ("waiting", "cut off")
    busy = []
    for job in jobs:
        state = runs.state(job.cell)
        if state == "failed" and not retry_failed:
            _tell_failure(progress, runs, job, "failed before; --retry-failed runs it again")
        if state == "running":
            busy.append(job)
        if state in wanted:
            _run_one(job, runs, progress)
    for job in busy:  # what had them may have been killed: leftovers hold a cell for a moment
        if runs.state(job.cell) in wanted:
            _run_one(job, runs, progress)
    states = {job.cell.name: runs.state(job.cell) for job in jobs}
    progress.say(f"# {summary(states)}")
    return sum(state != "done" for state in states.values())


def _run_one(job: Job, runs: Runs, progress: Progress) -> None:
    states = {other.cell.name: runs.state(other.cell) for other in progress.jobs}
    progress.begin(job, states)
    try:
        status = runs.run(job.cell, resume=True, watch=lambda: progress.show(job, states))
    except Busy:
        progress.say(f"# {job.cell.label}: another process runs it")
        return
    if status in CUT_OFF:
        progress.say(f"# {job.cell.label}: stopped with status {status}")
    elif status != 0:
        _tell_failure(progress, runs, job, f"failed with status {status}")
    else:
        progress.say(f"# {job.cell.label}: done after {short_time(time.monotonic() - progress.began)}")


def _tell_failure(progress: Progress, runs: Runs, job: Job, words: str) -> None:
    tail = "\n".join(f"    {line}" for line in runs.tail(job.cell).splitlines())
    progress.say(f"# {job.cell.label} {words}; see {runs.log(job.cell)}\n{tail}")


def summary(states: Mapping[str, str]) -> str:
    """As in "12 cells: 10 done, 2 failed"."""
    counts = {
        state: list(states.values()).count(state) for state in ("done", "running", "cut off", "failed", "waiting")
    }
    told = ", ".join(f"{count} {state}" for state, count in counts.items() if count)
    return f"{len(states)} cell{'s' * (len(states) != 1)}: {told or 'none'}"


def list_jobs(jobs: Sequence[Job], runs: Runs, brought: Sequence[Job] = (), recorded: Sequence[Point] = ()) -> None:
    """Print every cell with its state; those that are ``brought`` from elsewhere, or only ``recorded``, are done."""
    for point in recorded:
        print(f"done      {point.name}  run elsewhere")
    states = dict.fromkeys((point.name for point in recorded), "done")
    states |= {job.cell.name: "done" if job in brought else runs.state(job.cell) for job in jobs}
    for job in jobs:
        if job in brought:
            print(f"done      {job.cell.name}  run elsewhere")
            continue
        state, note = states[job.cell.name], runs.note(job.cell)
        more = ""
        if state in ("running", "cut off"):
            more = f"  epoch {trained_epochs(runs.run_folder(job.cell)):.4g} of {job.epochs}"
        elif state in ("done", "failed") and note is not None:
            more = f"  {short_time(note.seconds)}" + (f", see {runs.log(job.cell)}" if state == "failed" else "")
        print(f"{state:<8}  {job.cell.name}{more}")
    print(summary(states))


# ---- Slurm

_SBATCH = """\
#!/usr/bin/env bash
# Written by `python -m experiments`: a task for each cell of {grids}. Submit it with
#   sbatch {file}
# and again for what is left: a task whose cell is finished ends at once, one that was cut off goes on. Words after the
# file's name are passed on: --retry-failed runs cells again that have failed. When all is done:
#   {collect}

#SBATCH --job-name="{name}"
#SBATCH --array=0-{last}
#SBATCH --requeue
#SBATCH --signal=B:TERM@300
#SBATCH --open-mode=append
#SBATCH --output="{runs}/slurm-%A_%a.out"
{options}
set -euo pipefail
cd {cwd}
export PATH={python}:$PATH
export PYTHONPATH={root}${{PYTHONPATH:+:$PYTHONPATH}}

CELLS=(
{cells}
)

# Five minutes before the time limit Slurm sends TERM to this script only; the training saves, and is queued again.
{command} --cell "${{CELLS[$SLURM_ARRAY_TASK_ID]}}" "$@" &
task=$!
trap 'kill -TERM "$task" 2>/dev/null || true' TERM
status=0
wait "$task" || status=$?
if kill -0 "$task" 2>/dev/null; then # TERM has come, and ended the first wait
    status=0
    wait "$task" || status=$?
fi
if [[ "$status" == {stopped} ]]; then
    scontrol requeue "${{SLURM_ARRAY_JOB_ID}}_$SLURM_ARRAY_TASK_ID"
    exit 0
fi
exit "$status"
"""


def _quoted(option: str) -> str:
    """An option of sbatch with its value in the quotes that sbatch takes, where it has blanks."""
    name, equals, value = option.partition("=")
    return f'{name}{equals}"{value}"' if any(map(str.isspace, value)) else option


def write_slurm(jobs: Sequence[Job], runs: Runs, options: argparse.Namespace) -> int:
    """Write a job array of what is not finished; the number of its tasks.

    Raises:
        SetupError: the grids do not agree on what Slurm is asked for.
    """
    left = [job.cell.name for job in jobs if runs.state(job.cell) != "done"]
    asked = {tuple(job.grid.slurm) for job in jobs}
    if len(asked) > 1:
        raise SetupError("--slurm: the grids ask for different things (slurm): write a script for each")
    if not left:
        return 0
    grids = [str(file.resolve()) for file in options.grids]
    data = [word for name, value in options.data.items() for word in ("--data", f"{name}={value}")]
    earlier = [word for folder in options.earlier for word in ("--from", str(folder.resolve()))]
    base = [sys.executable, "-m", "experiments", *grids, "--runs", str(runs.folder), *earlier]
    text = _SBATCH.format(
        grids=", ".join(str(file) for file in options.grids), file=options.slurm, name=jobs[0].grid.name,
        collect=shlex.join([*base, "--collect", "--out", str(options.out.resolve())]),
        last=len(left) - 1, runs=str(runs.folder).replace("%", "%%"),
        options="".join(f"#SBATCH {_quoted(option)}\n" for option in next(iter(asked))),
        cwd=shlex.quote(str(Path.cwd())),
        python=shlex.quote(str(Path(sys.executable).parent)), root=shlex.quote(str(ROOT)),
        cells="\n".join(f"    {name}" for name in left), command=shlex.join([*base, *data]), stopped=EXIT_STOPPED,
    )  # fmt: skip
    options.slurm.write_text(text, encoding="utf-8")
    options.slurm.chmod(0o755)
    return len(left)


# ---- the command line


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
        "--from", action="append", default=[], type=lambda text: moved(Path(text)), dest="earlier", metavar="FOLDER",
        help="cells that stand in this folder of collected results are finished; may be given several times",
    )  # fmt: skip
    parser.add_argument("--rows", nargs="+", metavar="METHOD", help="run these rows only; tables have all of them")
    parser.add_argument("--retry-failed", action="store_true", help="run cells again that have failed")
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


def wanted_points(grid: Grid, options: argparse.Namespace) -> list[Point]:
    """The cells of a grid that the command line asks for."""
    return [
        point
        for point in grid.points()
        if (options.rows is None or point.method in options.rows) and options.cell in (None, point.name)
    ]


def recorded_points(grids: Sequence[Grid], options: argparse.Namespace, earlier: Collection[Point]) -> list[Point]:
    """The cells whose results are recorded and whose flags were removed since.

    Raises:
        SetupError: one is not among the ``earlier`` runs, and so would have to be run.
    """
    found: dict[Point, None] = {}
    for grid in grids:
        points = [point for point in wanted_points(grid, options) if grid.is_recorded(point)]
        for point in points:
            if point not in earlier:
                raise SetupError(
                    f"{grid.file}: {point.method} cannot be run here: flags of it were removed after commit "
                    f"{grid.methods[point.method].commit}. Take its recorded results (--from experiments/small), "
                    "leave it out (--rows), or run it at that commit"
                )
        found |= dict.fromkeys(points)
    return list(found)


def make_jobs(grids: Sequence[Grid], options: argparse.Namespace) -> list[Job]:
    """The cells of all grids that can be run, each once, checked.

    Raises:
        SetupError: flags of a cell are wrong, or grids have different cells of the same name.
    """
    jobs: dict[str, Job] = {}
    for grid in grids:
        points = [p for p in wanted_points(grid, options) if not grid.is_recorded(p)]
        grid.check(points)
        for point in points:
            job = Job(grid, point, grid.cell(point, options.runs), grid.config(point).training.epochs)
            other = jobs.setdefault(point.name, job)
            if (other.cell.identity, other.cell.evaluations) != (job.cell.identity, job.cell.evaluations):
                raise SetupError(
                    f"{grid.file} and {other.grid.file} have different cells {point.name}: give each its own --runs"
                )
    if options.cell is not None and not any(wanted_points(grid, options) for grid in grids):
        raise SetupError(f"--cell {options.cell}: no grid has this cell; --list shows them")
    return list(jobs.values())


def _check_tools(grids: Sequence[Grid]) -> None:
    """What a run will need in its course, or in its end."""
    if importlib.util.find_spec("matplotlib") is None:
        raise SetupError("matplotlib is not installed: pip install -e '.[reproduce]'")
    for grid in grids:
        if grid.launcher and shutil.which(grid.launcher[0]) is None:
            raise SetupError(f"{grid.file}: launcher: {grid.launcher[0]} is not on the PATH")


def work(options: argparse.Namespace, program: tuple[str, ...]) -> int:
    """Do what the command line asks for; the exit status.

    Raises:
        SetupError: something is wrong with grids, flags or data.
        Interrupted: a signal asked for the end.
    """
    grids = read_grids(options)
    runs = Runs(options.runs, program)
    left = 0
    earlier = read_earlier(options.earlier)
    for grid in grids:
        known = [point for point in grid.points() if point in earlier]
        rest = [p for p in known if grid.is_recorded(p) or runs.state(grid.cell(p, runs.folder)) != "done"]
        check_earlier(grid, rest, earlier)
    if not options.collect:
        recorded = recorded_points(grids, options, earlier)
        jobs = make_jobs(grids, options)
        for job in jobs:
            runs.check_unchanged(job.cell)
        brought = [job for job in jobs if job.point in earlier and runs.state(job.cell) != "done"]
        if options.list:
            list_jobs(jobs, runs, brought, recorded)
            return 0
        jobs = [job for job in jobs if job not in brought]
        if brought or recorded:
            print(f"# {len(brought) + len(recorded)} cells were run elsewhere; {len(jobs)} are left for this folder")
        for grid in grids:
            grid.prepare([job.point for job in jobs if job.grid is grid], runs.folder)
        if options.slurm is not None:
            runs.folder.mkdir(parents=True, exist_ok=True)
            print(f"# {options.slurm}: {write_slurm(jobs, runs, options)} tasks")
            return 0
        _check_tools(grids)
        left = run_all(jobs, runs, options.retry_failed, sys.stdout)
    if options.cell is None:
        for grid in grids:
            out = grid.file.parent if options.beside else options.out
            for file in collect(grid, runs.folder, out, earlier):
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
        print("# stopped; the same command goes on from here", file=sys.stderr)
        return EXIT_STOPPED


if __name__ == "__main__":
    sys.exit(main())
