"""Cells of a grid: command lines, each run to completion once in a separate process, across interruptions.

    <runs>/<cell>/          the run folder of src/main.py
    <runs>/<cell>.log       the output of the process; locked as long as one of its processes lives
    <runs>/<cell>.json      the command, and the exit status once it has ended

A finished cell is never run again. An interrupted one resumes from its own checkpoints, or starts again if it has none.
Several processes, also on several machines, may work on the same folder: locked cells are skipped.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import json
import os
import re
import shlex
import shutil
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, TextIO

from dissect_clip.errors import SetupError
from experiments.process import supervise

CUT_OFF = (75, 130)
"""Exit statuses of a training that saved and stopped on request."""

_TAIL = 15  # lines of a log
_TRIES, _PAUSE = 5, 0.1  # to get a lock, and seconds between them


@dataclass(frozen=True)
class CellKey:
    """The values of a grid's factors that identify a cell."""

    data: str
    noise: float
    method: str
    rate: float | None  # None trains on all data
    seed: int

    def __str__(self) -> str:
        rate = "" if self.rate is None else f" at {100 * self.rate:g} %"
        noise = f" with {100 * self.noise:g} % wrong captions" if self.noise else ""
        return f"{self.method}{rate} on {self.data}{noise}, seed {self.seed}"

    @property
    def name(self) -> str:
        """The name of the cell's files."""
        noise = f"-noise{self.noise:g}" if self.noise else ""
        rate = "" if self.rate is None else f"-{self.rate:g}"
        return re.sub(r"[^\w.]+", "-", f"{self.data}{noise}-{self.method}{rate}-seed{self.seed}")


@dataclass(frozen=True)
class Cell:
    """A training run and its evaluations. The ``command`` identifies it: that of a finished cell must not change.

    ``words`` are the arguments of the program if they differ from ``command``: folders may move.
    """

    name: str  # of its files
    label: str  # for messages
    command: tuple[str, ...]
    words: tuple[str, ...] = ()
    launcher: tuple[str, ...] = ()  # starts the program, in place of this Python
    evaluations: tuple[Evaluation, ...] = ()

    @property
    def identity(self) -> list[str]:
        """The words that are compared with the command of an earlier run."""
        return [*self.launcher, *self.command]


@dataclass(frozen=True)
class Evaluation:
    """A command line that evaluates the trained model on another set, in the folder ``<cell>/evaluation/<name>``."""

    name: str
    command: tuple[str, ...]
    words: tuple[str, ...]


@dataclass(frozen=True)
class Note:
    """The record of a cell: the command of the last attempt and its exit status (None until it ends)."""

    command: list[str]
    status: int | None
    seconds: float = 0.0  # of the last attempt's process
    stopped: bool = False  # by a signal
    evaluations: dict[str, dict[str, Any]] = field(default_factory=dict)  # command and status of each, by name

    def outcomes(self) -> list[int | None]:
        """The exit statuses of training and evaluations."""
        return [self.status, *(found["status"] for found in self.evaluations.values())]


class Interrupted(Exception):  # noqa: N818 - nothing went wrong
    """A signal requested a stop; the running process has saved and ended."""


class Busy(Exception):  # noqa: N818 - nothing went wrong
    """Another process has the cell."""


