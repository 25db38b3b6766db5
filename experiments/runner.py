"""Runs the cells of grids, one after the other, and lists their states."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from typing import TextIO

from experiments.cells import CUT_OFF, Busy, CellKey, Runs
from experiments.jobs import Job
from experiments.progress import Progress, short_time, trained_epochs


def run_all(jobs: Sequence[Job], runs: Runs, retry_failed: bool, stream: TextIO) -> int:
    """Run the unfinished cells one after the other; returns how many are unfinished at the end.

    Raises:
        Interrupted: a signal requested a stop.
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
    for job in busy:  # their owner may have been killed; its children hold the lock for a moment
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
    text = ", ".join(f"{count} {state}" for state, count in counts.items() if count)
    return f"{len(states)} cell{'s' * (len(states) != 1)}: {text or 'none'}"


def list_jobs(jobs: Sequence[Job], runs: Runs, brought: Sequence[Job] = (), retired: Sequence[CellKey] = ()) -> None:
    """Print every cell with its state; those that are ``brought`` from elsewhere, or ``retired``, are done."""
    for key in retired:
        print(f"done      {key.name}  run elsewhere")
    states = dict.fromkeys((key.name for key in retired), "done")
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
