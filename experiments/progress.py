"""The progress of a grid: the epoch of the running cell and the remaining time."""

from __future__ import annotations

import contextlib
import json
import shlex
import shutil
import statistics
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TextIO

from experiments.cells import Runs, read_results
from experiments.jobs import Job

_QUIET = 60.0  # seconds between two lines of progress where the output is no terminal
_TAIL = 4096  # bytes at the end of a log that hold its last line


def short_time(seconds: float) -> str:
    """As in "1 h 05 min", "5 min 10 s", "7 s"."""
    minutes, rest = divmod(round(seconds), 60)
    if minutes >= 60:
        return f"{minutes // 60} h {minutes % 60:02d} min"
    return f"{minutes} min {rest:02d} s" if minutes else f"{rest} s"


def trained_epochs(run: Path) -> float:
    """The epochs that a run has trained, with the logged fraction of the current one."""
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
    """Prints the progress of the grid: one changing line on a terminal, a line a minute elsewhere."""

    runs: Runs
    jobs: Sequence[Job]
    stream: TextIO
    began: float = 0.0
    _before: float = 0.0  # epochs that the running cell had when it was started
    _shown: float = 0.0
    _text: str = ""
    _seconds: dict[str, float] = field(default_factory=dict)  # of finished cells

    def say(self, text: str) -> None:
        """Print a permanent line."""
        clear = "\r\x1b[K" if self.stream.isatty() else ""
        print(f"{clear}{text}", file=self.stream, flush=True)

    def begin(self, job: Job, states: Mapping[str, str]) -> None:
        """Start the clock of a cell."""
        self.began, self._shown = time.monotonic(), time.monotonic()
        self._before = trained_epochs(self.runs.run_folder(job.cell))
        notes = {name: self.runs.note(j.cell) for j in self.jobs if states[name := j.cell.name] == "done"}
        self._seconds = {name: note.seconds for name, note in notes.items() if note is not None}
        self.say(f"# {job.cell.label}: {shlex.join(job.cell.words)}")

    def left(self, job: Job, states: Mapping[str, str], epochs: float) -> float | None:
        """Estimated seconds until all cells are done, from the finished ones; None before there is an estimate."""
        gone, fresh = time.monotonic() - self.began, epochs - self._before
        rest = gone / fresh * (job.epochs - epochs) if fresh > 0 else None
        known = list(self._seconds.values()) or ([gone + rest] if rest is not None else [])
        if not known:
            return None
        mean = statistics.mean(known)
        waiting = sum(state in ("waiting", "cut off") for state in states.values()) - 1
        return (max(mean - gone, 0) if rest is None else rest) + mean * max(waiting, 0)

    def show(self, job: Job, states: Mapping[str, str]) -> None:
        """Print the progress, at most once a second on a terminal."""
        now, pause = time.monotonic(), 1.0 if self.stream.isatty() else _QUIET
        if now - self._shown < pause:
            return
        self._shown = now
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