@dataclass(frozen=True)
class Runs:
    """A folder of cells, and the program that their commands are for."""

    folder: Path
    program: tuple[str, ...]  # with the Python that runs it, for cells without a launcher
    cwd: Path | None = None

    def run_folder(self, cell: Cell) -> Path:
        """The run folder of a cell."""
        return self.folder / cell.name

    def log(self, cell: Cell) -> Path:
        """The output of all attempts since the cell last started from the beginning."""
        return self.folder / f"{cell.name}.log"

    def evaluation_folder(self, cell: Cell, evaluation: Evaluation) -> Path:
        """The run folder of an evaluation."""
        return self.run_folder(cell) / "evaluation" / evaluation.name

    def note_file(self, cell: Cell) -> Path:
        """The file with the note of a cell."""
        return self.folder / f"{cell.name}.json"

    def note(self, cell: Cell) -> Note | None:
        """The note of a cell; None before its first attempt."""
        file = self.note_file(cell)
        return Note(**json.loads(file.read_text(encoding="utf-8"))) if file.exists() else None

    def status(self, cell: Cell) -> int | None:
        """The exit status of the last attempt; None if it has none."""
        note = self.note(cell)
        return None if note is None else note.status

    def state(self, cell: Cell) -> str:
        """One of "done", "running", "failed", "cut off" and "waiting".

        A cell that lacks an evaluation is cut off. One that failed with another command than it has now is waiting.
        """
        if self._is_running(cell):
            return "running"
        note = self.note(cell)
        if note is None or (note.status != 0 and note.command != cell.identity):
            return "waiting"
        if note.status == 0 and all(self._is_evaluated(note, evaluation) for evaluation in cell.evaluations):
            return "done"
        wrong = [status for status in note.outcomes() if status not in (0, None, *CUT_OFF)]
        return "failed" if wrong and not note.stopped else "cut off"

    def check_unchanged(self, cell: Cell) -> None:
        """Check that finished cells still have the same command.

        Raises:
            SetupError: one differs; names the flags.
        """
        note = self.note(cell)
        if note is None:
            return
        pairs = [(note.command, cell.identity)] if note.status == 0 else []
        for evaluation in cell.evaluations:
            if self._is_evaluated(note, evaluation):
                pairs.append((note.evaluations[evaluation.name]["command"], list(evaluation.command)))
        for before, now in pairs:
            if before != now:
                raise SetupError(
                    f"{self.note_file(cell)} is finished, with another command: {difference(before, now)}. Restore the "
                    "command, use another folder, or delete this file to run the cell again"
                )

    def tail(self, cell: Cell) -> str:
        """The end of the log."""
        log = self.log(cell)
        text = log.read_text(encoding="utf-8", errors="replace") if log.exists() else ""
        return "\n".join(text.splitlines()[-_TAIL:])

    def run(self, cell: Cell, *, resume: bool, watch: Callable[[], None] = lambda: None) -> int:
        """Run a cell to its end; the exit status of what failed, or 0.

        SIGTERM, SIGUSR1 and SIGINT are passed on as one SIGTERM, at which training saves and ends.

        Args:
            resume: resume from checkpoints of an interrupted attempt; otherwise start from the beginning.
            watch: called every half second while something runs.

        Raises:
            Busy: another process has the cell.
            Interrupted: a signal asked for the end.
        """
        self.folder.mkdir(parents=True, exist_ok=True)
        with self._locked(cell) as log:
            note = self.note(cell)
            if note is None or note.status != 0:
                note = self._train(cell, log, note, resume, watch)
            if note.status == 0:
                note = self._evaluate(cell, log, note, watch)
            return next((status for status in note.outcomes() if status), 0)

    def _train(self, cell: Cell, log: TextIO, before: Note | None, resume: bool, watch: Callable[[], None]) -> Note:
        same = before is not None and before.command == cell.identity
        if not (resume and same and any((self.run_folder(cell) / "checkpoints").glob("epoch_*.pt"))):
            shutil.rmtree(self.run_folder(cell), ignore_errors=True)
            log.truncate(0)
        note = Note(cell.identity, None)
        self._write(cell, note)
        began = time.perf_counter()
        status, asked = self._call(cell, cell.words or cell.command, log, watch)
        seconds = round(time.perf_counter() - began, 2)
        note = replace(note, status=status, seconds=seconds, stopped=asked and status != 0)
        return self._written(cell, note, asked)

    def _evaluate(self, cell: Cell, log: TextIO, note: Note, watch: Callable[[], None]) -> Note:
        for evaluation in cell.evaluations:
            if self._is_evaluated(note, evaluation):
                continue
            shutil.rmtree(self.evaluation_folder(cell, evaluation), ignore_errors=True)
            status, asked = self._call(cell, evaluation.words, log, watch)
            found = {"command": list(evaluation.command), "status": status}
            stopped = asked and status != 0
            note = replace(note, stopped=stopped, evaluations={**note.evaluations, evaluation.name: found})
            note = self._written(cell, note, asked)
        return note

    def _call(self, cell: Cell, words: Sequence[str], log: TextIO, watch: Callable[[], None]) -> tuple[int, bool]:
        """Run one command line; its exit status, and whether a signal requested its end."""
        program = (*cell.launcher, *self.program[1:]) if cell.launcher else self.program
        return supervise([*program, *words], log, self.cwd, watch)

    def _written(self, cell: Cell, note: Note, asked: bool) -> Note:
        """Write the note to disk and return it.

        Raises:
            Interrupted: a signal ``asked`` for the end.
        """
        self._write(cell, note)
        if asked:
            raise Interrupted
        return note

    @staticmethod
    def _is_evaluated(note: Note, evaluation: Evaluation) -> bool:
        return evaluation.name in note.evaluations and note.evaluations[evaluation.name]["status"] == 0

    def _write(self, cell: Cell, note: Note) -> None:
        file = self.note_file(cell)
        partial = file.with_suffix(".json.tmp")
        partial.write_text(json.dumps(vars(note), indent=1) + "\n", encoding="utf-8")
        os.replace(partial, file)

    def _is_running(self, cell: Cell) -> bool:
        log = self.log(cell)
        if not log.exists():
            return False
        with log.open("r+", encoding="utf-8") as file:
            return not _lock(file)

    @contextlib.contextmanager
    def _locked(self, cell: Cell) -> Iterator[TextIO]:
        with self.log(cell).open("a", encoding="utf-8") as file:
            for _ in range(_TRIES):  # another process may be checking the lock
                if _lock(file):
                    break
                time.sleep(_PAUSE)
            else:
                raise Busy
            yield file


def _lock(file: TextIO) -> bool:
    """Try to lock an open file. The lock lasts until the last process that inherited the file ends."""
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        if error.errno in (errno.EWOULDBLOCK, errno.EACCES):
            return False
        raise SetupError(f"cannot lock {file.name}: {error.strerror}. Use a file system that has locks") from error
    return True


def _settings(words: Sequence[str]) -> list[str]:
    """A command line as flags with their values: ``["--lr 0.1", "--select"]``."""
    found: list[str] = []
    for word in words:
        if word.startswith("--") or not found:
            found.append(shlex.quote(word))
        else:
            found[-1] += f" {shlex.quote(word)}"
    return found


def difference(before: Sequence[str], now: Sequence[str]) -> str:
    """The difference of two command lines, as in "was `--lr 0.1`, now `--lr 0.2`"."""
    old, new = _settings(before), _settings(now)
    gone, come = [s for s in old if s not in new], [s for s in new if s not in old]
    if not gone and not come:
        return "its flags are in another order"
    return f"was `{' '.join(gone)}`, now `{' '.join(come)}`"


def read_results(file: Path) -> list[dict[str, Any]]:
    """The evaluations in a ``results.jsonl``, by epoch; the last line of an epoch that appears twice.

    A line that is torn, as of a run that was killed, is passed over.
    """
    found: dict[int, dict[str, Any]] = {}
    for line in file.read_bytes().splitlines() if file.exists() else ():
        with contextlib.suppress(ValueError):
            row = json.loads(line)
            found[row["epoch"]] = row
    return [found[epoch] for epoch in sorted(found)]
